"""The two ways a run can end badly, each one sentence that says what, where and how to mend it."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that was asked for cannot be had; found before any work is done. The command line exits with 2."""


class RunError(Exception):
    """A guide or a reward failed while training; a checkpoint was written first. The command line exits with 3."""


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """The error for a name that is not one of `valid`, with the nearest valid one."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(names)}."
    return UserError(f"unknown {kind} '{name}': {hint}")
