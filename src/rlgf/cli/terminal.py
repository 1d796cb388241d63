"""Terminal output of lines, tables and errors.

Data goes to standard output, everything else to standard error. Imports are fast here, so that
commands without a model, and errors, respond at once.
"""

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
log = Console(stderr=True, highlight=False)


def report(line: str) -> None:
    """Print a status line to standard error."""
    log.print(Text(line), soft_wrap=True)


def report_reuse_once() -> Callable[[str], None]:
    """Return a reporter that prints each 'reusing' line only once."""
    printed: set[str] = set()

    def tell(line: str) -> None:
        if line not in printed:
            report(line)
        if ": reusing " in line:
            printed.add(line)

    return tell


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a plain table to standard output.

    The first column is text, the others are numbers.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if number else "left", no_wrap=number > 0 and len(heading) < 14)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # a narrow terminal wraps lines rather than cells
    Console(highlight=False, width=max(out.width, 160)).print(table)


def fail(message: str) -> None:
    """Print an error message to standard error."""
    sys.stdout.flush()
    log.print(Text("error: ", style="bold red").append(message, style="not bold default"), soft_wrap=True)
