"""The registry of tasks by name."""

import dataclasses
import functools
from typing import Any

from rlgf.config.sections import TaskConfig
from rlgf.config.specs import load_object
from rlgf.errors import ConfigError, unknown, user_code
from rlgf.tasks import commongen, imdb, prompts, tldr, toy_reviews
from rlgf.tasks.base import Task, TaskDefinition, check_task, task_options

TASKS: dict[str, TaskDefinition] = {
    "toy_reviews": toy_reviews.TASK, "imdb": imdb.TASK, "commongen": commongen.TASK, "tldr": tldr.TASK, "prompts": prompts.TASK,
}  # fmt: skip


def task_definition(config: TaskConfig, prefix: str = "task.options.") -> TaskDefinition:
    """Return the definition of the task that a config names.

    The name is a key of `TASKS`, or python:module:NAME for a `TaskDefinition` of the user. Raises
    `ConfigError` for an unknown name or unknown options, which `prefix` names.
    """
    definition = _load_definition(config)
    task_options(config, definition.options, prefix)
    return definition


def _load_definition(config: TaskConfig) -> TaskDefinition:
    if config.name.startswith("python:"):
        definition = load_object(config.name, "task")
        if not isinstance(definition, TaskDefinition):
            raise ConfigError(
                f"task '{config.name}' is a {type(definition).__name__}, but must be a rlgf.tasks.base.TaskDefinition."
            )
        return _guarded_definition(definition, config.name)
    if config.name not in TASKS:
        raise unknown("task", config.name, TASKS)
    return TASKS[config.name]


def _guarded_definition(definition: TaskDefinition, name: str) -> TaskDefinition:
    """Wrap a user's definition so that its failures become errors of one sentence."""
    if not dataclasses.is_dataclass(definition.options):
        raise ConfigError(f"task '{name}' has options that are no dataclass: give a class with the decorator `dataclass`.")

    def guarded(part: str) -> Any:
        function = getattr(definition, part)
        if function is None:
            return None

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            with user_code(f"{part} of task '{name}' failed", ConfigError):
                return function(*arguments)

        return call

    def build(config: TaskConfig, tokenizer: Any) -> Task:
        with user_code(f"build of task '{name}' failed", ConfigError):
            return check_task(definition.build(config, tokenizer), name)

    parts = {part: guarded(part) for part in ("tokenizer", "raw_texts", "preference_pairs", "labeled_texts")}
    return dataclasses.replace(definition, build=build, **parts)
