"""The tasks by name."""

from rlgf.config import TaskConfig
from rlgf.errors import unknown
from rlgf.tasks import commongen, embedded, imdb
from rlgf.tasks.base import Task, TaskKind
from rlgf.types import TextFunction

TASKS: dict[str, TaskKind] = {"embedded": embedded.KIND, "imdb": imdb.KIND, "commongen": commongen.KIND}

__all__ = ["TASKS", "Task", "TaskKind", "TextFunction", "task_kind"]


def task_kind(config: TaskConfig) -> TaskKind:
    """The kind of task a config names."""
    if config.name not in TASKS:
        raise unknown("task", config.name, TASKS)
    return TASKS[config.name]
