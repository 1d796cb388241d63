"""Refusals of single questions: filtered by a server, or too long for its context.

Servers report them with different statuses, codes and sentences. All other questions go on.
"""

import re

# statuses of requests that are wrong, or not allowed, in themselves; some servers report a context
# that is too short as a failure of their own
STATUSES = (400, 403, 413, 422, 451, 500)
FILTERED = re.compile(
    r"content[ _-]?(?:filter|polic|management|moderation)|ResponsibleAI|moderation|\bflagged\b"
    r"|safety (?:system|polic|filter|reason)"
    r"|data_inspection_failed|inappropriate content|ContentPolicyViolation|PROHIBITED_CONTENT",
    re.IGNORECASE,
)
TOO_LONG = re.compile(
    r"context[ _-]?(?:length|window|size|limit|overflow)|maximum (?:context|model|sequence|input|prompt) |max_model_len"
    r"|prompt (?:is|was)? ?too (?:long|large)|too many (?:input )?tokens"
    r"|(?:input|prompt|request|message)s? (?:is|are|was)? ?too long"
    r"|longer than the (?:model|maximum)|string_above_max_length|reduce the length|must have less than \d+ tokens"
    r"|`max_new_tokens` must be <=|exceeds? the (?:available|maximum|model|limit|token)|could not finish the message"
    r"|n_keep .* n_ctx|token count exceeds|when context the overflows",
    re.IGNORECASE,
)


class RequestRefusedError(Exception):
    """A question that the server does not answer, however often it is sent."""


def refusal_of(status: int, code: object, message: str) -> str | None:
    """Return why a server refuses one question, "filtered" or "too long", or None.

    `code` and `message` are those of its error. Other errors are about every question.
    """
    if status not in STATUSES:
        return None
    text = f"{code} {message}"
    if FILTERED.search(text) and status != 500:
        return "filtered"
    return "too long" if TOO_LONG.search(text) and status != 403 else None
