"""What a server's answer means: the text in it, how it ended, what was billed, and the three ways in which it can be of no use.

Nothing here asks; `server.py` does.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlgf.tokens import spaced

TAGS = r"(?:think|thinking|thought|reasoning)"
THOUGHTS = re.compile(rf"<({TAGS})>.*?</\1>|\[THINK\].*?\[/THINK\]", re.DOTALL)
THOUGHTS_BEGIN, THOUGHTS_END = re.compile(rf"<{TAGS}>|\[THINK\]"), re.compile(rf"</{TAGS}>|\[/THINK\]")
PREAMBLE = re.compile(r"^\s*(sure|certainly|of course|okay|ok|here is|here's|here are)\b[^\n]{0,120}:\s*\n+", re.IGNORECASE)
QUOTES = (('"', '"'), ("“", "”"), ("«", "»"))
ENDINGS = {  # why a text ended, by the words of OpenAI and others: whether it came to its end by itself
    "stop": True, "eos": True, "eos_token": True, "end_turn": True, "stop_sequence": True,
    "length": False, "max_tokens": False, "model_length": False,
}  # fmt: skip
REPEATED_WORDS = 3  # of the end of a prefix, from which on an answer that begins with them is taken to repeat them


class TransientError(Exception):
    """It may work if asked again: busy, broken off, out of time, garbled."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds


class InvalidError(Exception):
    """The server answered, but not with a text that can be used; another draw may be."""

    def __init__(self, reason: str, bill: "Bill", silent: bool = False) -> None:
        super().__init__(reason)
        self.bill = bill
        self.silent = silent  # it ended at once, having nothing to add


class PermanentError(Exception):
    """Asking again cannot help: wrong key, wrong model, wrong question."""


@dataclass(frozen=True)
class Bill:
    """What a server says that an answer cost, in its own tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0  # thoughts included
    thinking_tokens: int = 0  # of these
    known: bool = False  # whether it said anything


@dataclass(frozen=True)
class Question:
    """A text to be begun (no prefix) or finished; with `ids` by token ids, which then say all of it."""

    prompt: str
    prefix: str
    max_tokens: int  # in the server's tokens
    seed: int
    ids: tuple[int, ...] = ()  # prompt and prefix in the tokens that the server shares with the policy
    min_tokens: int = 0  # before which it must not end; kept by token ids alone


@dataclass(frozen=True)
class Answer:
    """What a server wrote, after echoes and thoughts were taken off."""

    text: str
    finished: bool  # whether it came to its end by itself
    bill: Bill = field(default_factory=Bill)
    stripped: bool = False  # whether an echo of the prefix, quotes, a preamble or thoughts were taken off
    ids: tuple[int, ...] | None = None  # the answer to a question by token ids, end token included


def read_completion(data: Any, question: Question, stop: Sequence[str] = ()) -> Answer:
    """The answer in the JSON of a text completion: it goes on exactly where the question broke off."""
    choice, bill = _choice(data)
    text, finished = choice.get("text"), _finished(choice, bill)
    return _usable(text, text, finished, bill, stop)


def read_chat(data: Any, question: Question, stop: Sequence[str] = (), told: bool = True) -> Answer:
    """The answer in the JSON of a chat: without thoughts, preamble, quotation marks and echo, with a space at the joint.

    `told`: whether the model was told in words to continue, and so may repeat the last words first.
    """
    choice, bill = _choice(data)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise TransientError("its answer holds no message")
    if message.get("refusal"):
        raise InvalidError("it refused", bill)
    written, finished = _said(message.get("content")), _finished(choice, bill)
    if not isinstance(written, str):
        return _usable(written, written, finished, bill, stop)
    text = _unquoted(PREAMBLE.sub("", _without_thoughts(written, bill)), finished)
    before = question.prompt + question.prefix
    rest = _without_echo(text, question, bill)
    if told and rest == text:
        rest = _without_last_words(text, before)
    # an answer that repeats what stands before it shows itself how the two are joined
    joined = spaced(before, rest) if rest == text else rest
    return _usable(joined, written, finished, bill, stop, stripped=rest.strip() != written.strip())


def read_ids(data: Any, question: Question, end_ids: Sequence[int], exact: bool) -> Answer:
    """The answer in token ids, as vLLM gives them with `return_token_ids`; `exact`: whether lengths must be as asked for.

    A text that came to its end closes with an end token of the policy's. One that stopped short of both its end and its
    budget was cut by something else, such as the server's context, and is refused.
    """
    choice, bill = _choice(data)
    finished, told = _finished(choice, bill), choice.get("token_ids")
    if told is None:
        raise PermanentError("it tells no token ids, as vLLM does with return_token_ids: choose another guide.continuation")
    if not isinstance(told, list) or any(type(token) is not int or token < 0 for token in told):
        raise TransientError("its answer has the wrong types")
    read = choice.get("prompt_token_ids")
    if read is not None and read != list(question.ids):
        raise PermanentError("it read other tokens than it was sent")
    ids = list(told)
    if finished and (not ids or ids[-1] not in end_ids):
        ids = [*ids[:-1], end_ids[0]]  # it ended with an end token of its own
    if not finished and len(ids) != question.max_tokens:
        raise PermanentError(
            f"it wrote {len(ids)} of {question.max_tokens} tokens and calls that the full length: "
            "does its context (vLLM's --max-model-len) hold prompt and text?"
        )
    if len(ids) > question.max_tokens or (exact and len(ids) - finished < question.min_tokens):
        raise PermanentError(f"it wrote {len(ids)} tokens where {question.min_tokens} to {question.max_tokens} were asked for")
    text = choice.get("text")
    return Answer(text if isinstance(text, str) else "", finished, bill, ids=tuple(ids))


def _choice(data: Any) -> tuple[dict[str, Any], Bill]:
    """The one choice of a response, and its bill."""
    choices = data.get("choices") if isinstance(data, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise TransientError("its answer does not hold one choice")
    return choices[0], _bill(data.get("usage"))


def _bill(usage: Any) -> Bill:
    def count(place: Any, name: str) -> int:
        value = place.get(name) if isinstance(place, dict) else None
        return value if type(value) is int and value > 0 else 0

    if not isinstance(usage, dict):
        return Bill()
    thoughts = count(usage.get("completion_tokens_details"), "reasoning_tokens")
    return Bill(count(usage, "prompt_tokens"), count(usage, "completion_tokens"), thoughts, known="completion_tokens" in usage)


def _finished(choice: dict[str, Any], bill: Bill) -> bool:
    why = choice.get("finish_reason")
    if why == "content_filter":
        raise InvalidError("it refused", bill)
    if why in ("tool_calls", "function_call"):
        raise InvalidError("it called a tool instead of writing", bill)
    if why not in ENDINGS:
        raise TransientError("its answer has the wrong types" if why is None else "its answer was broken off")
    return ENDINGS[why]


def _usable(text: Any, written: Any, finished: bool, bill: Bill, stop: Sequence[str], stripped: bool = False) -> Answer:
    """The answer, if it is a text: valid Unicode, and not empty."""
    if not (text is None or isinstance(text, str)):
        raise TransientError("its answer has the wrong types")
    text = text or ""
    for end in stop:  # some servers leave a stop string in the text
        text = text.removesuffix(end)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidError("its text is no valid Unicode", bill) from None
    if not text.strip():
        reason = "it wrote nothing" if finished else "its tokens ran out before it wrote anything: raise guide.thinking_tokens"
        raise InvalidError(reason, bill, silent=finished and not (written or "").strip())
    return Answer(text, finished, bill, stripped)


def _said(content: Any) -> Any:
    """The text of a message, which may come in parts, thoughts among them."""
    if not isinstance(content, list):
        return content
    texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def _without_thoughts(text: str, bill: Bill) -> str:
    """A chat answer without what stands between tags of thought; a template may have opened the first one itself."""
    text = THOUGHTS_END.split(THOUGHTS.sub("", text))[-1]
    if THOUGHTS_BEGIN.search(text):
        raise InvalidError("it was still thinking when its tokens ran out: raise guide.thinking_tokens", bill)
    return text


def _unquoted(text: str, finished: bool) -> str:
    """The text without quotation marks around all of it; the closing one may have been cut off."""
    bare = text.strip()
    for opening, closing in QUOTES:
        if len(bare) > 1 and bare[0] == opening:
            if bare[-1] == closing:
                return bare[1:-1]
            if not finished and closing not in bare[1:]:
                return bare[1:]
    return text


def _without_echo(text: str, question: Question, bill: Bill) -> str:
    """A chat answer without what was to be continued at its head: all of it, the prefix, or the prompt."""
    for whole in (question.prompt + question.prefix, question.prefix, question.prompt):
        words = whole.split()
        if len(words) < 2:
            continue
        head = re.compile(r"\s*" + r"\s+".join(map(re.escape, words)))
        found = head.match(text)
        if found:
            return text[found.end() :]
    for whole in (question.prefix, question.prompt):
        opening = whole.split()[:5]
        if len(opening) == 5 and text.split()[:5] == opening:
            raise InvalidError("it began anew instead of continuing", bill)
    return text


def _without_last_words(text: str, before: str) -> str:
    """The text without the words that end what stands before it, where it begins with some of them."""
    words, written = before.split(), text.split()
    for count in range(min(len(words), len(written)), REPEATED_WORDS - 1, -1):
        tail = words[-count:]
        if len(set(tail)) > 1 and written[: count - 1] == tail[:-1] and written[count - 1].startswith(tail[-1]):
            head = re.compile(r"\s*" + r"\s+".join(map(re.escape, tail)))
            found = head.match(text)
            return text[found.end() :] if found else text
    return text
