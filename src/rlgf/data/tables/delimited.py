"""Rows of CSV and TSV files.

They are read here, not by `datasets`, which hands them to pandas: with a delimiter at the end of
its rows pandas moves every column by one, and it fills short rows, drops what follows an unclosed
quote, and turns texts such as 007, 1e5 or NA into numbers. Here nothing is moved, filled or left
out: a row that does not fit its header is refused with its line.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from typing import Any

from rlgf.data.tables.text import Rows
from rlgf.errors import DataError

DELIMITERS = (",", ";", "\t", "|")
EXCEL_SEPARATOR = re.compile(r"sep=(.)\r?\n")
LINE = re.compile(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z")
MAX_CELL = 2**31 - 1  # characters; Python's own limit is 131,072
WHOLE_NUMBER = re.compile(r"-?(0|[1-9]\d{0,17})\Z")
DECIMAL_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})\.(\d{1,15})\Z")


def read_delimited(text: str, where: str, delimiter: str | None, texts: Sequence[str] = ()) -> Rows:
    """Read the rows of a text with one header line.

    Cells beyond the header must be empty, as after a delimiter at the end of a row. A column is one
    of numbers, or of true and false, only if each of its cells is written as one; every other
    column, and those named in `texts`, is one of texts. Without a `delimiter` the header tells it.

    Raises `DataError` with the line of a row that does not fit its header.
    """
    skipped = 0
    named = EXCEL_SEPARATOR.match(text)
    if named:
        delimiter, text, skipped = named.group(1), text[named.end() :], 1
    lines, table = _read_cells(text, where, delimiter or _delimiter_of(text), skipped)
    if not table:
        return Rows()
    header = _header(table[0], table[1:], f"{where}, line {lines[0]}")
    width = len(header)
    for line, cells in zip(lines[1:], table[1:]):
        if len(cells) < width or any(cell.strip() for cell in cells[width:]):
            raise DataError(
                f"{where}, line {line}: has {len(cells)} cells, but the header has {width} columns ({', '.join(header)}): "
                "quote a cell that holds the delimiter or a line break, or fix the row."
            )
    columns = [[cells[place] for cells in table[1:]] for place in range(width)]
    values = [column if name in texts else _typed(column) for name, column in zip(header, columns)]
    return Rows([dict(zip(header, cells)) for cells in zip(*values)], lines[1:])


def _read_cells(text: str, where: str, delimiter: str, skipped: int) -> tuple[list[int], list[list[str]]]:
    """Return the rows that hold anything, each with its first line."""
    csv.field_size_limit(MAX_CELL)
    reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
    lines: list[int] = []
    table: list[list[str]] = []
    while True:
        line = reader.line_num + skipped + 1
        try:
            cells = next(reader)
        except StopIteration:
            return lines, table
        except csv.Error as error:
            raise DataError(
                f"{where}, line {line}: the quotation marks of a cell do not match ({error}): double those inside a quoted "
                "cell, or give the rows as JSON lines."
            ) from None
        if any(cells):
            lines.append(line)
            table.append(cells)


def _lines(text: str) -> Iterator[str]:
    """Yield the lines of a text with their line ends, which quoted cells may contain."""
    return (found.group() for found in LINE.finditer(text))


def _delimiter_of(text: str) -> str:
    """Return the first delimiter that occurs in the header line, otherwise a comma."""
    header = next((line for line in _lines(text) if line.strip()), "")
    return next((mark for mark in DELIMITERS if len(next(csv.reader([header], delimiter=mark))) > 1), ",")


def _header(cells: Sequence[str], rows: Sequence[Sequence[str]], where: str) -> list[str]:
    """Return the names of the columns, without nameless ones that are empty at the end."""
    names = [cell.strip() for cell in cells]
    while names and not names[-1] and not any(row[len(names) - 1 : len(names)] > [""] for row in map(list, rows)):
        names.pop()
    names = [name or f"Unnamed: {place}" for place, name in enumerate(names)]  # as pandas calls an index column
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise DataError(f"{where}: two columns are named '{twice}': rename one.")
    return names


def _typed(cells: list[str]) -> Sequence[Any]:
    """Return cells as numbers or truth values if each is written as one."""
    if all(map(WHOLE_NUMBER.match, cells)):
        return list(map(int, cells))
    decimals = [DECIMAL_NUMBER.match(cell) for cell in cells]
    if cells and all(decimals):
        # 1.10 next to 1.9 may be versions: a column of numbers has the same number of decimals, or
        # no zero at the end of any
        places = {len(found.group(2)) for found in decimals if found}
        if len(places) == 1 or all(str(float(cell)) == cell for cell in cells):
            return list(map(float, cells))
    mixed = [whole or decimal for whole, decimal in zip(map(WHOLE_NUMBER.match, cells), decimals)]
    if cells and all(mixed) and all(str(float(cell)).removesuffix(".0") == cell.removesuffix(".0") for cell in cells):
        return list(map(float, cells))
    if cells and all(cell in ("True", "False") for cell in cells):
        return [cell == "True" for cell in cells]
    return cells
