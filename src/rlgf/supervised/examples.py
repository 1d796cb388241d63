"""Tokenized examples for supervised training."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from rlgf.config.sections import TaskConfig
from rlgf.errors import ConfigError
from rlgf.models.language_model import LanguageModel
from rlgf.supervised.span_corruption import corrupt
from rlgf.tasks.base import Task


@dataclass(frozen=True)
class Example:
    """A training example: the tokens `ids`, trained from position `start` on.

    The tokens before `start` are the condition. `truncated`: the target continued after `ids`.
    """

    ids: Sequence[int]
    start: int
    truncated: bool = False


SENTINELS = tuple(f"<extra_id_{number}>" for number in range(16))  # for span corruption, as in T5


def split_into_blocks(texts: Sequence[str], model: LanguageModel, size: int) -> list[Example]:
    """Concatenate texts, each followed by an EOS token, and split into blocks.

    Each block has `size` tokens.
    """
    stream: list[int] = []
    for ids in model.tokenizer(list(texts), add_special_tokens=False)["input_ids"]:
        stream += [*ids, model.eos_token_id]
    examples = [Example(stream[at : at + size], 1) for at in range(0, len(stream) - size + 1, size)]
    if not examples:
        raise ConfigError(f"the raw text has {len(stream)} tokens, fewer than one block of model.max_length = {size}.")
    return examples


def corrupt_spans(texts: Sequence[str], model: LanguageModel, seed: int) -> list[Example]:
    """Return span-corruption examples, one per text of two tokens or more.

    Spans are sampled per text by `span_corruption.corrupt`.
    """
    sentinels = [int(model.tokenizer.convert_tokens_to_ids(token) or 0) for token in SENTINELS]
    if len(set(sentinels)) < len(SENTINELS) or model.tokenizer.convert_ids_to_tokens(sentinels) != list(SENTINELS):
        raise ConfigError(
            f"span corruption needs the tokens {SENTINELS[0]} to {SENTINELS[-1]} in the tokenizer: train one here."
        )
    examples: list[Example] = []
    for place, ids in enumerate(model.tokenizer(list(texts), add_special_tokens=False)["input_ids"]):
        if len(ids) > 1:
            source, target = corrupt(ids, sentinels, seed, place)
            source = [*source, model.eos_token_id]
            examples.append(Example([*source, *target, model.eos_token_id], len(source)))
    if not examples:
        raise ConfigError("the raw text holds no text of two tokens or more to train on.")
    return examples


class TargetExamples(Sequence[Example]):
    """The targets of a task's training prompts as examples, encoded on access."""

    def __init__(self, task: Task, model: LanguageModel, max_new_tokens: int, max_examples: int = 0) -> None:
        pairs = [(prompt, target) for prompt in task.train for target in prompt.sft_targets]
        self.pairs, self.model, self.max_new_tokens = pairs[:max_examples] if max_examples else pairs, model, max_new_tokens
        if not pairs:
            raise ConfigError(f"task '{task.name}' has no targets: SFT and the MLE term need at least one.")

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        prompt, target = self.pairs[place]
        before = self.model.codec.prompt(prompt)
        after = self.model.codec.target(target, self.model.eos_token_id, self.max_new_tokens)
        return Example([*before, *after], len(before), truncated=after[-1] != self.model.eos_token_id)


def check_example_lengths(examples: Sequence[Example], model: LanguageModel, task: TaskConfig) -> int:
    """Raise for examples longer than the model's maximum length.

    Returns the number of examples truncated at max_new_tokens.
    """
    num_truncated = 0
    for number, example in enumerate(examples, 1):
        length = example.start if model.codec.is_encoder_decoder else len(example.ids)
        if length > model.max_length:
            raise ConfigError(
                f"task '{task.name}', demonstration {number}: prompt and target have {length} tokens, but the model's "
                f"context is {model.max_length}: shorten the prompts or task.max_new_tokens, or raise model.max_length."
            )
        num_truncated += example.truncated
    return num_truncated
