"""Chat templates: prompts and replies as a model's template renders them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from rlgf.data.conversations.messages import (
    Reply,
    TemplateInputs,
    as_message,
    split_thoughts,
    tag_thoughts,
    thoughts_in,
    with_tagged_thoughts,
    with_thoughts,
)
from rlgf.errors import DataError
from rlgf.types import Message
from rlgf.untrusted_text import shorten

PROBE, PROBE_THOUGHTS = "rlgf-probe", "rlgf-thoughts"  # placeholders while a template is inspected
PROBE_ARGUMENTS = {"rlgf_argument": 1}
# The date of templates that ask for today's: a prompt must not depend on the day of the run.
DATE = datetime(2024, 7, 26)
TODAY = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(['"])(.*?)\1\s*\)""")
ANY_TODAY = re.compile(r"strftime_now\s*\(")
OPENED_THOUGHTS = re.compile(r"<think>\s*\Z")
CLOSED_THOUGHTS = re.compile(r"</think>\s*\Z")
NO_INPUTS = TemplateInputs()


def read_template(value: str | None) -> str | None:
    """Load a chat template from a file, or return the Jinja text itself.

    None stays None. Raises `DataError` for a value that is neither.
    """
    if value is None:
        return None
    path = Path(value).expanduser()
    if "{" in value:
        return value
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise DataError(f"chat template '{shorten(value, 80)}' cannot be read ({error}): give a UTF-8 file.") from None
    raise DataError(f"chat template '{shorten(value, 80)}' is neither a file nor a Jinja template: name a file that holds one.")


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template that renders conversations: the tokenizer's own, or another one.

    A prompt and a reply together are what the template makes of the whole conversation, without the
    text that closes the reply. Thoughts are where the template has them; if it drops them, they
    stand once, in `<think>` tags before the answer.
    """

    tokenizer: Any
    template: str | None = None  # Jinja; None: the tokenizer's own
    option: str = "task.options.chat_template"  # setting that replaces it, for error messages
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of every rendering

    @property
    def available(self) -> bool:
        """Return whether there is a template at all."""
        return bool(self.template or getattr(self.tokenizer, "chat_template", None))

    @property
    def asks_for_date(self) -> bool:
        """Return whether the template asks for today's date, in place of which it gets `DATE`."""
        return self.available and ANY_TODAY.search(str(self.template or self.tokenizer.chat_template)) is not None

    def prompt(self, messages: Sequence[Message], where: str, inputs: TemplateInputs = NO_INPUTS) -> str:
        """Render a conversation as a prompt, with the assistant's turn opened.

        If the last turn is the assistant's, it is left open and continued.
        """
        continues = messages[-1]["role"] == "assistant"
        return self._render(messages, where, inputs, add_generation_prompt=not continues, continue_final_message=continues)

    def render_closed(self, messages: Sequence[Message], where: str, inputs: TemplateInputs = NO_INPUTS) -> str:
        """Render a conversation with its last turn closed."""
        return self._render(messages, where, inputs)

    def reply(
        self, messages: Sequence[Message], reply: Reply, inputs: TemplateInputs = NO_INPUTS, where: str = "the conversation"
    ) -> str:
        """Render an assistant's reply as the text after `prompt(messages)`.

        The text that closes the turn is omitted.
        """
        message = as_message(reply)
        thoughts, answer = split_thoughts(message)
        if messages[-1]["role"] == "assistant":
            if message.get("tool_calls") or thoughts_in(message):
                raise DataError(f"{where}: thoughts and tool calls cannot continue a message that has begun: give its text.")
            return str(message["content"])
        before = self.prompt(messages, where, inputs)
        knows = self._thoughts_in if thoughts else ""
        if knows == "fields":
            message = with_thoughts(message, thoughts, answer)
        elif knows == "text" and thoughts_in(message):  # thoughts in a text stay as they are written
            message = with_tagged_thoughts(message, thoughts, answer)
        whole = self.render_closed([*messages, message], where, inputs)
        if whole.startswith(before) and (not thoughts or knows != "nowhere"):
            return self._without_closing(whole[len(before) :])
        return self._with_inserted_thoughts(before, whole, thoughts, answer, where)

    def opening(self, messages: Sequence[Message], inputs: TemplateInputs = NO_INPUTS) -> str:
        """Return the prefix that `reply` puts before every text without thoughts."""
        if messages[-1]["role"] == "assistant":
            return ""
        key = json.dumps(dict(inputs.variables), sort_keys=True, default=str)
        if key not in self._openings:
            variables = TemplateInputs(variables=inputs.variables)
            self._openings[key] = self.reply(self._trial, PROBE, variables, "a trial of the chat template").partition(PROBE)[0]
        return self._openings[key]

    def strip_opening(self, messages: Sequence[Message], reply: str) -> str:
        """Remove the opening from a rendered reply and return the message's content.

        The template's prefix is removed; a reply without it loses its leading newlines. If the
        last turn is the assistant's, its content comes first.
        """
        if messages[-1]["role"] == "assistant":
            return messages[-1]["content"] + reply
        opening = self.opening(messages)
        return reply.removeprefix(opening) if opening and reply.startswith(opening) else reply.lstrip("\n")

    @cached_property
    def _openings(self) -> dict[str, str]:
        return {}

    @cached_property
    def _trial(self) -> list[Message]:
        """Return a conversation to inspect the template with."""
        user: Message = {"role": "user", "content": "?"}
        try:
            self.prompt([user], "a trial of the chat template")
        except DataError:  # some templates require a system message
            return [{"role": "system", "content": "?"}, user]
        return [user]

    def _shown(self, **fields: Any) -> str | None:
        """Render an assistant's message; return None if the template rejects it."""
        message: Message = {"role": "assistant", "content": PROBE, **fields}
        try:
            return self.render_closed([*self._trial, message], "a trial of the chat template")
        except DataError:
            return None

    @cached_property
    def _closing(self) -> str:
        """Return the text that closes a reply."""
        return (self._shown() or "").rpartition(PROBE)[2]

    @cached_property
    def _thoughts_in(self) -> str:
        """Return where the template finds thoughts of a reply: "fields", "text" or "nowhere"."""
        found = self._shown(reasoning_content=PROBE_THOUGHTS, thinking=PROBE_THOUGHTS)
        if PROBE_THOUGHTS in (found or ""):
            return "fields"
        found = self._shown(content=tag_thoughts(PROBE_THOUGHTS) + PROBE)
        return "text" if PROBE_THOUGHTS in (found or "") else "nowhere"

    @cached_property
    def _takes_mappings(self) -> bool:
        """Return whether the template takes arguments of tool calls as mappings, not as JSON."""
        call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": PROBE_ARGUMENTS}}
        return "rlgf_argument" in (self._shown(content="", tool_calls=[call]) or "")

    def _without_closing(self, reply: str) -> str:
        if self._closing and reply.endswith(self._closing):
            return reply.removesuffix(self._closing)
        bare = reply.rstrip()  # a message that calls tools may end otherwise
        end = getattr(self.tokenizer, "eos_token", None)
        return bare.removesuffix(end) if end and bare.endswith(end) else reply

    def _with_inserted_thoughts(self, before: str, whole: str, thoughts: str, answer: str, where: str) -> str:
        """Return a reply with the thoughts inserted where its prompt ends.

        So it is if the prompt opens thoughts that the template drops from replies.
        """
        if thoughts and CLOSED_THOUGHTS.search(before):
            raise DataError(
                f"{where}: the response has thoughts, but the chat template ends the prompt with closed ones: remove them, or "
                "change task.options.chat_template_kwargs."
            )
        opened = OPENED_THOUGHTS.search(before)
        start = before[: opened.start()] if opened else before
        if not whole.startswith(start):  # the closed conversation begins otherwise: the text stays as it is
            return tag_thoughts(thoughts) + answer
        rest = self._without_closing(whole[len(start) :])
        if opened and rest.startswith("<think>"):  # the same marks, with other white space
            return rest.removeprefix("<think>").lstrip("\n")
        if opened:
            return f"{thoughts}\n</think>\n\n{rest.lstrip()}"
        return tag_thoughts(thoughts) + rest

    def _render(self, messages: Sequence[Message], where: str, inputs: TemplateInputs, **options: bool) -> str:
        if not self.available:
            raise DataError(
                f"{where} is a conversation, but the tokenizer has no chat template: give one with {self.option}=FILE "
                "(a Jinja template), choose a model that has one, or write prompts as plain text."
            )
        tools = None if inputs.tools is None else [dict(tool) for tool in inputs.tools]
        extra = {**({} if tools is None else {"tools": tools}), **self.variables, **inputs.variables}
        try:
            text = self.tokenizer.apply_chat_template(
                [self._as_known(message) for message in messages], chat_template=self._source(tools), tokenize=False,
                **options, **extra,
            )  # fmt: skip
        except DataError:
            raise
        # templates raise errors of any type, about the roles, their order or their number
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{where}: the chat template rejects the conversation ({reason}): fix the row.") from None
        return str(text)

    def _source(self, tools: list[dict[str, Any]] | None) -> str | None:
        """Return the template with `DATE` in place of today's; None: the tokenizer's own."""
        if not self.asks_for_date:
            return self.template
        source = self.template or str(self.tokenizer.get_chat_template(tools=tools))
        fixed = TODAY.sub(lambda call: json.dumps(DATE.strftime(call.group(2))), source)
        if ANY_TODAY.search(fixed):
            raise DataError(
                "the chat template asks for today's date in a computed format, and a prompt must not depend on the day: give "
                f"a template with a date of its own with {self.option}=FILE."
            )
        return fixed

    def _as_known(self, message: Message) -> dict[str, Any]:
        """Convert thoughts and tool arguments of a message to the template's forms."""
        known, thoughts = dict(message), thoughts_in(message)
        if thoughts:
            known = {"thinking": thoughts, **known, "reasoning_content": thoughts}
        calls = known.get("tool_calls")
        if isinstance(calls, list):
            known["tool_calls"] = [self._known_call(call) for call in cast("list[Any]", calls)]
        return known

    def _known_call(self, call: Any) -> Any:
        """Convert a tool call's arguments to the form that the template reads."""
        function: Any = call.get("function") if isinstance(call, Mapping) else None
        arguments: Any = function.get("arguments") if isinstance(function, Mapping) else None
        if arguments is None or arguments is PROBE_ARGUMENTS:
            return call
        if isinstance(arguments, str) and self._takes_mappings:
            # as JSON some templates would quote it twice, or put it into braces of their own
            try:
                read = json.loads(arguments)
            except ValueError:
                return call
            arguments = read if isinstance(read, dict) else arguments
        elif isinstance(arguments, Mapping) and not self._takes_mappings:
            arguments = json.dumps(arguments, ensure_ascii=False)
        return {**call, "function": {**function, "arguments": arguments}}
