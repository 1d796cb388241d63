"""The registry of tasks by name."""

from rlgf.config.sections import TaskConfig
from rlgf.config.specs import load_object
from rlgf.errors import ConfigError, unknown
from rlgf.tasks import commongen, imdb, prompts, tldr, toy_reviews
from rlgf.tasks.base import TaskDefinition, task_options

TASKS: dict[str, TaskDefinition] = {
    "toy_reviews": toy_reviews.KIND, "imdb": imdb.KIND, "commongen": commongen.KIND, "tldr": tldr.KIND, "prompts": prompts.KIND,
}  # fmt: skip


def task_definition(config: TaskConfig) -> TaskDefinition:
    """Return the definition of the task that a config names.

    The name is a key of `TASKS`, or python:module:NAME for a `TaskDefinition` of the user. Raises
    `ConfigError` for an unknown name or unknown options.
    """
    kind = _kind(config)
    task_options(config, kind.options)
    return kind


def _kind(config: TaskConfig) -> TaskDefinition:
    if config.name.startswith("python:"):
        kind = load_object(config.name, "task")
        if not isinstance(kind, TaskDefinition):
            raise ConfigError(f"task '{config.name}' is a {type(kind).__name__}, but must be a rlgf.tasks.base.TaskDefinition.")
        return kind
    if config.name not in TASKS:
        raise unknown("task", config.name, TASKS)
    return TASKS[config.name]
