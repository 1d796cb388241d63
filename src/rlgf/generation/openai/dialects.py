"""The parts of a response, as different OpenAI-compatible servers spell them.

A field is read where its meaning is clear; the error names one whose meaning is not.
"""

import re
from collections.abc import Mapping
from typing import Any, cast

from rlgf.generation.openai.refusals import RequestRefusedError, refusal_of

FINISH_FIELDS = ("finish_reason", "stop_reason", "done_reason", "native_finish_reason")
COMPLETE = (  # reasons of a completion that ended by itself
    "stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "stop_str", "stop_word", "complete", "completed",
    "done", "end", "finished",
)  # fmt: skip
TRUNCATED = (
    "length", "max_tokens", "model_length", "max_length", "max_new_tokens", "max_output_tokens", "limit", "token_limit",
    "incomplete",
)  # fmt: skip
FILTERED = ("content_filter", "content-filter", "safety", "refusal", "prohibited_content", "blocklist", "recitation", "spii")
UNSPECIFIED = ("", "none", "null", "generated")  # reasons that say nothing
TOOL_CALLS = ("tool_calls", "tool_call", "function_call", "tool_use")
TEXT_PARTS = ("text", "output_text")
PROMPT_FIELDS = ("prompt_tokens", "input_tokens", "prompt_eval_count", "prompt_n")
COMPLETION_FIELDS = ("completion_tokens", "output_tokens", "eval_count", "generated_tokens", "predicted_n")
MAX_TOKENS = 10**9  # of one response; larger counts are ignored
MAX_SHOWN = 200  # characters of a response in an error


class UnclearError(Exception):
    """A response whose meaning is not clear; the message names the field."""


def single_choice(data: Any) -> dict[str, Any]:
    """Return the choice of a response; the native forms of TGI and Ollama are one.

    Raises `UnclearError` if there is none, or several.
    """
    if isinstance(data, list) and len(cast("list[Any]", data)) == 1:
        data = cast("list[Any]", data)[0]
    if not isinstance(data, Mapping):
        raise UnclearError(f"its response is a {type(data).__name__}, not an object")
    found = cast("Mapping[str, Any]", data)
    choices = found.get("choices")
    if isinstance(choices, Mapping):
        choices = [choices]
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        if len(cast("list[Any]", choices)) > 1:
            raise UnclearError(f"its response has {len(cast('list[Any]', choices))} choices, though one was asked for")
        return dict(cast("Mapping[str, Any]", choices[0]))
    if "generated_text" in found:  # TGI's own
        return {"text": found["generated_text"], **cast("dict[str, Any]", found.get("details") or {})}
    if isinstance(found.get("message"), Mapping) or isinstance(found.get("response"), str):  # Ollama's own
        return {"text": found.get("response"), **found}
    raise UnclearError(f"its response has no choices, but {_shown_keys(found)}")


def chat_text(choice: Mapping[str, Any]) -> Any:
    """Return the text of a chat choice, or None if it is null."""
    for name in ("message", "delta"):
        message = choice.get(name)
        if isinstance(message, Mapping):
            return text_of_parts(cast("Mapping[str, Any]", message).get("content"))
    if isinstance(choice.get("message"), str):
        return choice["message"]
    if "text" in choice:
        return text_of_parts(choice["text"])
    raise UnclearError(f"its response has no message, but {_shown_keys(choice)}")


def completion_text(choice: Mapping[str, Any]) -> Any:
    """Return the text of a text completion; None if it is null."""
    if choice.get("text") is None and isinstance(choice.get("message"), Mapping | str):
        return chat_text(choice)
    if "text" not in choice:
        raise UnclearError(f"its response has no text, but {_shown_keys(choice)}")
    return text_of_parts(choice["text"])


def text_of_parts(content: Any) -> Any:
    """Return content as text: of its parts, which may include thoughts, only those of text."""
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        return content
    texts: list[Any] = []
    for part in cast("list[Any]", content):
        if isinstance(part, Mapping):
            known = cast("Mapping[str, Any]", part)
            if known.get("type", "text") in TEXT_PARTS:
                text = known.get("text", known.get("content"))
                texts.append(text.get("value") if isinstance(text, Mapping) else text)
        else:
            texts.append(part)
    return "".join(text for text in texts if isinstance(text, str))


def thoughts_of(choice: Mapping[str, Any]) -> str:
    """Return the thoughts next to the text of a chat choice."""
    message = choice.get("message")
    found = cast("Mapping[str, Any]", message) if isinstance(message, Mapping) else choice
    values = (found.get(name) for name in ("reasoning_content", "reasoning", "thinking"))
    return next((value for value in values if isinstance(value, str) and value.strip()), "")


def refusal_text(choice: Mapping[str, Any]) -> bool:
    """Return whether a message says that it is a refusal."""
    message = choice.get("message")
    return isinstance(message, Mapping) and bool(cast("Mapping[str, Any]", message).get("refusal"))


def calls_tools(choice: Mapping[str, Any]) -> bool:
    """Return whether a message calls tools."""
    message = choice.get("message")
    return isinstance(message, Mapping) and bool(cast("Mapping[str, Any]", message).get("tool_calls"))


def finish_reason(choice: Mapping[str, Any], generated: int | None, max_tokens: int) -> str:
    """Return "stop", "length", "filtered" or "tool", or raise `UnclearError` with the reason.

    Without a reason the number of generated tokens tells whether the completion was truncated.
    """
    named = [(name, choice[name]) for name in FINISH_FIELDS if choice.get(name) is not None]
    for name, value in named:
        if isinstance(value, Mapping):  # {"type": "stop"}
            value = cast("Mapping[str, Any]", value).get("type")
        word = str(value).rpartition(".")[2].lower()  # FinishReason.STOP
        if word in UNSPECIFIED:
            continue
        kinds = (("stop", COMPLETE), ("length", TRUNCATED), ("filtered", FILTERED), ("tool", TOOL_CALLS))
        kind = next((kind for kind, words in kinds if word in words), None)
        if kind is not None:
            return kind
        if name == "finish_reason":
            raise UnclearError(f"its response was cut off ({name} is {str(value)[:40]!r})")
    if calls_tools(choice) and not named:
        return "tool"
    if choice.get("done") is True:  # Ollama's own
        return "stop"
    if generated is None:
        raise UnclearError("its response has neither a finish_reason nor a count of its tokens")
    return "length" if generated >= max_tokens else "stop"


def count_of(usage: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    """Return a count of tokens in a usage under any of these names, or None."""
    for name in names:
        value = usage.get(name)
        if isinstance(value, str) and re.fullmatch(r"\d{1,9}", value):
            value = int(value)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int and 0 <= value <= MAX_TOKENS:
            return value
    return None


def usage_in(data: Any) -> Mapping[str, Any]:
    """Return the token usage in a response, or an empty mapping."""
    if not isinstance(data, Mapping):
        return {}
    found = cast("Mapping[str, Any]", data)
    for place in (found.get("usage"), found.get("timings"), found.get("details"), found):
        if isinstance(place, Mapping) and any(place.get(name) is not None for name in COMPLETION_FIELDS):
            return cast("Mapping[str, Any]", place)
    return {}


def error_in(data: Any) -> tuple[int, str, str] | None:
    """Return status, code and message of an error that came with status 200, or None."""
    found = cast("Mapping[str, Any]", data) if isinstance(data, Mapping) else {}
    choices = found.get("choices")
    first = cast("list[Any]", choices)[0] if isinstance(choices, list) and choices else None
    error: Any = None
    if isinstance(first, Mapping) and first.get("error"):  # OpenRouter
        error = first["error"]
    elif not choices and found.get("error"):
        error = found["error"]
    elif not choices and (found.get("object") == "error" or "detail" in found):  # vLLM, SGLang, FastAPI
        error = {"message": found.get("message", found.get("detail")), "code": found.get("code"), "type": found.get("type")}
    if error is None:
        return None
    known = cast("Mapping[str, Any]", error) if isinstance(error, Mapping) else {"message": error}
    kind = str(known.get("code") or known.get("type") or found.get("error_type") or "")
    status = next((int(str(value)) for value in (known.get("code"), known.get("status")) if _is_status(value)), 0)
    return status, kind, str(known.get("message") or error)


def raise_refusal(status: int, code: str, message: str, shown: str) -> None:
    """Raise `RequestRefusedError` if an error is about one question; `shown` has no secrets."""
    reason = refusal_of(status or 400, code, message)
    if reason is not None:
        raise RequestRefusedError(f"it refused the question as {reason}: {shown}")


def describe_body(content: bytes) -> str:
    """Describe the likely kind of a body that is not JSON."""
    text = content[:MAX_SHOWN].decode("utf-8", "replace").strip()
    if not text:
        return "its response is empty"
    if text.startswith(("data:", "event:")):
        return "its response is a stream of events, though none was asked for, not JSON"
    if text.startswith("<"):
        return "its response is a web page, not JSON: most servers' URLs end in /v1"
    return "its response is not JSON"


def _is_status(value: Any) -> bool:
    return str(value).isdigit() and 400 <= int(value) < 600


def _shown_keys(found: Mapping[str, Any]) -> str:
    return ", ".join(str(key)[:30] for key in list(found)[:8]) or "nothing"
