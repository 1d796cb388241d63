"""Messages of chat requests: questions as text, and conversations as the messages they are."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rlgf.data.conversations.messages import THOUGHT_FIELDS
from rlgf.generation.openai.responses import ServerRequest
from rlgf.types import Message

INSTRUCTION = (
    "Continue the text below. Write only what comes next, beginning exactly where it breaks off: no introduction, no quotation "
    "marks, and repeat nothing of it.\n\n{text}"
)
CONTINUE_REPLY = (
    "Continue your last message exactly where it breaks off. Write only what comes next: no introduction, no quotation marks, "
    "and repeat nothing of it."
)


def chat_fields(mode: str, request: ServerRequest, instruction: str | None, system: str | None) -> dict[str, Any]:
    """Return the fields of a chat request, with the prefix as `mode` has it.

    A conversation is sent as its messages; `instruction`, if one is set, is put around its last
    user message.
    """
    if request.messages is None:
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        template = instruction or INSTRUCTION
        if mode == "instruction":
            text = template.replace("{text}", request.prompt + request.prefix)
            return {"messages": [*messages, {"role": "user", "content": text}]}
        messages.append({"role": "user", "content": template.replace("{text}", request.prompt)})
        begun, tools = request.prefix, None
    else:
        messages = _instructed(_with_system(_as_sent(request.messages), system), instruction)
        begun, tools = request.begun, request.tools
    # the guide writes the reply as text: it may read about tools, not call them
    fields: dict[str, Any] = {"tools": [dict(tool) for tool in tools], "tool_choice": "none"} if tools else {}
    if not begun:
        return {"messages": messages, **fields}
    last: dict[str, Any] = {"role": "assistant", "content": begun}
    if mode == "instruction":
        return {"messages": [*messages, last, {"role": "user", "content": CONTINUE_REPLY}], **fields}
    if mode == "prefix":
        last["prefix"] = True
    if mode == "continue_final_message":
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    return {"messages": [*messages, last], **fields}


def _with_system(messages: list[dict[str, Any]], system: str | None) -> list[dict[str, Any]]:
    """Put a system message before a conversation, or before the text of its own."""
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return [{"role": "system", "content": system}, *messages]


def _instructed(messages: list[dict[str, Any]], instruction: str | None) -> list[dict[str, Any]]:
    place = next((i for i in range(len(messages) - 1, -1, -1) if messages[i]["role"] == "user"), None)
    if instruction is None or place is None:
        return messages
    content = instruction.replace("{text}", str(messages[place]["content"]))
    return [*messages[:place], {**messages[place], "content": content}, *messages[place + 1 :]]


def _as_sent(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages in the form of OpenAI's interface.

    Thoughts are left out, as servers refuse those of earlier turns; arguments of tool calls are
    JSON; calls and the messages of their tools have ids.
    """
    sent: list[dict[str, Any]] = []
    number, open_ids = 0, list[str]()
    for message in messages:
        known = {name: value for name, value in message.items() if name not in THOUGHT_FIELDS}
        calls = known.get("tool_calls")
        if isinstance(calls, list) and calls:
            known["tool_calls"] = []
            for call in cast("list[Any]", calls):
                number += 1
                found = _as_call(call, f"call{number:05d}")
                open_ids.append(str(found.get("id")))
                known["tool_calls"].append(found)
        if known["role"] == "tool" and "tool_call_id" not in known and open_ids:
            known["tool_call_id"] = open_ids.pop(0)
        sent.append(known)
    return sent


def _as_call(call: Any, name: str) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        return {"id": name, "type": "function", "function": {"name": str(call), "arguments": "{}"}}
    found = dict(cast("Mapping[str, Any]", call))
    function = dict(cast("Mapping[str, Any]", found.get("function") or found))
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    return {
        "id": found.get("id") or name, "type": "function", "function": {"name": function.get("name"), "arguments": arguments},
    }  # fmt: skip
