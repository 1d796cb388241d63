"""Lines, tables and errors in a terminal: data to standard output, everything else to standard error.

Nothing here takes long to import, so that commands without a model, and errors, answer at once.
"""

import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

out = Console(highlight=False)
log = Console(stderr=True, highlight=False)


def report(line: str) -> None:
    """A line about what is happening, to standard error."""
    log.print(Text(line), soft_wrap=True)


def once() -> Callable[[str], None]:
    """`report`, which says of each stage but once that it is used again."""
    said: set[str] = set()

    def tell(line: str) -> None:
        if line not in said:
            report(line)
        if ": reusing " in line:
            said.add(line)

    return tell


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table to standard output; the first column is text, the others are figures."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(Text(heading), justify="right" if number else "left", no_wrap=number > 0 and len(heading) < 14)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    # a narrow terminal folds lines rather than cells
    Console(highlight=False, width=max(out.width, 160)).print(table)


def fail(message: str) -> None:
    """An error, to standard error."""
    sys.stdout.flush()
    log.print(Text("error: ", style="bold red").append(message, style="not bold default"), soft_wrap=True)
