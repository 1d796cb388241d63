"""CommonGen: write a sentence that contains all given concepts.

Source: Lin et al. 2020; the paper, section 6.

The prompt is `generate a sentence with: dog frisbee catch.`; every reference of a concept set is a
target. The reward is a text metric (SPIDEr in the paper), so the task has no rule of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlgf.bounds import NonNegativeInt
from rlgf.config.sections import TaskConfig
from rlgf.data.datasets import read_rows
from rlgf.errors import ConfigError, DataError
from rlgf.randomness import Purpose, permutation
from rlgf.tasks.base import Task, TaskDefinition, task_options
from rlgf.types import Prompt

SPLITS = ("train", "validation", "test")
HARD = 4  # concepts; prompts with as many or more are hard


@dataclass(frozen=True)
class Options:
    """The columns of the data, and the number of held-out training concept sets.

    Held-out concept sets are evaluated on during training. Their sentences occur under other sets
    too; those sets are dropped from training.
    """

    concepts_column: str = "concepts"
    references_column: str = "targets"  # a list; on the Hub one text per row, `target`
    held_out: NonNegativeInt = 0  # concept sets; 0: evaluate on the validation split during training


def build(config: TaskConfig, tokenizer: Any) -> Task:
    """Build the task from the dataset's own splits.

    A final evaluation reports validation and test. The Hub's test split has no references;
    validation then takes its place.
    """
    options: Options = task_options(config, Options)
    train, validation, test = (_prompts(config, options, split, split == "test") for split in SPLITS)
    # files have the easy prompts first, and an evaluation takes prompts from the beginning
    validation, test = ([prompts[i] for i in permutation(0, Purpose.TASK, 5, len(prompts))] for prompts in (validation, test))
    warnings: dict[str, int] = {}
    validation_prompts = validation
    if options.held_out:
        num_train = len(train)
        train, validation_prompts = _hold_out(train, options.held_out)
        if num_dropped := num_train - len(train) - len(validation_prompts):
            warnings["training prompts share a sentence with held-out ones, and are dropped"] = num_dropped
    if not any(prompt.references for prompt in test):
        warnings["test prompts have no references: only validation is reported"] = len(test)
        return Task(config.name, train, validation_prompts, validation, group=difficulty, warnings=warnings)
    return Task(
        config.name,
        train,
        validation_prompts,
        test,
        extra_test_splits={"validation": validation},
        group=difficulty,
        warnings=warnings,
    )


def difficulty(prompt: Prompt) -> str:
    """Return the difficulty of a prompt: 'easy' with three concepts, 'hard' with more."""
    return "hard" if len(prompt.columns["concepts"]) >= HARD else "easy"


def _hold_out(prompts: Sequence[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """Return training prompts and `count` held-out prompts, without a sentence in common."""
    if not 0 < count < len(prompts):
        raise ConfigError(f"task.options.held_out is {count}, but there are {len(prompts)} training prompts.")
    held_out_places = set(permutation(0, Purpose.TASK, 3, len(prompts))[:count].tolist())
    validation_prompts = [prompt for place, prompt in enumerate(prompts) if place in held_out_places]
    sentences = {text for prompt in validation_prompts for text in prompt.references}
    rest = [prompt for place, prompt in enumerate(prompts) if place not in held_out_places]
    train = [prompt for prompt in rest if sentences.isdisjoint(prompt.references)]
    if not train:
        raise ConfigError(f"task.options.held_out is {count}: every other training prompt shares a sentence with them.")
    return train, validation_prompts


def _prompts(config: TaskConfig, options: Options, split: str, may_hide: bool = False) -> list[Prompt]:
    """Load the prompts of a split; with `may_hide` all of them may lack references."""
    rows = read_rows(_source(config), split, (options.concepts_column,))
    hidden = may_hide and not any(row.get(options.references_column, row.get("target")) for row in rows)
    found: list[tuple[tuple[str, ...], list[str]]] = []
    for number, row in enumerate(rows, 1):
        where = f"{config.data}, split {split}, row {number}"
        concepts, references = row[options.concepts_column], row.get(options.references_column, row.get("target"))
        if not isinstance(concepts, list) or not concepts or not all(map(_is_text, concepts)):
            raise DataError(f"{where}: the prompt is empty: '{options.concepts_column}' must be a list of words.")
        references = [references] if isinstance(references, str) else references
        if hidden:
            references = []
        elif not isinstance(references, list) or not references or not all(map(_is_text, references)):
            raise DataError(
                f"{where}: '{options.references_column}' (or 'target') must hold at least one string, none of them empty."
            )
        key = tuple(concepts)
        if options.references_column not in row and found and found[-1][0] == key:
            found[-1][1].extend(references)
        else:
            found.append((key, list(references)))
    return [_prompt(concepts, references) for concepts, references in found]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _prompt(concepts: Sequence[str], references: Sequence[str]) -> Prompt:
    texts = tuple(" ".join(reference.split()) for reference in references)
    return Prompt(f"generate a sentence with: {' '.join(concepts)}.", texts, texts, columns={"concepts": tuple(concepts)})


def _source(config: TaskConfig) -> str:
    if config.data is None:
        raise ConfigError(
            "task 'commongen' needs data: give --data with a Hub name or a folder of train, validation and test .jsonl[.gz]."
        )
    return config.data


def raw_texts(config: TaskConfig, max_texts: int) -> list[str]:
    """Return shuffled training references, at most `max_texts` (0: all), without held-out ones."""
    options: Options = task_options(config, Options)
    prompts = _prompts(config, options, "train")
    if options.held_out:
        prompts, _ = _hold_out(prompts, options.held_out)
    texts = [text for prompt in prompts for text in prompt.references]
    order = permutation(0, Purpose.TASK, 4, len(texts))
    return [texts[i] for i in (order[:max_texts] if max_texts else order)]


TASK = TaskDefinition(
    build, Options, raw_texts=raw_texts, needs_data=True, has_builtin_reward=False,
    instruction="{text}\n\nAnswer with the sentence only: one plain sentence that uses all of these words.",
)  # fmt: skip
