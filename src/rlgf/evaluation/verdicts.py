"""Verdicts: the choice that a judge's response states, or None if it is unclear."""

import json
import re
from collections.abc import Mapping
from typing import Any, cast

# the form of responses as JSON
VERDICT_SCHEMA: Mapping[str, Any] = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"comparison": {"type": "string"}, "preferred": {"type": "string", "enum": ["A", "B"]}},
            "required": ["comparison", "preferred"],
            "additionalProperties": False,
        },
    },
}
NAMES = r"(?:preferred|preference|choice|answer|verdict|winner|decision|better|best|chosen)"
KEYS = ("preferred", "preference", "choice", "answer", "verdict", "winner", "decision", "better", "chosen")
MARKS = r"[\s*_\"'`#>~$“”„«»]*"
# `Preferred: …`, `**My choice:** …`, `The better summary is: …`
LABEL = re.compile(
    rf"^{MARKS}(?:(?:my|the|final|second|so|therefore|thus)[\s,]+)*{NAMES}\b(?:\s+(?:summary|option|tl;?dr|response|answer|one|is))*"
    rf"{MARKS}(?::|=|\bis\b|\s[–—-]\s){MARKS}(?P<rest>.*)$",
    re.IGNORECASE,
)
NOUN = r"(?:(?:the\s+)?(?:summary|option|tl;?dr|response|answer|text|completion|candidate)\s+)?"
OPENED = r"(?:\\boxed\{|\\text\{|[(\[<{])"
CHOICE = re.compile(
    rf"{MARKS}(?i:{NOUN}){MARKS}(?:(?P<open>{OPENED})+{MARKS}(?P<marked>[ABab])|(?P<bare>[AB]))(?![A-Za-z0-9])(?P<rest>.*)$"
)
# after a bare letter: the end, punctuation or a reason, but not a noun, as in "A good summary"
REASON = re.compile(
    r"[\s*_\"'`)\]>}”»$]*(?:$|[.,;:!(\[–—-]|(?:because|as|since|for|due|is|was|over|rather|than|given|it|which|thanks|wins)\b)",
    re.IGNORECASE,
)
SECOND = re.compile(
    r"[\s*_\"'`)\]>},.;]*(?:\bor\b|\band\b|\bnor\b|/|&|\bvs\.?|=)[\s*_\"'`(\[<{]*[ABab](?![A-Za-z0-9])", re.IGNORECASE
)
WORSE = re.compile(r"[\s*_\"'`)\]>}”»]*(?:is|was)\s*(?:n't|not|never|worse|the worse|rejected)\b", re.IGNORECASE)
TAGS = re.compile(r"</?\w+>")
STATED = re.compile(
    rf"(?:\bI|\bwe)?\s*\b(?:prefer|choose|pick|select|chose|go with)\s+{MARKS}(?i:{NOUN}){OPENED}([ABab])[)\]>}}]"
    rf"|(?i:{NOUN}){OPENED}([ABab])[)\]>}}]{MARKS}\s+(?:is|was)\s+(?:(?:the|clearly|much|slightly|a)\s+)*"
    r"(?:better|best|preferred|preferable|superior|stronger)\b",
    re.IGNORECASE,
)
NEGATED = re.compile(r"\b(?:not|neither|nor|n't|never|cannot|don't|doesn't|isn't|worse|reject\w*|dis\w+)\b", re.IGNORECASE)
JSON_CHOICE = re.compile(rf"[\"'](?:{'|'.join(KEYS)})[\"']\s*:\s*[\"'](?P<rest>[^\"']*)", re.IGNORECASE)


def parse_choice(response: str) -> str | None:
    """Return the choice that a response states, 'A' or 'B', or None.

    It is the value of a JSON object, or what follows a label such as 'Preferred:'; what comes after
    the choice (its reason, the other text) does not count. Without a label the last line must state
    a choice and nothing else. Two labels with different choices, both choices, neither, and a
    negated one are no choice.
    """
    lines = [line.strip() for line in response.splitlines() if line.strip(" \t*_`")]
    if not lines:
        return None
    quoted = [_choice(found.group("rest")) for found in JSON_CHOICE.finditer(response)]
    labeled = [found.group("rest") for line in lines if (found := LABEL.match(_untagged(line)))]
    if labeled and not labeled[-1].strip(" *_`\"'") and LABEL.match(_untagged(lines[-1])) is None:
        labeled[-1] = _untagged(lines[-1])  # the choice stands on the line after its label
    stated = quoted or [_choice(rest) for rest in labeled]
    if stated:
        return stated[0] if len(set(stated)) == 1 else None
    last = _untagged(lines[-1])
    found = STATED.search(last)
    if found and not NEGATED.search(last):
        letters = {(one or other).upper() for one, other in STATED.findall(last)}
        return letters.pop() if len(letters) == 1 else None
    alone = CHOICE.match(last)
    if alone is None or alone.group("rest").strip(" \t*_\"'`.)]>}$!"):
        return None
    return (alone.group("marked") or alone.group("bare")).upper()


def _untagged(line: str) -> str:
    """Return a line without HTML tags: `<b>A</b>` does not name B."""
    return TAGS.sub("", line) if "</" in line else line


def _choice(text: str) -> str | None:
    """Return the choice at the start of a text unless a second one follows."""
    found = CHOICE.match(text)
    if found is None:
        return None
    rest = found.group("rest")
    if SECOND.match(rest) or WORSE.match(rest) or (found.group("bare") and not REASON.match(rest)):
        return None
    return (found.group("marked") or found.group("bare")).upper()


def read_verdict(response: str) -> str | None:
    """Return the choice in a judge's response: a JSON object or plain words."""
    bare = response.strip()
    if bare.startswith("{"):
        try:
            value: Any = json.loads(bare)
        except ValueError:
            return parse_choice(response)
        if isinstance(value, Mapping):
            known = {str(key).lower(): item for key, item in cast("Mapping[Any, Any]", value).items()}
            found = [_choice(str(known[key])) for key in KEYS if key in known]
            return found[0] if found and len(set(found)) == 1 else None
    return parse_choice(response)
