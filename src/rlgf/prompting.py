"""From the prompt of a row, a text or a conversation, to what a model reads: chat templates, truncation, endings that stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from rlgf.errors import UserError
from rlgf.types import Message, Prompt

PROBE = "rlgf-probe"  # stands for a reply while a template is looked at


def is_conversation(value: object) -> bool:
    """Whether a value is a list of messages, each with a role and a content."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, Mapping) for item in cast("list[Any]", value))


def messages_of(value: Any, where: str) -> tuple[Message, ...]:
    """The messages of a conversation, checked: each has a role and a text."""
    messages: list[Message] = []
    for number, message in enumerate(value, 1):
        role, content = message.get("role"), content_of(message)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"{where}: message {number} must have a 'role' and a 'content' that are texts, but is {str(message)[:80]!r}."
            )
        known = {name: part for name, part in message.items() if part is not None}  # a name, the calls of tools
        messages.append({**known, "content": content})
    return tuple(messages)


def content_of(message: Mapping[str, Any]) -> Any:
    """The text of a message: that of its parts, and none where it only calls tools."""
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
    """A chat template: what is in the file of that name, or the Jinja text itself; None stays None."""
    if value is None:
        return None
    path = Path(value).expanduser()
    if "{" in value:
        return value
    if path.is_file():
        return path.read_text(encoding="utf-8")
    raise UserError(f"chat template '{value}' is neither a file nor a Jinja template: name a file that holds one.")


@dataclass(frozen=True)
class Chat:
    """Conversations as the text that a model was trained to read: its tokenizer's chat template, or another one."""

    tokenizer: Any
    template: str | None = None  # Jinja; None: the tokenizer's own
    option: str = "task.options.chat_template"  # where another one can be given, for the error

    @property
    def available(self) -> bool:
        """Whether there is a template at all."""
        return bool(self.template or getattr(self.tokenizer, "chat_template", None))

    def prompt(self, messages: Sequence[Message], where: str) -> str:
        """A conversation up to where the assistant's turn begins, or, if its last turn is the assistant's, goes on."""
        going_on = messages[-1]["role"] == "assistant"
        return self._render(messages, where, add_generation_prompt=not going_on, continue_final_message=going_on)

    def whole(self, messages: Sequence[Message], where: str) -> str:
        """A conversation with its last turn closed."""
        return self._render(messages, where)

    def reply(self, messages: Sequence[Message], text: str) -> str:
        """What an assistant's reply looks like behind `prompt(messages)`, without what closes the turn."""
        if messages[-1]["role"] == "assistant":
            return text
        opening, trims = self._replies
        return opening + (text.strip() if trims else text)

    def opening(self, messages: Sequence[Message]) -> str:
        """What `reply` puts before every text."""
        return "" if messages[-1]["role"] == "assistant" else self._replies[0]

    def content(self, messages: Sequence[Message], reply: str) -> str:
        """What the assistant's message says with such a reply: that without its opening, or the line ends of another's."""
        if messages[-1]["role"] == "assistant":
            return messages[-1]["content"] + reply
        opening = self.opening(messages)
        return reply.removeprefix(opening) if opening and reply.startswith(opening) else reply.lstrip("\n")

    @cached_property
    def _replies(self) -> tuple[str, bool]:
        """What the template puts between the prompt and a reply, and whether it takes white space off the reply."""
        asked: list[Message] = [{"role": "user", "content": "?"}]
        where = "a trial of the chat template"
        try:
            self.prompt(asked, where)
        except UserError:  # some want to be told how to behave
            asked = [{"role": "system", "content": "?"}, *asked]
        before, found = self.prompt(asked, where), list[str]()
        for text in (PROBE, f"  {PROBE}"):
            whole = self.whole([*asked, {"role": "assistant", "content": text}], where)
            if not whole.startswith(before) or PROBE not in whole:
                return "", False  # the template writes its prompt in another way: the reply stays as it is
            found.append(whole[len(before) :].partition(PROBE)[0])
        return found[0], found[0] == found[1]

    def _render(self, messages: Sequence[Message], where: str, **options: bool) -> str:
        if not self.available:
            raise UserError(
                f"{where} is a conversation, but the tokenizer has no chat template: give one with {self.option}=FILE "
                "(a Jinja template), choose a model that has one, or write prompts as plain text."
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], chat_template=self.template, tokenize=False, **options
            )
        except Exception as error:  # templates raise what they like: about roles, their order, their number
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{where}: the chat template refuses the conversation ({reason}): mend the row.") from None
        return str(text)


@dataclass
class PromptReader:
    """Makes prompts of texts and conversations, and keeps count of what was cut.

    Texts get the `suffix` unless they end with it, and are cut to `limit` tokens (0: never), suffix included, which itself is
    never cut. A conversation is never cut, since its template would break: one that is too long becomes None.
    """

    tokenizer: Any
    limit: int = 0
    truncation: Literal["right", "left"] = "right"  # which end is cut off
    suffix: str = ""
    template: str | None = None
    separator: str = ""  # between a plain prompt and a response that begins with no white space
    cut: int = 0
    too_long: int = 0
    chat: Chat = field(init=False)

    def __post_init__(self) -> None:
        self.chat = Chat(self.tokenizer, self.template)
        if self.limit and self.limit <= self.count(self.suffix):
            raise UserError(
                f"the suffix {self.suffix!r} alone has {self.count(self.suffix)} tokens, but prompts may have {self.limit}: "
                "allow more tokens or choose a shorter suffix."
            )

    def __call__(self, values: Sequence[Any], places: Sequence[str]) -> list[Prompt | None]:
        """A prompt for each text or conversation; `places` name them in errors. An empty one is an error."""
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
                self.cut += 1
        return found

    def response(self, prompt: Prompt, text: str) -> str:
        """A response as it stands behind its prompt."""
        if prompt.messages:
            return self.chat.reply(prompt.messages, text)
        return text if prompt.text[-1:].isspace() else separated(self.separator, text)

    def count(self, text: str) -> int:
        """Tokens of a text, with those that open and close it."""
        return len(self.tokenizer(text)["input_ids"])

    def _text(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            kind = type(value).__name__
            raise UserError(f"{place}: the prompt must be a text or a list of messages, but is of type {kind}.")
        if not value.removesuffix(self.suffix).strip():
            raise UserError(f"{place}: the prompt is empty: remove the row.")
        return value if value.endswith(self.suffix) else value + self.suffix

    def _conversation(self, value: Any, place: str) -> Prompt | None:
        messages = messages_of(value, place)
        text = self.chat.prompt(messages, place)
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written those
        if self.limit and len(ids) > self.limit:
            self.too_long += 1
            return None
        opening = self.chat.opening(messages)
        read = self.tokenizer(opening, add_special_tokens=False)["input_ids"] if opening else []
        bare = str(self.tokenizer.decode(read, skip_special_tokens=True)) if opening else ""
        return Prompt(text, ids=ids, messages=messages, opening=opening, opening_without_marks=bare)

    def _shortened(self, text: str) -> str:
        """The longest part of a text, from its beginning or up to its end, that fits together with the suffix."""
        body = text[: len(text) - len(self.suffix)]
        joints = self._joints(body)

        def part(place: int) -> str:
            kept = body[: joints[place]] if self.truncation == "right" else body[joints[-1 - place] :]
            return kept + self.suffix

        # by halves, once something is known to fit and something not to; before that in growing steps from a good guess
        least, most, step, fitted, failed = 0, len(joints) - 1, 1, False, False
        place = min(most, self.limit - self.count(self.suffix))
        while least < most:
            if self.count(part(place)) <= self.limit:
                least, fitted = place, True
            else:
                most, failed = place - 1, True
            near = min(most, least + step) if fitted else max(least + 1, most - step + 1)
            place, step = (least + most + 1) // 2 if fitted and failed else near, 2 * step
        return part(least)

    def _joints(self, body: str) -> list[int]:
        """Where a text may be cut, in characters: between its tokens, or where nobody tells those, anywhere."""
        if not getattr(self.tokenizer, "is_fast", False):
            return list(range(len(body) + 1))
        offsets = self.tokenizer(body, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return sorted({0, len(body), *((end if self.truncation == "right" else start) for start, end in offsets)})


def separated(separator: str, text: str) -> str:
    """A response with a separator before it, unless it begins with white space itself or is empty."""
    return text if not text or text[0].isspace() else separator + text


def normalised(text: str) -> str:
    """A text without what does not make it another one: case and white space."""
    return " ".join(text.split()).lower()
