"""Numbers for people who watch: TensorBoard, wandb and trackio, through accelerate's trackers."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlgf.errors import UserError, unknown

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that is not known or not installed."""
    for name in names:
        if name not in MODULES:
            raise unknown("tracker", name, MODULES)
        if importlib.util.find_spec(MODULES[name]) is None:
            raise UserError(
                f"tracker '{name}' is not installed: pip install 'rlgf[{name}]', or leave it out of runtime.trackers."
            )


class Trackers:
    """All trackers of a run."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.trackers: list[Any] = []
        if names:
            PartialState(cpu=True)  # accelerate's trackers ask it which process is the main one
        for name in names:
            kind: Any = LOGGER_TYPE_TO_CLASS[name]
            tracker: Any = kind(folder.name, str(folder)) if kind.requires_logging_directory else kind("rlgf")
            if hasattr(tracker, "start"):
                tracker.start()
            if name != "tensorboard":  # its hyper-parameter page takes flat numbers only, and a folder of its own
                tracker.store_init_configuration(dict(config))
            self.trackers.append(tracker)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Numbers of one iteration."""
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        for tracker in self.trackers:
            tracker.log(numbers, step=step)

    def finish(self) -> None:
        """Flush and close."""
        for tracker in self.trackers:
            tracker.finish()
