"""Guide completions in the policy's tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlgf.data.tokenization import decode_continuations
from rlgf.errors import GuideError
from rlgf.guides.base import Completion, CompletionRequest
from rlgf.models.language_model import LanguageModel
from rlgf.untrusted_text import replace_surrogates


@dataclass(frozen=True)
class EncodedCompletion:
    """A guide's completion in the policy's tokens."""

    ids: list[int]
    ended_with_eos: bool
    truncated: bool  # whether tokens were dropped
    text: str | None = None  # the unchanged completion of a text guide
    changed: bool = False  # whether encoding and decoding changes that text


def encode_guide_completions(
    policy: LanguageModel, requests: Sequence[CompletionRequest], completions: Sequence[Completion]
) -> list[EncodedCompletion | None]:
    """Encode a guide's completions in policy tokens, each text once.

    A finished completion gets the policy's EOS token if it fits; a truncated one does not. Tokens
    after an EOS token that the guide generated are dropped, and those beyond max_new_tokens.

    Returns:
        One per request; None for a failed one.

    Raises:
        GuideError: a token id is outside the policy's vocabulary.
    """
    codec, found = policy.codec, list[EncodedCompletion | None]([None] * len(completions))
    texts: list[int] = []
    encoded: list[list[int]] = []
    for row, (request, completion) in enumerate(zip(requests, completions)):
        if completion.failed:
            continue
        if completion.ids is not None:
            found[row] = _limit(policy, list(completion.ids), request.max_new_tokens)
            continue
        ids = codec.response(completion.text, has_prefix=bool(request.prefix_ids))
        texts.append(row)
        encoded.append(ids)
    contexts = [
        list(requests[row].prefix_ids) if codec.is_encoder_decoder else [*requests[row].prompt_ids, *requests[row].prefix_ids]
        for row in texts
    ]
    decoded = decode_continuations(codec.tokenizer, contexts, encoded) if texts else []
    for row, ids, again in zip(texts, encoded, decoded):
        completion, limit = completions[row], requests[row].max_new_tokens
        ended = completion.finished and len(ids) < limit
        limited = _limit(policy, [*ids, policy.eos_token_id] if ended else ids, limit)
        text = completion.text
        found[row] = EncodedCompletion(
            limited.ids, limited.ended_with_eos, limited.truncated, replace_surrogates(text), again != text
        )
    return found


def _limit(policy: LanguageModel, ids: list[int], max_new_tokens: int) -> EncodedCompletion:
    """Drop the tokens after the first EOS token and those beyond `max_new_tokens`."""
    absent = set() if policy.absent_ids is None else set(policy.absent_ids.tolist())
    if any(not 0 <= token < policy.vocab_size or token in absent for token in ids):
        raise GuideError(
            f"the guide returned token ids outside the policy's vocabulary of {policy.vocab_size}: it must use the policy's "
            "tokenizer."
        )
    end = next((place + 1 for place, token in enumerate(ids) if token in policy.eos_token_ids), len(ids))
    kept = ids[: min(end, max_new_tokens)]
    return EncodedCompletion(kept, bool(kept) and kept[-1] in policy.eos_token_ids, len(kept) < len(ids))
