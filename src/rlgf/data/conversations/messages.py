"""Messages of conversations: their texts, thoughts and tool calls, as data files have them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from rlgf.errors import DataError
from rlgf.types import Message

Reply = str | Message
"""A response: a text, or one message by the assistant with its thoughts or tool calls."""

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
TAGGED_THOUGHTS = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
LIST_OF_MESSAGES = re.compile(r"""\s*\[\s*\{.*['"]role['"]\s*:""", re.DOTALL)


@dataclass(frozen=True)
class TemplateInputs:
    """The inputs of a chat template that a row has next to its messages."""

    tools: tuple[Mapping[str, Any], ...] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])


def is_conversation(value: object) -> bool:
    """Return whether a value is a nonempty list of messages (mappings with role and content)."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in cast("list[Any]", value))


def read_conversation(value: Any, where: str) -> Any:
    """Return a conversation that a file stores in another form; any other value unchanged.

    CSV files hold it as JSON, and some Parquet files as one list per field of its messages. Raises
    `DataError` for Python's own notation, in which pandas writes lists.
    """
    if isinstance(value, Mapping) and isinstance(value.get("role"), list):
        columns = cast("Mapping[str, list[Any]]", {name: column for name, column in value.items() if isinstance(column, list)})
        return [dict(zip(columns, cells)) for cells in zip(*columns.values())]
    if not isinstance(value, str) or not LIST_OF_MESSAGES.match(value):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        if value.rstrip().endswith("]") and "'role'" in value:
            raise DataError(
                f"{where}: a conversation is written in Python's notation, not as JSON: write the rows as JSON lines, or the "
                "cell with json.dumps."
            ) from None
        return value
    return found if is_conversation(found) else value


def messages_of(value: Any, where: str) -> tuple[Message, ...]:
    """Return the messages of a conversation, each validated to have a role and a text.

    Raises `DataError` for a message without them; `where` names the conversation in the error.
    """
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        role, content = message.get("role"), content_of(message)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(
                f"{where}: message {number} must have a 'role' and a 'content' that are strings, but is {str(message)[:80]!r}."
            )
        # other fields stay, such as a name or tool calls
        known = {name: part for name, part in message.items() if part is not None}
        messages.append(_with_thoughts_once({**known, "content": content}, f"{where}: message {number}"))
    return tuple(messages)


def content_of(message: Mapping[str, Any]) -> Any:
    """Return the text of a message, its text parts joined.

    A message that only calls tools or only thinks has the empty text. Content of other kinds is
    returned as it is.
    """
    content = message.get("content")
    if content is None and (message.get("tool_calls") or thoughts_in(message)):
        return ""
    if isinstance(content, list):
        parts = cast("list[Any]", content)
        if all(
            isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
        ):
            return "".join(part["text"] for part in parts)
    return content


def thoughts_in(message: Mapping[str, Any]) -> str:
    """Return the thoughts in a field of a message, or the empty text."""
    found = (message.get(name) for name in THOUGHT_FIELDS)
    return next((value for value in found if isinstance(value, str) and value.strip()), "")


def split_thoughts(message: Message) -> tuple[str, str]:
    """Return the thoughts of a message and its answer; the thoughts may be in tags."""
    thoughts, content = thoughts_in(message), str(message["content"])
    tagged = TAGGED_THOUGHTS.match(content)
    if thoughts or tagged is None:
        return thoughts.strip("\n"), content
    return tagged.group(1).strip("\n"), content[tagged.end() :]


def with_thoughts(message: Message, thoughts: str, answer: str) -> Message:
    """Return a message whose thoughts are in the fields that templates know."""
    return {**message, "reasoning_content": thoughts, "thinking": thoughts, "content": answer}


def with_tagged_thoughts(message: Message, thoughts: str, answer: str) -> Message:
    """Return a message whose thoughts are in its text, between tags."""
    others = {name: value for name, value in message.items() if name not in THOUGHT_FIELDS}
    return {**others, "content": tag_thoughts(thoughts) + answer}


def tag_thoughts(thoughts: str) -> str:
    """Return thoughts between their tags, as they stand before an answer."""
    return f"<think>\n{thoughts}\n</think>\n\n" if thoughts else ""


def _with_thoughts_once(message: Message, where: str) -> Message:
    """Remove from a text the thoughts that a field of the message holds too."""
    thoughts, tagged = thoughts_in(message), TAGGED_THOUGHTS.match(str(message["content"]))
    if not thoughts or tagged is None:
        return message
    if tagged.group(1).strip() and tagged.group(1).strip() != thoughts.strip():
        raise DataError(f"{where} has thoughts in a field and others in its text: keep one of them.")
    return {**message, "content": str(message["content"])[tagged.end() :]}


def reply_of(value: Any, place: str) -> Reply:
    """Return a row's response: its text, or the message if that holds more.

    Raises `DataError` for anything that is neither a text nor one message by the assistant.
    """
    value = read_conversation(value, place)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if is_conversation(value):
        turns = cast("list[Mapping[str, Any]]", value)
        if len(turns) == 1 and turns[0].get("role") == "assistant" and isinstance(content_of(turns[0]), str):
            (message,) = messages_of(turns, place)
            return message if thoughts_in(message) or message.get("tool_calls") else str(message["content"])
    raise DataError(f"{place}: a response must be a string or one assistant message, but is {str(value)[:80]!r}.")


def as_message(reply: Reply) -> Message:
    """Return a response as the assistant's message."""
    return {"role": "assistant", "content": reply} if isinstance(reply, str) else reply


def text_of(reply: Reply) -> str:
    """Return a response as one text, to count words or compare; tool calls are JSON."""
    if isinstance(reply, str):
        return reply
    calls = reply.get("tool_calls")
    return tag_thoughts(thoughts_in(reply)) + str(reply["content"]) + (json.dumps(calls, default=str) if calls else "")


def transcript(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the texts of messages, one after the other."""
    return "\n".join(str(content_of(message) or "") for message in messages)


def read_tools(value: Any, column: str, where: str) -> tuple[Mapping[str, Any], ...] | None:
    """Return the tools that a row offers: JSON schemas, or the JSON of their list.

    Raises `DataError` for anything else.
    """
    found: Any = value
    if isinstance(found, str) and found.strip():
        try:
            found = json.loads(found)
        except ValueError:
            found = None
    if value is None or found in ("", [], ()):
        return None
    if not is_conversation(found):  # a list of mappings, as messages are
        raise DataError(
            f"{where}: '{column}' is {str(value)[:60]!r}, but must be a list of tools (JSON schemas), which the chat template "
            "reads: fix it, or name another column with task.options.tools_column."
        )
    return tuple(cast("list[Mapping[str, Any]]", found))


def without_nulls(value: Any) -> Any:
    """Remove null fields from the mappings in a value, at any depth.

    Arrow stores the mappings of a column with the fields of all of them, so a null there is a field
    that nobody wrote.
    """
    if isinstance(value, Mapping):
        mapping = cast("Mapping[str, Any]", value)
        return {name: without_nulls(item) for name, item in mapping.items() if item is not None}
    return [without_nulls(item) for item in cast("list[Any]", value)] if isinstance(value, list) else value
