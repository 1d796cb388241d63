"""The errors of the library.

Every message is one sentence: the problem, its location and how to fix it.
"""

import difflib
from collections.abc import Iterable


class RlgfError(Exception):
    """The base of all errors that the library raises on purpose."""

    exit_code = 1
    """The exit status of the command line."""


class ConfigError(RlgfError, ValueError):
    """A setting, name or model that cannot be used, found before any work."""

    exit_code = 2


class FieldError(ConfigError):
    """A field's value that cannot be used.

    The message begins with the field's name, and a config puts the name of its section before it.
    """


class DataError(RlgfError):
    """A dataset or file whose content cannot be used, found before any work."""

    exit_code = 2


class TrainingError(RlgfError):
    """A failure while training or evaluating; during training a checkpoint is written first."""

    exit_code = 3


class GuideError(TrainingError):
    """A guide that fails, or returns no completion for a request."""


class RewardError(TrainingError):
    """A reward that fails, or returns no finite number for a completion."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be loaded."""


INPUT_ERRORS = (ConfigError, DataError)
"""The errors that are found before any work is done."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> ConfigError:
    """Return the error for a name not in `valid`, with the closest valid name."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(names)}."
    return ConfigError(f"unknown {kind} '{name}': {hint}")
