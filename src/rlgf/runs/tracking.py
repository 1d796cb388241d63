"""Experiment tracking by TensorBoard, wandb and trackio, through accelerate's trackers."""

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlgf.errors import ConfigError, unknown

MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


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
    """The trackers of a run."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.trackers: list[Any] = []
        if names:
            PartialState(cpu=True)  # accelerate's trackers take the main process from it
        for name in names:
            kind: Any = LOGGER_TYPE_TO_CLASS[name]
            tracker: Any = kind(folder.name, str(folder)) if kind.requires_logging_directory else kind("rlgf")
            if hasattr(tracker, "start"):
                tracker.start()
            # TensorBoard's hyper-parameter page takes flat numbers only, in a separate folder
            if name != "tensorboard":
                tracker.store_init_configuration(dict(config))
            self.trackers.append(tracker)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Log the finite numbers of one iteration."""
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float)) and math.isfinite(value)}
        for tracker in self.trackers:
            tracker.log(numbers, step=step)

    def finish(self) -> None:
        """Flush and close all trackers."""
        for tracker in self.trackers:
            tracker.finish()
