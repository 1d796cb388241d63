"""The errors of the library.

Every message is one sentence: the problem, its location and how to fix it.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """An invalid request, detected before any work is done.

    The command line exits with status 2.
    """


class RunError(Exception):
    """A failure of a guide or a reward during training, after a checkpoint was written.

    The command line exits with status 3.
    """


def unknown(kind: str, name: str, valid: Iterable[str]) -> UserError:
    """Return the error for a name not in `valid`, with the closest valid name."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(names)}."
    return UserError(f"unknown {kind} '{name}': {hint}")
