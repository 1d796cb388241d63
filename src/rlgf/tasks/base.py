"""Tasks: prompts of three splits, a reward and metrics.

A new task is one file next to this one and an entry in `tasks.registry.TASKS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from rlgf.config.base import read_options
from rlgf.config.sections import TaskConfig
from rlgf.data.preferences import Pairs
from rlgf.errors import DataError
from rlgf.types import Prompt, RewardFunction
from rlgf.untrusted_text import show_value


@dataclass(frozen=True)
class Task:
    """The prompts of three splits, the reward rule and the options of an evaluation.

    Example:
        >>> def reward(prompts, completions):
        ...     return [float("yes" in text) for text in completions]
        >>> prompts = [rlgf.Prompt("Is it good?"), rlgf.Prompt("Will it last?")]
        >>> task = rlgf.Task("say_yes", prompts, prompts, prompts, reward, pass_threshold=1.0)
        >>> task.reward(task.test, [" yes, it is", " no"])
        [1.0, 0.0]
    """

    name: str
    train: Sequence[Prompt]
    validation: Sequence[Prompt]
    test: Sequence[Prompt]
    reward: RewardFunction | None = None  # the task's own rule; None: a reward model is needed
    scores_full_text: bool = False  # a reward model scores prompt + completion; False: completion
    pass_threshold: float | None = None  # lowest reward of a completion that passes
    # reported next to `test`
    extra_test_splits: Mapping[str, Sequence[Prompt]] = field(default_factory=dict[str, Sequence[Prompt]])
    # key by which a final evaluation groups prompts, such as their difficulty
    group: Callable[[Prompt], str] | None = None
    dropped_rows: Mapping[str, int] = field(default_factory=dict[str, int])  # reason -> rows
    warnings: Mapping[str, int] = field(default_factory=dict[str, int])  # change -> rows
    demonstrations: Sequence[Prompt] | None = None  # prompts for SFT; None: `train`


@dataclass(frozen=True)
class TaskDefinition:
    """The functions and options that build a task from a config.

    A config names a definition of yours as `task.name=python:module:NAME`.

    Example:
        >>> @dataclass
        ... class Options:
        ...     question: str = "Is it good?"
        >>> def build(config, tokenizer):
        ...     prompts = [rlgf.Prompt(Options(**config.options).question)]
        ...     return rlgf.Task(config.name, prompts, prompts, prompts)
        >>> definition = rlgf.TaskDefinition(build, Options, has_builtin_reward=False)
        >>> definition.build(rlgf.Config().task, None).test[0].text
        'Is it good?'
    """

    build: Callable[[TaskConfig, Any], Task]  # (config, tokenizer)
    options: type  # a dataclass: the keys of `task.options`
    tokenizer: Callable[[TaskConfig], Any] | None = None  # of tasks without natural language
    # texts of the pretrain stage: (config, max_texts)
    raw_texts: Callable[[TaskConfig, int], list[str]] | None = None
    # pairs of a reward model: (config, tokenizer, min words)
    preference_pairs: Callable[[TaskConfig, Any, int], Pairs] | None = None
    # texts and labels of a sentiment reward: (config, split)
    labeled_texts: Callable[[TaskConfig, str], tuple[list[str], list[int]]] | None = None
    needs_data: bool = False
    has_builtin_reward: bool = True  # has a rule of its own, `reward.path=task`
    instruction: str | None = None  # prompt of a chat guide, with '{text}'; None: a default


def task_options(config: TaskConfig, kind: type, prefix: str = "task.options.") -> Any:
    """Return `task.options` as the task's own dataclass.

    Raises `ConfigError` for unknown keys and wrong types; `prefix` names them.
    """
    return read_options(config.options, kind, f"task '{config.name}'", prefix)


def check_task(task: Any, name: str) -> Task:
    """Return a task that a user's code built; raise `DataError` if it is none."""
    if not isinstance(task, Task):
        raise DataError(f"task '{name}' built a {type(task).__name__}, but must build a rlgf.Task.")
    parts: dict[Any, Any] = {"train": task.train, "validation": task.validation, "test": task.test, **task.extra_test_splits}
    if task.demonstrations is not None:
        parts["demonstrations"] = task.demonstrations
    for part, prompts in parts.items():
        if not isinstance(prompts, Sequence) or not prompts:
            raise DataError(f"task '{name}' has no list of prompts as {part}: give at least one `rlgf.Prompt`.")
        for number, prompt in enumerate(cast("Sequence[Any]", prompts), 1):
            texts = (prompt.text, *prompt.references, *prompt.sft_targets) if isinstance(prompt, Prompt) else (None,)
            if not all(isinstance(text, str) for text in texts):
                raise DataError(
                    f"task '{name}', prompt {number} of {part} is {show_value(prompt)}: it must be a `rlgf.Prompt` of texts."
                )
    return task
