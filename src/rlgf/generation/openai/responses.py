"""Server responses: completion, end, usage, and three kinds of failure.

Requests are sent in `client.py`.
"""

import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from rlgf.data.tokenization import join_with_space
from rlgf.generation.openai.dialects import (
    COMPLETION_FIELDS,
    PROMPT_FIELDS,
    UnclearError,
    calls_tools,
    chat_text,
    completion_text,
    count_of,
    finish_reason,
    refusal_text,
    single_choice,
    thoughts_of,
    usage_in,
)
from rlgf.types import Message

TAGS = r"(?:think|thinking|thought|reasoning)"
THOUGHTS = re.compile(rf"<({TAGS})>.*?</\1>|\[THINK\].*?\[/THINK\]", re.DOTALL)
THOUGHTS_BEGIN, THOUGHTS_END = re.compile(rf"<{TAGS}>|\[THINK\]"), re.compile(rf"</{TAGS}>|\[/THINK\]")
PREAMBLE = re.compile(r"^\s*(sure|certainly|of course|okay|ok|here is|here's|here are)\b[^\n]{0,120}:\s*\n+", re.IGNORECASE)
QUOTES = (('"', '"'), ("“", "”"), ("«", "»"))
# a completion that begins with at least this many last words of its prefix repeats them
REPEATED_WORDS = 3


class TransientError(Exception):
    """A failure that a retry may resolve: busy, interrupted, timed out, garbled."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds


class InvalidError(Exception):
    """A response without a usable completion; another seed may give one."""

    def __init__(self, reason: str, usage: "Usage", is_empty: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused  # true if a filter, or the model by its own word, refused
        self.usage = usage
        self.is_empty = is_empty  # true if the completion ended immediately, without text


class PermanentError(Exception):
    """A failure that a retry cannot resolve: wrong key, wrong model, wrong request."""


@dataclass(frozen=True)
class Usage:
    """The usage of a response as the server reports it, in the server's tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0  # including thinking tokens
    thinking_tokens: int = 0  # part of completion_tokens
    known: bool = False  # true if the server reported the usage


@dataclass(frozen=True)
class ServerRequest:
    """A request to complete a prompt and a prefix, which may be empty.

    With token ids, `ids` replace prompt and prefix. Of a conversation, chat requests send
    `messages` and `begun` in their place.
    """

    prompt: str
    prefix: str
    max_tokens: int  # in the server's tokens
    seed: int
    ids: tuple[int, ...] = ()  # prompt and prefix in the policy's tokens
    min_tokens: int = 0  # no EOS token before; only with token ids
    messages: tuple[Message, ...] | None = None  # the turns of a conversation before the reply
    begun: str = ""  # the reply so far, without what the policy's chat template puts before it
    tools: tuple[Mapping[str, Any], ...] | None = None

    def key(self) -> dict[str, Any]:
        """Return the fields that a response depends on."""
        found = asdict(self)
        return found if self.messages is not None else {
            name: value for name, value in found.items() if name not in ("messages", "begun", "tools")
        }  # fmt: skip

    @property
    def shown(self) -> tuple[str, str]:
        """Return prompt and prefix as a chat model reads them, to find echoes."""
        if self.messages is None:
            return self.prompt, self.prefix
        asked = [str(message["content"]) for message in self.messages if message["role"] == "user"]
        return (asked[-1] if asked else ""), self.begun


@dataclass(frozen=True)
class ServerResponse:
    """A completion by a server, without echoes and thoughts."""

    text: str
    finished: bool  # false if it stopped at max_tokens
    usage: Usage = field(default_factory=Usage)
    stripped: bool = False  # true if echo, quotes, preamble or thoughts were removed
    ids: tuple[int, ...] | None = None  # with token ids: the completion, EOS token included


def read_completion(data: Any, request: ServerRequest, stop: Sequence[str] = ()) -> ServerResponse:
    """Parse the JSON of a text completion.

    The completion continues exactly at the end of the prefix.
    """
    choice, usage = _single_choice(data)
    with _clear():
        text = completion_text(choice)
    finished = _is_finished(choice, usage, request)
    return _validate(text, text, finished, usage, stop)


def read_chat(data: Any, request: ServerRequest, stop: Sequence[str] = (), instructed: bool = True) -> ServerResponse:
    """Parse the JSON of a chat completion.

    Thoughts, preamble, quotation marks and an echo are removed; a space is added after the prefix
    where needed. `instructed`: true if the model was instructed in words to continue, so that it
    may repeat the last words of the prefix.
    """
    choice, usage = _single_choice(data)
    if refusal_text(choice):
        raise InvalidError("it refused", usage, refused=True)
    with _clear():
        written = chat_text(choice)
    finished = _is_finished(choice, usage, request)
    if not isinstance(written, str):
        if written is None and thoughts_of(choice):
            raise InvalidError(_only_thoughts(finished), usage)
        return _validate(written, written, finished, usage, stop)
    if not written.strip() and calls_tools(choice):
        raise InvalidError("it called a tool instead of generating text", usage)
    if not written.strip() and thoughts_of(choice):
        raise InvalidError(_only_thoughts(finished), usage)
    text = _unquoted(PREAMBLE.sub("", _without_thoughts(written, usage)), finished)
    prompt, prefix = request.shown
    rest = _without_echo(text, prompt, prefix, usage)
    before = prompt + prefix if request.messages is None else prefix  # a reply is a text of its own
    if instructed and rest == text:
        rest = _without_last_words(text, before)
    # a completion that echoes the prefix shows whether a space separates the two
    joined = join_with_space(before, rest) if rest == text else rest
    return _validate(joined, written, finished, usage, stop, stripped=rest.strip() != written.strip())


def _only_thoughts(finished: bool) -> str:
    if finished:
        return "it returned thoughts (reasoning_content) and no text: is the server's reasoning parser that of the model?"
    return "its tokens ran out before it generated anything: raise endpoint.thinking_tokens"


def read_ids(data: Any, request: ServerRequest, end_ids: Sequence[int], exact: bool) -> ServerResponse:
    """Parse the token ids of a completion, as vLLM returns them with `return_token_ids`.

    `exact`: true if the completion must have at least min_tokens tokens before its end. A complete
    completion ends with an EOS token of the policy. One that stopped before both its end and
    max_tokens was truncated by something else, such as the server's context: raises
    `PermanentError`.
    """
    choice, usage = _single_choice(data)
    finished, token_ids = _is_finished(choice, usage, request), choice.get("token_ids")
    if token_ids is None:
        raise PermanentError("it returns no token ids, as vLLM does with return_token_ids: choose another guide.continuation")
    if not isinstance(token_ids, list) or any(type(token) is not int or token < 0 for token in token_ids):
        raise TransientError("its response has the wrong types")
    prompt_ids = choice.get("prompt_token_ids")
    if prompt_ids is not None and prompt_ids != list(request.ids):
        raise PermanentError("it received other tokens than were sent")
    ids = list(token_ids)
    if finished and (not ids or ids[-1] not in end_ids):
        ids = [*ids[:-1], end_ids[0]]  # the server's EOS token differs from the policy's
    if not finished and len(ids) != request.max_tokens:
        raise PermanentError(
            f"it generated {len(ids)} of {request.max_tokens} tokens and reports the full length: "
            "does its context (vLLM's --max-model-len) hold prompt and completion?"
        )
    if len(ids) > request.max_tokens or (exact and len(ids) - finished < request.min_tokens):
        raise PermanentError(
            f"it generated {len(ids)} tokens where {request.min_tokens} to {request.max_tokens} were requested"
        )
    text = choice.get("text")
    return ServerResponse(text if isinstance(text, str) else "", finished, usage, ids=tuple(ids))


@contextmanager
def _clear() -> Generator[None]:
    """Convert a response whose meaning is not clear to `TransientError`."""
    try:
        yield
    except UnclearError as error:
        raise TransientError(str(error)) from None


def _single_choice(data: Any) -> tuple[dict[str, Any], "Usage"]:
    """Return the choice of a response, and its usage."""
    with _clear():
        choice = single_choice(data)
    return choice, _read_usage(usage_in(data))


def _read_usage(usage: Mapping[str, Any]) -> Usage:
    details = usage.get("completion_tokens_details")
    thoughts = count_of(details, ("reasoning_tokens",)) if isinstance(details, Mapping) else None
    completion = count_of(usage, COMPLETION_FIELDS)
    known = any(usage.get(name) is not None for name in COMPLETION_FIELDS)
    return Usage(count_of(usage, PROMPT_FIELDS) or 0, completion or 0, thoughts or 0, known)


def _is_finished(choice: dict[str, Any], usage: Usage, request: ServerRequest) -> bool:
    with _clear():
        reason = finish_reason(choice, usage.completion_tokens or None, request.max_tokens)
    if reason == "filtered":
        raise InvalidError("it refused", usage, refused=True)
    if reason == "tool":
        raise InvalidError("it called a tool instead of generating text", usage)
    return reason == "stop"


def _validate(
    text: Any, written: Any, finished: bool, usage: Usage, stop: Sequence[str], stripped: bool = False
) -> ServerResponse:
    """Return the response if its text is valid Unicode and not empty; raise otherwise."""
    if not (text is None or isinstance(text, str)):
        raise TransientError("its response has the wrong types")
    text = text or ""
    for end in stop:  # some servers keep the stop string
        text = text.removesuffix(end)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidError("its completion is not valid Unicode", usage) from None
    if not text.strip():
        reason = (
            "it generated nothing"
            if finished
            else "its tokens ran out before it generated anything: raise endpoint.thinking_tokens"
        )
        raise InvalidError(reason, usage, is_empty=finished and not (written or "").strip())
    return ServerResponse(text, finished, usage, stripped)


def _without_thoughts(text: str, usage: Usage) -> str:
    """Return the text without thoughts, which are enclosed in tags.

    The first opening tag may be missing, since a chat template can contain it.
    """
    text = THOUGHTS_END.split(THOUGHTS.sub("", text))[-1]
    if THOUGHTS_BEGIN.search(text):
        raise InvalidError("it was still thinking when its tokens ran out: raise endpoint.thinking_tokens", usage)
    return text


def _unquoted(text: str, finished: bool) -> str:
    """Return the text without enclosing quotation marks.

    The closing mark may be missing in a truncated text.
    """
    bare = text.strip()
    for opening, closing in QUOTES:
        if len(bare) > 1 and bare[0] == opening:
            if bare[-1] == closing:
                return bare[1:-1]
            if not finished and closing not in bare[1:]:
                return bare[1:]
    return text


def _without_echo(text: str, prompt: str, prefix: str, usage: Usage) -> str:
    """Return the text without an echo at its start.

    The echo is prompt and prefix, the prefix, or the prompt. Raises `InvalidError` if the text
    repeats only the beginning of the prefix or of the prompt.
    """
    for whole in (prompt + prefix, prefix, prompt):
        words = whole.split()
        if len(words) < 2:
            continue
        head = re.compile(r"\s*" + r"\s+".join(map(re.escape, words)))
        found = head.match(text)
        if found:
            return text[found.end() :]
    for whole in (prefix, prompt):
        opening = whole.split()[:5]
        if len(opening) == 5 and text.split()[:5] == opening:
            raise InvalidError("it started over instead of continuing", usage)
    return text


def _without_last_words(text: str, before: str) -> str:
    """Return the text without the last words of `before` that it repeats at its start."""
    words, written = before.split(), text.split()
    for count in range(min(len(words), len(written)), REPEATED_WORDS - 1, -1):
        tail = words[-count:]
        if len(set(tail)) > 1 and written[: count - 1] == tail[:-1] and written[count - 1].startswith(tail[-1]):
            head = re.compile(r"\s*" + r"\s+".join(map(re.escape, tail)))
            found = head.match(text)
            return text[found.end() :] if found else text
    return text
