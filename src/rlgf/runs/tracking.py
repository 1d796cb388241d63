"""Experiment tracking by TensorBoard, wandb and trackio, through accelerate's trackers.

A run that is resumed goes on in the same run of each tracker, without iterations twice.
"""

import importlib.util
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlgf.data.files import read_json, write_json
from rlgf.errors import ConfigError, DataError, unknown
from rlgf.untrusted_text import escape_control_characters

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
RUNS = "runs.json"  # the identity of the run at each tracker that is a service


def check_trackers(names: Sequence[str]) -> None:
    """Raise for a tracker that is unknown or not installed."""
    for name in names:
        if name not in MODULES:
            raise unknown("tracker", name, MODULES)
        if importlib.util.find_spec(MODULES[name]) is None:
            raise ConfigError(
                f"tracker '{name}' is not installed: pip install 'rlgf[{name}]', or leave it out of runtime.trackers."
            )


class Trackers:
    """The trackers of a run, opened before iteration `first` (0-based).

    TensorBoard drops what was logged from there on. For wandb and trackio, an identity in `folder`
    leads to the same run, and iterations that it has are not logged again.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any], first: int = 0) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.trackers: list[tuple[Any, int]] = []  # with the first iteration to log
        self.failure: OSError | None = None  # of TensorBoard's thread
        if names:
            PartialState(cpu=True)  # accelerate's trackers take the main process from it
        for name in names:
            kind: Any = LOGGER_TYPE_TO_CLASS[name]
            if name == "tensorboard":
                # a number, as two files that begin in the same second would have the same name
                number = len(list(folder.rglob("events.out.tfevents.*")))
                tracker: Any = kind(folder.name, str(folder.parent), purge_step=first, filename_suffix=f".{number:06d}")
            else:
                tracker = kind("rlgf", **_resume_options(name, folder))
            if hasattr(tracker, "start"):
                tracker.start()
            # TensorBoard's hyper-parameter page takes flat numbers only, in a separate folder
            if name == "tensorboard":
                self._keep_thread_alive(tracker)
            else:
                tracker.store_init_configuration(dict(config))
            self.trackers.append((tracker, _next_step(tracker) if name != "tensorboard" else first))

    def _keep_thread_alive(self, tracker: Any) -> None:
        """Store errors of tensorboardX's thread, so that its queue cannot fill up.

        `log` raises them; otherwise it would wait forever.
        """
        events = getattr(getattr(getattr(tracker.writer, "file_writer", None), "event_writer", None), "_ev_writer", None)
        for name in ("write_event", "flush") if events is not None else ():
            setattr(events, name, self._storing_errors(getattr(events, name)))

    def _storing_errors(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any) -> Any:
            try:
                return call(*arguments)
            except Exception as error:  # whatever it is, the thread must live on
                failure = error if isinstance(error, OSError) else OSError(f"TensorBoard's events cannot be written: {error}")
                self.failure = self.failure or failure
                return None

        return guarded

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log the finite numbers of one iteration."""
        numbers = {
            escape_control_characters(key): value
            for key, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        for tracker, first in self.trackers:
            if step >= first:
                tracker.log(numbers, step=step)
        if self.failure is not None:
            raise self.failure

    def finish(self) -> None:
        """Flush and close all trackers."""
        for tracker, _ in self.trackers:
            tracker.finish()
        if self.failure is not None:
            raise self.failure


def _resume_options(name: str, folder: Path) -> dict[str, Any]:
    """Return the options that lead a tracker to the same run each time."""
    path, known = folder / RUNS, dict[str, str]()
    with suppress(DataError):  # a damaged file: a new run of the tracker begins
        found: Any = read_json(path) if path.is_file() else {}
        known = {key: value for key, value in found.items() if isinstance(value, str)} if isinstance(found, dict) else {}
    if name not in known:
        known[name] = uuid.uuid4().hex[:12]
        write_json(path, known)
    return {"id" if name == "wandb" else "name": known[name], "resume": "allow"}


def _next_step(tracker: Any) -> int:
    """Return the first step that a tracker's run has not logged."""
    run = tracker.tracker
    found = getattr(run, "starting_step", None) if hasattr(run, "starting_step") else getattr(run, "_next_step", None)
    return found if isinstance(found, int) else 0
