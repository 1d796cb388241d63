"""The logs of a run: JSON lines that are appended, each with a checksum.

The format is in docs/run-directory.md.
"""

import os
import shutil
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlgf.data.files import atomic_write, naming, read_line, to_checked_line, write_file

Warn = Callable[[str], None]
SHOWN = 5  # missing iterations that a warning lists


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append objects to a log; after an error, restore the log if possible."""
    content = b"".join(to_checked_line(row) for row in rows)
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        length = os.fstat(handle).st_size
        try:
            with naming(path):
                while content:
                    content = content[os.write(handle, content) :]
        except BaseException:
            with suppress(OSError):
                os.ftruncate(handle, length)
            raise
    finally:
        os.close(handle)


def flush_to_disk(path: Path) -> None:
    """Flush a log to disk, if there is one."""
    if not path.is_file():
        return
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(handle)
    finally:
        os.close(handle)


def read_rows(path: Path, warn: Warn, needs_check: bool = True) -> list[dict[str, Any]]:
    """Load the whole lines of a log, and warn of damaged ones.

    Without `needs_check`, lines without a checksum count as whole.
    """
    rows: list[dict[str, Any]] = []
    num_damaged = 0
    with path.open("rb") as file:
        for _, line, is_complete in _lines(file):
            row = read_line(line, needs_check)
            if row is not None and (is_complete or not needs_check):
                rows.append(row)
            else:
                num_damaged += 1
    if num_damaged:
        warn(f"{path}: {num_damaged:,} damaged or incomplete {'line is' if num_damaged == 1 else 'lines are'} left out")
    return rows


def is_number(value: Any) -> bool:
    """Return whether a value is a number or null, which is written for infinity."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def has_evaluation(results: Mapping[str, Any]) -> bool:
    """Return whether the evaluations of results are mappings to numbers."""
    evaluations = [results.get("evaluation"), *_values(results.get("evaluations", {}))]
    return all(isinstance(part, dict) and all(map(is_number, _values(part))) for part in evaluations)


def _values(mapping: Any) -> list[Any]:
    """Return the values of a mapping, or None for anything else."""
    return list(cast("dict[str, Any]", mapping).values()) if isinstance(mapping, dict) else [None]


def iteration_of(row: Mapping[str, Any], key: str | None = None) -> int | None:
    """Return the iteration of a line, or None.

    It is None if the line has none or, with `key`, no number under it.
    """
    number = row.get("iteration")
    is_usable = type(number) is int and number >= 0 and (key is None or (key in row and is_number(row[key])))
    return number if is_usable else None


def drop_lines_after(path: Path, iteration: int, warn: Warn, key: str | None = None) -> set[int]:
    """Keep the lines of a log of iterations before `iteration`, and return these iterations.

    The log is truncated after the last line to keep; lines before it that are damaged, or belong to
    later iterations, are cut out. Damaged lines, and those of another shape, are kept in
    `NAME.damaged-N`, with a warning. With `key`, a line has a number under it, and an iteration has
    one line.
    """
    if not path.is_file():
        return set()
    kept: list[tuple[int, int]] = []  # first and last byte of the parts to keep
    damaged: list[bytes] = []
    iterations: set[int] = set()
    with path.open("rb") as file:
        for start, line, is_complete in _lines(file):
            row = read_line(line, needs_check=True) if is_complete else None
            number = iteration_of(row, key) if row is not None else None
            if number is None or (key is not None and number in iterations):
                damaged.append(line)
            elif number < iteration:
                iterations.add(number)
                end = start + len(line) + 1
                if kept and kept[-1][1] == start:
                    kept[-1] = (kept[-1][0], end)
                else:
                    kept.append((start, end))
    if damaged:
        aside = _free_name(path)
        write_file(aside, b"\n".join(damaged))
        warn(f"{path} has {sum(map(len, damaged)):,} bytes that are no usable lines: they are in {aside.name} now")
    _keep_parts(path, kept)
    return iterations


def amend_row(path: Path, iteration: int, change: Callable[[dict[str, Any]], dict[str, Any]], warn: Warn) -> None:
    """Replace the row of an iteration by `change(row)`."""
    rows = [change(row) if iteration_of(row) == iteration else row for row in read_rows(path, warn)]
    write_file(path, b"".join(to_checked_line(row) for row in rows))


def missing_iterations(found: set[int], iteration: int) -> str | None:
    """Return in words the iterations before `iteration` that a log lacks, or None."""
    missing = [number for number in range(iteration) if number not in found]
    if not missing:
        return None
    more = f" and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
    return ", ".join(map(str, missing[:SHOWN])) + more


def _keep_parts(path: Path, parts: list[tuple[int, int]]) -> None:
    """Remove all but the given parts of a file."""
    size = path.stat().st_size
    if parts in ([], [(0, size)]) and (parts or not size):
        return
    if not parts or (len(parts) == 1 and parts[0][0] == 0):
        os.truncate(path, parts[0][1] if parts else 0)
        return
    with path.open("rb") as old, atomic_write(path) as new:
        for start, end in parts:
            old.seek(start)
            new.write(old.read(end - start))


def _lines(file: BinaryIO) -> Generator[tuple[int, bytes, bool]]:
    """Yield start, content and completeness of each line that is not empty."""
    start = 0
    for line in file:
        if line.rstrip(b"\n"):
            yield start, line.rstrip(b"\n"), line.endswith(b"\n")
        start += len(line)


def lacks_checkpoint(metrics: Path, key: str, iteration: int, every: int) -> bool:
    """Return whether a run had a checkpoint after that of `iteration`.

    A line of the metrics is written after the checkpoint before it, and a policy after the last.
    """
    rows = read_rows(metrics, lambda line: None) if metrics.is_file() else []
    last = max((number for row in rows if (number := iteration_of(row, key)) is not None), default=-1)
    return last // every * every > iteration or (last >= iteration == 0 and metrics.with_name("policy").exists())


def copy_beside(path: Path) -> Path:
    """Copy a log to `NAME.before-N`, and return that path."""
    with naming(path):
        return Path(shutil.copyfile(path, _free_name(path, "before")))


def _free_name(path: Path, kind: str = "damaged") -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.{kind}-{number}")).exists():
        number += 1
    return aside
