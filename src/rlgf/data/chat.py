"""Prompts from rows: chat templates, truncation and suffixes.

The prompt of a row, plain text or a conversation, becomes the input text of a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from rlgf.errors import DataError
from rlgf.types import Message, Prompt
from rlgf.untrusted_text import shorten

PROBE = "rlgf-probe"  # placeholder for a reply while a template is inspected


def is_conversation(value: object) -> bool:
    """Return whether a value is a nonempty list of messages (mappings with role and content)."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in cast("list[Any]", value))


def messages_of(value: Any, where: str) -> tuple[Message, ...]:
    """Return the messages of a conversation, each validated to have a role and a text.

    Raises `ConfigError` for a message without them; `where` names the conversation in the error.
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
        messages.append({**known, "content": content})
    return tuple(messages)


def content_of(message: Mapping[str, Any]) -> Any:
    """Return the text of a message, its text parts joined.

    A message that only calls tools has the empty text. Content of other kinds is returned as it is.
    """
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return ""
    if isinstance(content, list):
        parts = cast("list[Any]", content)
        if all(
            isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in parts
        ):
            return "".join(part["text"] for part in parts)
    return content


def read_template(value: str | None) -> str | None:
    """Load a chat template from a file, or return the Jinja text itself.

    None stays None. Raises `ConfigError` for a value that is neither.
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
    """A chat template that renders conversations: the tokenizer's own, or another one."""

    tokenizer: Any
    template: str | None = None  # Jinja; None: the tokenizer's own
    option: str = "task.options.chat_template"  # setting that replaces it, for error messages

    @property
    def available(self) -> bool:
        """Return whether there is a template at all."""
        return bool(self.template or getattr(self.tokenizer, "chat_template", None))

    def prompt(self, messages: Sequence[Message], where: str) -> str:
        """Render a conversation as a prompt, with the assistant's turn opened.

        If the last turn is the assistant's, it is left open and continued.
        """
        continues = messages[-1]["role"] == "assistant"
        return self._render(messages, where, add_generation_prompt=not continues, continue_final_message=continues)

    def render_closed(self, messages: Sequence[Message], where: str) -> str:
        """Render a conversation with its last turn closed."""
        return self._render(messages, where)

    def reply(self, messages: Sequence[Message], text: str) -> str:
        """Render an assistant's reply as it follows `prompt(messages)`.

        The text that closes the turn is omitted.
        """
        if messages[-1]["role"] == "assistant":
            return text
        opening, strips = self._replies
        return opening + (text.strip() if strips else text)

    def opening(self, messages: Sequence[Message]) -> str:
        """Return the prefix that `reply` puts before every text."""
        return "" if messages[-1]["role"] == "assistant" else self._replies[0]

    def strip_opening(self, messages: Sequence[Message], reply: str) -> str:
        """Return the content of the assistant's message for a rendered reply.

        The template's prefix is removed; a reply without it loses its leading newlines. If the
        last turn is the assistant's, its content comes first.
        """
        if messages[-1]["role"] == "assistant":
            return messages[-1]["content"] + reply
        opening = self.opening(messages)
        return reply.removeprefix(opening) if opening and reply.startswith(opening) else reply.lstrip("\n")

    @cached_property
    def _replies(self) -> tuple[str, bool]:
        """Return the template's prefix of replies, and whether it strips their white space."""
        user_messages: list[Message] = [{"role": "user", "content": "?"}]
        where = "a trial of the chat template"
        try:
            self.prompt(user_messages, where)
        except DataError:  # some templates require a system message
            user_messages = [{"role": "system", "content": "?"}, *user_messages]
        before, found = self.prompt(user_messages, where), list[str]()
        for text in (PROBE, f"  {PROBE}"):
            whole = self.render_closed([*user_messages, {"role": "assistant", "content": text}], where)
            if not whole.startswith(before) or PROBE not in whole:
                # the closed conversation does not begin with the prompt: leave replies unchanged
                return "", False
            found.append(whole[len(before) :].partition(PROBE)[0])
        return found[0], found[0] == found[1]

    def _render(self, messages: Sequence[Message], where: str, **options: bool) -> str:
        if not self.available:
            raise DataError(
                f"{where} is a conversation, but the tokenizer has no chat template: give one with {self.option}=FILE "
                "(a Jinja template), choose a model that has one, or write prompts as plain text."
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], chat_template=self.template, tokenize=False, **options
            )
        # templates raise errors of any type, about the roles, their order or their number
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise DataError(f"{where}: the chat template rejects the conversation ({reason}): fix the row.") from None
        return str(text)


@dataclass
class PromptBuilder:
    """A builder of prompts from texts and conversations that counts truncated ones.

    Texts get the `suffix` unless they end with it. They are truncated to `limit` tokens (0: never),
    suffix included; the suffix itself is never truncated. A conversation is never truncated, since
    its template would break: one that is too long becomes None.
    """

    tokenizer: Any
    limit: int = 0
    truncation: Literal["right", "left"] = "right"  # end at which texts are truncated
    suffix: str = ""
    template: str | None = None
    separator: str = ""  # before responses to plain prompts, unless white space is there
    num_truncated: int = 0
    num_too_long: int = 0
    chat: ChatTemplate = field(init=False)

    def __post_init__(self) -> None:
        self.chat = ChatTemplate(self.tokenizer, self.template)
        if self.limit and self.limit <= self.count(self.suffix):
            raise DataError(
                f"the suffix {self.suffix!r} alone has {self.count(self.suffix)} tokens, but prompts may have {self.limit}: "
                "allow more tokens or choose a shorter suffix."
            )

    def __call__(self, values: Sequence[Any], places: Sequence[str]) -> list[Prompt | None]:
        """Return a prompt for each text or conversation; None for a conversation over `limit`.

        `places` name the values in errors. Raises `ConfigError` for an empty prompt.
        """
        found: list[Prompt | None] = []
        for value, place in zip(values, places):
            found.append(self._conversation(value, place) if is_conversation(value) else Prompt(self._text(value, place)))
        if not self.limit:
            return found
        texts = list(dict.fromkeys(prompt.text for prompt in found if prompt is not None and prompt.messages is None))
        lengths = map(len, self.tokenizer(texts)["input_ids"] if texts else [])
        shortened = {text: Prompt(self._shortened(text)) for text, length in zip(texts, lengths) if length > self.limit}
        for number, prompt in enumerate(found):
            if prompt is not None and prompt.messages is None and prompt.text in shortened:
                found[number] = shortened[prompt.text]
                self.num_truncated += 1
        return found

    def response(self, prompt: Prompt, text: str) -> str:
        """Return a response as it follows its prompt."""
        if prompt.messages:
            return self.chat.reply(prompt.messages, text)
        return text if prompt.text[-1:].isspace() else with_separator(self.separator, text)

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, special tokens included."""
        return len(self.tokenizer(text)["input_ids"])

    def _text(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            kind = type(value).__name__
            raise DataError(f"{place}: the prompt must be a string or a list of messages, but is of type {kind}.")
        if not value.removesuffix(self.suffix).strip():
            raise DataError(f"{place}: the prompt is empty: remove the row.")
        return value if value.endswith(self.suffix) else value + self.suffix

    def _conversation(self, value: Any, place: str) -> Prompt | None:
        messages = messages_of(value, place)
        text = self.chat.prompt(messages, place)
        # the template has added the special tokens already
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.limit and len(ids) > self.limit:
            self.num_too_long += 1
            return None
        opening = self.chat.opening(messages)
        opening_ids = self.tokenizer(opening, add_special_tokens=False)["input_ids"] if opening else []
        bare = str(self.tokenizer.decode(opening_ids, skip_special_tokens=True)) if opening else ""
        return Prompt(text, ids=ids, messages=messages, reply_prefix=opening, reply_prefix_plain=bare)

    def _shortened(self, text: str) -> str:
        """Return the longest beginning (or end) of a text that fits together with the suffix."""
        body = text[: len(text) - len(self.suffix)]
        cut_points = self._cut_points(body)

        def part(place: int) -> str:
            kept = body[: cut_points[place]] if self.truncation == "right" else body[cut_points[-1 - place] :]
            return kept + self.suffix

        # bisection, once one length is known to fit and one not to; before that growing steps from
        # a good guess, since each trial tokenizes the text
        low, high, step, fitted, failed = 0, len(cut_points) - 1, 1, False, False
        place = min(high, self.limit - self.count(self.suffix))
        while low < high:
            if self.count(part(place)) <= self.limit:
                low, fitted = place, True
            else:
                high, failed = place - 1, True
            guess = min(high, low + step) if fitted else max(low + 1, high - step + 1)
            place, step = (low + high + 1) // 2 if fitted and failed else guess, 2 * step
        return part(low)

    def _cut_points(self, body: str) -> list[int]:
        """Return the positions in characters at which a text may be truncated.

        They lie between its tokens; a slow tokenizer has no offsets, so all positions are returned.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            return list(range(len(body) + 1))
        offsets = self.tokenizer(body, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return sorted({0, len(body), *((end if self.truncation == "right" else start) for start, end in offsets)})


def with_separator(separator: str, text: str) -> str:
    """Put a separator before a response, unless it begins with white space or is empty."""
    return text if not text or text[0].isspace() else separator + text


def normalize_whitespace(text: str) -> str:
    """Return a text in lower case with single spaces, to compare texts by."""
    return " ".join(text.split()).lower()
