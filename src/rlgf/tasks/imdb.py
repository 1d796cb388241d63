"""IMDB: continue a film review so that it turns out positive.

Source: the paper, section 6.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlgf.bounds import Length, PositiveInt
from rlgf.config.sections import TaskConfig
from rlgf.data.datasets import read_rows
from rlgf.data.hub import path_exists
from rlgf.errors import ConfigError, DataError
from rlgf.randomness import Purpose, permutation
from rlgf.tasks.base import Task, TaskDefinition, task_options
from rlgf.types import Prompt


@dataclass(frozen=True)
class Options:
    """The prompt's part of a review, and the splits and columns of the data."""

    prompt: Literal["half", "first"] = "half"  # end of the first half by words; or first tokens
    prompt_tokens: Length = 64  # tokens; at most ('half') or exactly ('first')
    train_split: str = "train"
    test_split: str = "test"  # validation and test prompts both come from here
    held_out_prompts: PositiveInt = 5_000  # of validation and of test each
    raw_split: str = "unsup"  # unlabeled reviews, for the pretrain stage; 'unsupervised' on the Hub
    text_column: str = "text"
    label_column: str = "label"  # 1 is positive


def build(config: TaskConfig, tokenizer: Any) -> Task:
    """Build the task with a prompt from every review.

    The continuation of the prompt in the review is its reference; in a positive review it is also a
    target.
    """
    options: Options = task_options(config, Options)
    dropped: dict[str, int] = {}
    train = _prompts(config, options, options.train_split, tokenizer, dropped)
    held_out = _prompts(config, options, options.test_split, tokenizer, dropped)
    order = permutation(0, Purpose.TASK, 0, len(held_out))
    shuffled = [held_out[i] for i in order]
    half = min(options.held_out_prompts, len(shuffled) // 2)
    if half == 0:
        raise DataError(f"{config.data}: the {options.test_split} split needs at least 2 usable reviews.")
    return Task(config.name, train, shuffled[:half], shuffled[half : 2 * half], scores_full_text=True, dropped_rows=dropped)


def _prompts(config: TaskConfig, options: Options, split: str, tokenizer: Any, dropped: dict[str, int]) -> list[Prompt]:
    rows = _reviews(config, options, split)
    texts = [row[options.text_column] for row in rows]
    split_text = _first_tokens if options.prompt == "first" else _first_half
    pieces = split_text(texts, options.prompt_tokens, config.max_new_tokens, tokenizer)
    prompts: list[Prompt] = []
    for row, piece in zip(rows, pieces):
        if piece is None:
            dropped["reviews too short for a prompt and a continuation"] = 1 + dropped.get(
                "reviews too short for a prompt and a continuation", 0
            )
            continue
        ids, text, rest = piece
        positive = row[options.label_column] == 1
        prompts.append(Prompt(text, (rest,), (rest,) if positive else (), ids, {"label": row[options.label_column]}))
    if not prompts:
        raise DataError(f"{config.data}, split {split}: no review is longer than a prompt: lower task.options.prompt_tokens.")
    return prompts


# ids of the prompt, its text, the text that follows; None: the review is too short
Piece = tuple[tuple[int, ...], str, str] | None


def _first_tokens(texts: Sequence[str], count: int, max_new_tokens: int, tokenizer: Any) -> list[Piece]:
    """Split each text after its first `count` tokens.

    A token that ends inside a character is dropped from the prompt, with the others of that
    character. None stands for a text without a continuation.
    """
    # characters, enough for the prompt of nearly every review; the others are encoded whole
    max_characters = 8 * count + 64
    encoded = tokenizer([text[:max_characters] for text in texts], add_special_tokens=False, return_offsets_mapping=True)
    rows = list(zip(encoded["input_ids"], encoded["offset_mapping"]))
    for number, (text, (ids, _)) in enumerate(zip(texts, rows)):
        if len(ids) < count + 16 and len(text) > max_characters:
            whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            rows[number] = (whole["input_ids"], whole["offset_mapping"])
    pieces: list[Piece] = []
    for text, (ids, offsets) in zip(texts, rows):
        kept = count
        while 0 < kept < len(ids) and offsets[kept][0] < offsets[kept - 1][1]:
            kept -= 1
        end = offsets[kept - 1][1] if 0 < kept < len(ids) else len(text)
        rest = text[end:]
        pieces.append((tuple(ids[:kept]), text[:end], rest) if rest.strip() else None)
    return pieces


def _first_half(texts: Sequence[str], max_tokens: int, max_new_tokens: int, tokenizer: Any) -> list[Piece]:
    """Split each text at half its words; prompts keep their last `max_tokens` tokens."""
    halves: list[int] = []
    for text in texts:
        words = list(re.finditer(r"\S+", text))
        halves.append(words[len(words) // 2 - 1].end() if len(words) > 1 else len(text))
    encoded = tokenizer([text[:end] for text, end in zip(texts, halves)], add_special_tokens=False)["input_ids"]
    kept = [tuple(ids[-max_tokens:]) for ids in encoded]
    decoded = tokenizer.batch_decode(kept, clean_up_tokenization_spaces=False)
    for place, prompt in enumerate(decoded):
        # the truncation fell inside a character
        while prompt.startswith("\ufffd") and len(kept[place]) > 1:
            kept[place] = kept[place][1:]
            prompt = decoded[place] = tokenizer.decode(kept[place], clean_up_tokenization_spaces=False)
    return [
        (ids, prompt, text[end:]) if ids and text[end:].strip() else None
        for ids, prompt, text, end in zip(kept, decoded, texts, halves)
    ]


def _reviews(config: TaskConfig, options: Options, split: str, labeled: bool = True) -> list[dict[str, Any]]:
    """Load a split; raise unless its texts are nonempty and its labels 0 or 1."""
    columns = (options.text_column, options.label_column) if labeled else (options.text_column,)
    rows = read_rows(_source(config), split, columns)
    for number, row in enumerate(rows, 1):
        where = f"{config.data}, split {split}, row {number}"
        if not isinstance(row[options.text_column], str) or not row[options.text_column].strip():
            raise DataError(f"{where}: the prompt is empty: remove the row.")
        if labeled and row[options.label_column] not in (0, 1):
            raise DataError(f"{where}: the label is {row[options.label_column]!r}, but must be 1 (positive) or 0.")
    return rows


def _source(config: TaskConfig) -> str:
    if config.data is None:
        raise ConfigError(
            "task 'imdb' needs data: give --data with a Hub name or a folder of train and test .jsonl[.gz] files."
        )
    return config.data


def raw_texts(config: TaskConfig, max_texts: int) -> list[str]:
    """Return unlabeled reviews in a shuffled order, at most `max_texts` (0: all)."""
    options: Options = task_options(config, Options)
    on_hub = options.raw_split == "unsup" and not path_exists(_source(config))
    rows = _reviews(config, options, "unsupervised" if on_hub else options.raw_split, labeled=False)
    order = permutation(0, Purpose.TASK, 1, len(rows))
    return [rows[i][options.text_column] for i in (order[:max_texts] if max_texts else order)]


def labeled_texts(config: TaskConfig, split: str) -> tuple[list[str], list[int]]:
    """Return whole reviews of 'train' or 'test' and their labels, for a sentiment reward."""
    options: Options = task_options(config, Options)
    name = options.train_split if split == "train" else options.test_split
    rows = _reviews(config, options, name)
    return [row[options.text_column] for row in rows], [int(row[options.label_column]) for row in rows]


INSTRUCTION = (
    "Below is the beginning of a film review. Continue it in the same voice, so that the whole review turns out to praise the "
    "film. Write only what comes next, beginning exactly where it breaks off, be it in the middle of a sentence: no "
    "introduction, no quotation marks, and repeat nothing of it.\n\n{text}"
)

TASK = TaskDefinition(
    build, Options, raw_texts=raw_texts, labeled_texts=labeled_texts, needs_data=True,
    has_builtin_reward=False, instruction=INSTRUCTION
)  # fmt: skip
