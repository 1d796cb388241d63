"""Prompts from rows: chat templates, truncation and suffixes.

The prompt of a row, plain text or a conversation, becomes the input text of a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rlgf.data.conversations.messages import Reply, TemplateInputs, is_conversation, messages_of, text_of, thoughts_in
from rlgf.data.conversations.template import NO_INPUTS, ChatTemplate
from rlgf.errors import DataError
from rlgf.types import Prompt


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
    template_variables: Mapping[str, Any] = field(default_factory=dict[str, Any])  # of every conversation
    num_too_long: int = 0
    num_tools_ignored: int = 0  # conversations whose tools the template does not show
    chat: ChatTemplate = field(init=False)

    def __post_init__(self) -> None:
        self.chat = ChatTemplate(self.tokenizer, self.template, variables=self.template_variables)
        if self.limit and self.limit <= self.count(self.suffix):
            raise DataError(
                f"the suffix {self.suffix!r} alone has {self.count(self.suffix)} tokens, but prompts may have {self.limit}: "
                "allow more tokens or choose a shorter suffix."
            )

    def __call__(
        self, values: Sequence[Any], places: Sequence[str], inputs: Sequence[TemplateInputs] = ()
    ) -> list[Prompt | None]:
        """Return a prompt for each text or conversation; None for a conversation over `limit`.

        `places` name the values in errors; `inputs` are what else their chat template reads. Raises
        `DataError` for an empty prompt.
        """
        found: list[Prompt | None] = []
        for value, place, extra in zip(values, places, inputs or [NO_INPUTS] * len(values)):
            found.append(
                self._conversation(value, place, extra) if is_conversation(value) else Prompt(self._text(value, place))
            )
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

    def response(self, prompt: Prompt, reply: Reply, place: str = "a response") -> str:
        """Return a response as it follows its prompt.

        Raises `DataError` for thoughts and tool calls after a plain prompt, which has no form for
        them.
        """
        if prompt.messages:
            return self.chat.reply(prompt.messages, reply, inputs_of(prompt), place)
        if not isinstance(reply, str) and (thoughts_in(reply) or reply.get("tool_calls")):
            raise DataError(
                f"{place}: a response with thoughts or tool calls of their own needs a prompt that is a conversation: write "
                "the prompt as messages, or the response as a text."
            )
        text = text_of(reply)
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

    def _conversation(self, value: Any, place: str, inputs: TemplateInputs) -> Prompt | None:
        messages = messages_of(value, place)
        text = self.chat.prompt(messages, place, inputs)
        if inputs.tools and text == self.chat.prompt(messages, place, TemplateInputs(variables=inputs.variables)):
            self.num_tools_ignored += 1
        # the template has added the special tokens already
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.limit and len(ids) > self.limit:
            self.num_too_long += 1
            return None
        opening = self.chat.opening(messages, inputs)
        opening_ids = self.tokenizer(opening, add_special_tokens=False)["input_ids"] if opening else []
        bare = str(self.tokenizer.decode(opening_ids, skip_special_tokens=True)) if opening else ""
        return Prompt(
            text, ids=ids, messages=messages, reply_prefix=opening, reply_prefix_plain=bare, tools=inputs.tools,
            template_variables=inputs.variables,
        )  # fmt: skip

    def _shortened(self, text: str) -> str:
        """Return the longest beginning (or end) of a text that fits with the suffix."""
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


def inputs_of(prompt: Prompt) -> TemplateInputs:
    """Return the chat-template inputs of a prompt's row, other than the messages."""
    return TemplateInputs(prompt.tools, prompt.template_variables)


def with_separator(separator: str, text: str) -> str:
    """Put a separator before a response, unless it begins with white space or is empty."""
    return text if not text or text[0].isspace() else separator + text


def normalize_whitespace(text: str) -> str:
    """Return a text in lower case with single spaces, for comparisons."""
    return " ".join(text.split()).lower()
