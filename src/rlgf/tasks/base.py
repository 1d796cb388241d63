"""What a task is: prompts, a reward, metrics. A new task is one file beside this one and a line in `tasks.TASKS`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlgf.config import TaskConfig, read_options
from rlgf.preferences import Pairs
from rlgf.types import Prompt, TextFunction


@dataclass(frozen=True)
class Task:
    """Prompts of three splits, and functions of texts."""

    name: str
    train: Sequence[Prompt]
    validation: Sequence[Prompt]
    test: Sequence[Prompt]
    reward: TextFunction | None = None  # the task's own rule; None where a reward model is needed
    whole_text: bool = False  # whether a reward model reads prompt and continuation, or the continuation alone
    pass_mark: float | None = None  # a reward from which on a text counts as passed
    finals: Mapping[str, Sequence[Prompt]] = field(default_factory=dict[str, Sequence[Prompt]])  # reported beside `test`
    group: Callable[[Prompt], str] | None = None  # by which a final evaluation tells prompts apart: by their difficulty, say
    notes: Mapping[str, int] = field(default_factory=dict[str, int])  # rows that could not be used, counted by reason
    remarks: Mapping[str, int] = field(default_factory=dict[str, int])  # what was done to rows, counted
    demonstrations: Sequence[Prompt] | None = None  # prompts for SFT, where they are others than those of `train`


@dataclass(frozen=True)
class TaskKind:
    """How a task is made from a config."""

    build: Callable[[TaskConfig, Any], Task]  # (config, tokenizer)
    options: type  # a dataclass: the keys of `task.options`
    tokenizer: Callable[[TaskConfig], Any] | None = None  # a task's own, where it does not read natural text
    raw_texts: Callable[[TaskConfig, int], list[str]] | None = None  # for the lm stage: (config, most)
    preference_pairs: Callable[[TaskConfig, Any, int], Pairs] | None = (
        None  # for a reward model: (config, tokenizer, least words)
    )
    labelled_texts: Callable[[TaskConfig, str], tuple[list[str], list[int]]] | None = None  # for a sentiment reward
    needs_data: bool = False
    has_rule: bool = True  # whether its texts may be scored by a rule of its own, `reward.path=task`
    instruction: str | None = None  # tells a guide that chats what to do with '{text}'; None: a plain one


def task_options(config: TaskConfig, kind: type) -> Any:
    """`task.options` as the task's own dataclass; unknown keys and wrong types are refused."""
    return read_options(config.options, kind, f"task '{config.name}'", "task.options.")
