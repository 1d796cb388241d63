"""The tasks by name."""

from rlgf.config import TaskConfig
from rlgf.errors import UserError, unknown
from rlgf.plugins import load_object
from rlgf.tasks import commongen, embedded, imdb, prompts, tldr
from rlgf.tasks.base import Task, TaskKind, task_options
from rlgf.types import TextFunction

TASKS: dict[str, TaskKind] = {
    "embedded": embedded.KIND, "imdb": imdb.KIND, "commongen": commongen.KIND, "tldr": tldr.KIND, "prompts": prompts.KIND,
}  # fmt: skip

__all__ = ["TASKS", "Task", "TaskKind", "TextFunction", "task_kind", "task_options"]


def task_kind(config: TaskConfig) -> TaskKind:
    """The kind of task a config names: one of ours, or the user's own as python:module:KIND. Options it has not are refused."""
    kind = _kind(config)
    task_options(config, kind.options)
    return kind


def _kind(config: TaskConfig) -> TaskKind:
    if config.name.startswith("python:"):
        kind = load_object(config.name, "task")
        if not isinstance(kind, TaskKind):
            raise UserError(f"task '{config.name}' is a {type(kind).__name__}, but must be a rlgf.tasks.TaskKind.")
        return kind
    if config.name not in TASKS:
        raise unknown("task", config.name, TASKS)
    return TASKS[config.name]
