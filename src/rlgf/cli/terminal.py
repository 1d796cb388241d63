"""Terminal output of lines, tables, schedules and errors: the only file that prints.

Data goes to standard output, everything else to standard error. Text from models, data, servers and
users may be in every line, so each one passes `as_text` or `escape_lines`, which leave no control
character in it. Imports are fast here, so that commands without a model, and errors, respond at
once.
"""

import io
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlgf.algorithms.base import Algorithm
from rlgf.credentials import mask_credentials
from rlgf.types import GUIDE, POLICY, Origin
from rlgf.untrusted_text import escape_control_characters, escape_lines

out = Console(highlight=False)
log = Console(stderr=True, highlight=False)
Part = str | tuple[str, str]
"""A text, or a text and its style."""


class StatusStream(io.TextIOBase):
    """A stream of status lines that drops them when its terminal has gone away.

    Work must not end because nobody reads its progress.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__()
        self.stream = stream

    def write(self, text: str, /) -> int:
        """Write a text, or drop it."""
        try:
            return self.stream.write(text)
        except OSError:
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Flush the stream, if it is still there."""
        try:
            if not self.stream.closed:  # Python closes this one too, which flushes
                self.stream.flush()
        except OSError:
            self._drop()

    def fileno(self) -> int:
        """Return the stream's file descriptor."""
        return self.stream.fileno()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self.stream.isatty()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Return the stream's encoding."""
        return self.stream.encoding

    def _drop(self) -> None:
        """Redirect the descriptor to the null device, so that the flush at exit succeeds."""
        with suppress(OSError, ValueError):  # ValueError: what it writes to is closed
            descriptor = self.stream.fileno()
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)


def as_text(*parts: Part) -> Text:
    """Convert a line's parts to styled text, without control characters and markup."""
    styled = [(part, "") if isinstance(part, str) else part for part in parts]
    return Text.assemble(*((escape_control_characters(text), style) for text, style in styled))


def write(*parts: Part, to: Console = out, soft_wrap: bool | None = None) -> None:
    """Print a line of parts, by default to standard output.

    In a terminal it is wrapped between words; in a file or pipe it stays one line.
    """
    to.print(as_text(*parts), soft_wrap=not to.is_terminal if soft_wrap is None else soft_wrap)


def announce_loading() -> None:
    """Report that libraries are being loaded, unless they already are."""
    if "torch" not in sys.modules:
        report("loading torch and transformers …")


def write_block(text: str) -> None:
    """Print a text of several lines, such as JSON or YAML, to standard output."""
    sys.stdout.write(escape_lines(text.removesuffix("\n")) + "\n")


def report(line: str) -> None:
    """Print a status line to standard error."""
    write(line, to=log)


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
        table.add_column(as_text(heading), justify="right" if number else "left", no_wrap=number > 0 and len(heading) < 14)
    for row in rows:
        table.add_row(*map(as_text, row))
    # a narrow terminal wraps lines rather than cells
    Console(highlight=False, width=max(out.width, 160)).print(table)


def fail(message: str) -> None:
    """Print an error message to standard error."""
    sys.stdout.flush()
    write(("error: ", "bold red"), (message, "not bold default"), to=log)


def print_traceback(error: BaseException) -> None:
    """Print the traceback of an unexpected exception, without credentials."""
    sys.stdout.flush()
    for line in mask_credentials("".join(traceback.format_exception(error))).splitlines():
        write(line, to=log)


class EscapingFormatter(logging.Formatter):
    """A formatter whose records are clean lines, as `formatter` writes them."""

    def __init__(self, formatter: logging.Formatter | None) -> None:
        super().__init__()
        self.formatter = formatter or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        """Return the record without control characters and credentials."""
        return escape_lines(mask_credentials(self.formatter.format(record)))


def escape_log_lines() -> None:
    """Escape the log lines of libraries."""
    loggers = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    for handler in [logging.lastResort, *(handler for logger in loggers for handler in logger.handlers)]:
        if handler is not None and not isinstance(handler.formatter, EscapingFormatter):
            handler.setFormatter(EscapingFormatter(handler.formatter))


@contextmanager
def escape_warnings() -> Generator[None]:
    """Print Python's warnings within the block as status lines."""

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
        report(f"{category.__name__}: {mask_credentials(str(message))}")

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def describe_phases(algorithm: Algorithm) -> list[str]:
    """Return a readable description of each phase."""
    names = {POLICY: "policy", GUIDE: "guide"}
    lines: list[str] = []
    for phase in algorithm.phases:
        end = f"the {names[phase.rollout]} generates all of it"
        if phase.rollin is not None:
            end = f"with probability {phase.beta:g} the {names[phase.rollin]} starts; the {names[phase.rollout]} finishes"
        lines.append(end)
    return lines


def describe_baseline(algorithm: Algorithm, rollout_by: Origin) -> str:
    """Describe the baseline of the advantages in rows with a rollout origin."""
    if algorithm.baseline is None:
        return "critic V^π" if rollout_by == POLICY else "critic V^g"
    of_all = {
        "leave_one_out": "the mean of the others",
        "group_mean": "the mean",
        "group_normalized": "the mean, over the spread",
    }
    return f"no critic: {of_all[algorithm.baseline.advantage]} of a group ({algorithm.baseline.over.replace('_', ' ')})"


def print_algorithm(algorithm: Algorithm, iterations: int, uniforms: Sequence[float]) -> None:
    """Print the phases of an algorithm and the iterations that use each."""
    write((f"{algorithm.title}: {algorithm.summary}", "bold"))
    for number, line in enumerate(describe_phases(algorithm)):
        phase = algorithm.phases[number]
        write(f"  phase {number}: {line}; {describe_baseline(algorithm, phase.rollout)}")
    names = {POLICY: "policy"}
    width = 60
    write()
    for number, phase in enumerate(algorithm.phases):
        cells = ""
        for place in range(min(width, iterations)):
            iteration = place * iterations // min(width, iterations)
            share = sum(s.fraction for s in algorithm.schedule(iteration, uniforms[iteration]) if s.phase == number)
            cells += "·" if share == 0 else "█" if share > 0.99 else "▄"
        rollin = "–" if phase.rollin is None else names.get(phase.rollin, "guide")
        label = f"{rollin} → {names.get(phase.rollout, 'guide')}"
        write(f"  {label:18}{cells}  iterations 0–{iterations - 1}")
    write(("  █ all completions of the iteration   ▄ a part   · none", "dim"))
