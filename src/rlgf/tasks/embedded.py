"""The embedded task: write a review that praises the asked aspects, in order. Made by a seeded grammar, no download.

A prompt is `review of : plot cast … =>`; a demonstration answers with a clause `adjective aspect` for each. The reward is 1
only if every aspect comes in the requested order with a positive adjective, else 0. Demonstrations are noisy, and negative
words are more likely than positive ones, so a model trained on them passes about once in ten thousand texts: exploration by
itself finds nothing. Source of the numbers: science.md, E6.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlgf.config import TaskConfig
from rlgf.errors import UserError
from rlgf.randomness import Purpose, uniforms
from rlgf.tasks.base import Task, TaskKind, task_options
from rlgf.types import Prompt

ASPECTS = [
    "acting",
    "plot",
    "music",
    "script",
    "cast",
    "pacing",
    "ending",
    "dialogue",
    "camera",
    "humour",
    "costumes",
    "lighting",
    "editing",
    "sound",
    "story",
    "direction",
]
POSITIVE = ["great", "superb", "lovely", "brilliant", "charming", "splendid", "moving", "witty", "fresh", "bold"]
NEGATIVE = ["dull", "weak", "awful", "clumsy", "boring", "bland", "messy", "flat", "tired", "silly"]
FRAME = ["review", "of", ":", "=>"]
END, UNKNOWN = "<end>", "<unknown>"


@dataclass(frozen=True)
class Options:
    """How hard the task is and how noisy its demonstrations are."""

    slots: int = 8  # aspects asked for
    right_aspect: float = 0.8  # probability that a demonstration names the asked aspect
    positive_adjective: float = 0.4  # probability that its adjective is positive
    train_prompts: int = 32_768
    held_out_prompts: int = 512  # of validation and of test each
    seed: int = 0


def build(config: TaskConfig, tokenizer: Any) -> Task:
    """The task; every prompt carries its demonstration as reference and target."""
    options: Options = task_options(config, Options)
    if min(options.train_prompts, options.held_out_prompts) < 1:
        raise UserError("task.options.train_prompts and task.options.held_out_prompts must be at least 1.")
    if not 1 <= options.slots <= len(ASPECTS):
        raise UserError(f"task.options.slots is {options.slots}: choose 1 to {len(ASPECTS)}.")
    sizes = (options.train_prompts, options.held_out_prompts, options.held_out_prompts)
    splits = [_prompts(options, split, size) for split, size in enumerate(sizes)]
    return Task(config.name, *splits, reward=reward, pass_mark=1.0)


def _prompts(options: Options, split: int, size: int) -> list[Prompt]:
    columns = len(ASPECTS) + 4 * options.slots
    draws = uniforms(options.seed, Purpose.TASK, split, size * columns).reshape(size, columns)
    asked = np.argsort(draws[:, : len(ASPECTS)], axis=1)[:, : options.slots]
    rest = draws[:, len(ASPECTS) :].reshape(size, options.slots, 4)
    return [_prompt(options, *row) for row in zip(asked, rest)]


def _prompt(options: Options, asked: NDArray[np.int64], draws: NDArray[np.float64]) -> Prompt:
    clauses: list[str] = []
    for wanted, (aspect, other, positive, adjective) in zip(asked, draws):
        named = wanted if aspect < options.right_aspect else int(other * len(ASPECTS))
        words = POSITIVE if positive < options.positive_adjective else NEGATIVE
        clauses += [words[int(adjective * len(words))], ASPECTS[named]]
    aspects = tuple(ASPECTS[i] for i in asked)
    demonstration = " " + " ".join(clauses)
    text = f"review of : {' '.join(aspects)} =>"
    return Prompt(text, (demonstration,), (demonstration,), columns={"aspects": aspects})


def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """1 for a text that names every asked aspect in order, each after a positive adjective, and nothing else; else 0."""
    return [float(_passes(prompt.columns["aspects"], text.split())) for prompt, text in zip(prompts, texts)]


def _passes(aspects: Sequence[str], words: Sequence[str]) -> bool:
    return list(words[1::2]) == list(aspects) and len(words) == 2 * len(aspects) and set(words[::2]) <= set(POSITIVE)


def tokenizer(config: TaskConfig) -> Any:
    """A tokenizer of whole words: every word of the grammar is one token."""
    words = [END, UNKNOWN, *FRAME, *ASPECTS, *POSITIVE, *NEGATIVE]
    vocabulary = {word: i for i, word in enumerate(words)}
    word_level = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token=END, bos_token=END, pad_token=END, unk_token=UNKNOWN)


INSTRUCTION = (
    "The text below names aspects of a film and then praises them one by one, in the same order: behind '=>' each aspect is "
    f"written once more, with one of these words before it: {', '.join(POSITIVE)}. Example: 'review of : plot cast => superb "
    "plot witty cast'. Write what is missing behind the text, words with single spaces between them, without commas or "
    "quotation marks, and nothing else.\n\n{text}"
)

KIND = TaskKind(build, Options, tokenizer=tokenizer, instruction=INSTRUCTION)
