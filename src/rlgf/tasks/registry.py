"""The registry of tasks by name."""

from rlgf.config.sections import TaskConfig
from rlgf.config.specs import load_object
from rlgf.errors import ConfigError, unknown
from rlgf.tasks import commongen, imdb, prompts, tldr, toy_reviews
from rlgf.tasks.base import TaskDefinition, task_options

TASKS: dict[str, TaskDefinition] = {
    "toy_reviews": toy_reviews.TASK, "imdb": imdb.TASK, "commongen": commongen.TASK, "tldr": tldr.TASK, "prompts": prompts.TASK,
}  # fmt: skip


def task_definition(config: TaskConfig) -> TaskDefinition:
    """Return the definition of the task that a config names.

    The name is a key of `TASKS`, or python:module:NAME for a `TaskDefinition` of the user. Raises
    `ConfigError` for an unknown name or unknown options.
    """
    definition = _load_definition(config)
    task_options(config, definition.options)
    return definition


def _load_definition(config: TaskConfig) -> TaskDefinition:
    if config.name.startswith("python:"):
        definition = load_object(config.name, "task")
        if not isinstance(definition, TaskDefinition):
            raise ConfigError(
                f"task '{config.name}' is a {type(definition).__name__}, but must be a rlgf.tasks.base.TaskDefinition."
            )
        return definition
    if config.name not in TASKS:
        raise unknown("task", config.name, TASKS)
    return TASKS[config.name]
