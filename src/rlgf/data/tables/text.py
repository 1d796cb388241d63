"""Texts of files: compression, encodings and byte order marks; and rows with their lines."""

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from rlgf.errors import DataError

COMPRESSIONS: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ\x00": lzma.decompress,
}  # fmt: skip
ARCHIVES = {b"PK\x03\x04": "a zip archive or a spreadsheet", b"\x28\xb5\x2f\xfd": "compressed with zstd"}
# UTF-32 before UTF-16, whose mark is its beginning
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


class Rows(list[dict[str, Any]]):
    """Rows of a file; `lines` are the numbers of their first lines, if known."""

    def __init__(self, rows: Sequence[Mapping[str, Any]] = (), lines: Sequence[int] = ()) -> None:
        super().__init__(map(dict, rows))
        self.lines = tuple(lines)

    def part(self, is_kept: Sequence[bool]) -> "Rows":
        """Return the rows of which `is_kept` is true."""
        kept = [place for place, keep in enumerate(is_kept) if keep]
        return Rows([self[place] for place in kept], [self.lines[place] for place in kept] if self.lines else ())


def places_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the place of each row: its line in the file, or its number."""
    lines = rows.lines if isinstance(rows, Rows) else ()
    return [f"line {line}" for line in lines] or [f"row {number}" for number in range(1, len(rows) + 1)]


def decompress(data: bytes, where: str) -> bytes:
    """Return the content of compressed bytes (gzip, bz2, xz), or the bytes themselves."""
    for mark, kind in ARCHIVES.items():
        if data.startswith(mark):
            raise DataError(f"{where} is {kind}, which is not read: unpack it, or export the rows as JSON lines or CSV.")
    for mark, function in COMPRESSIONS.items():
        if data.startswith(mark):
            try:
                return function(data)
            except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise DataError(f"{where}: the compressed content cannot be decoded ({error}): write the file again.") from None
    return data


def decode(data: bytes, where: str, encoding: str | None = None) -> str:
    """Return the text of a file's bytes.

    It is UTF-8, what its byte order mark says, or in a given encoding.

    Raises `DataError` that names the line of a byte that is not in this encoding. No encoding is
    guessed: most single-byte ones decode any text, to other letters.
    """
    data = decompress(data, where)
    marked = next((name for mark, name in MARKS if data.startswith(mark)), None)
    try:
        text = data.decode(marked or encoding or "utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        shown = "" if marked else f" byte 0x{data[error.start]:02x} is not {encoding or 'UTF-8'}"
        raise DataError(
            f"{where}, line {line}: cannot be decoded ({shown.strip() or error.reason}): save the file as UTF-8, or name its "
            "encoding with task.options.encoding (cp1252, latin-1, …)."
        ) from None
    except LookupError:
        raise DataError(
            f"task.options.encoding is '{encoding}', which is no encoding: name one such as utf-16 or cp1252."
        ) from None
    if "\0" in text[:4096] and not encoding and not marked:
        raise DataError(f"{where}: holds NUL characters, as UTF-16 without a mark does: set task.options.encoding=utf-16-le.")
    return text


def missing_as_none(rows: Rows, columns: Sequence[str]) -> Rows:
    """Replace NaN, which marks missing texts in tables, by None in text columns."""
    for row in rows:
        for name in columns:
            value = row.get(name)
            if isinstance(value, float) and value != value:
                row[name] = None
            elif isinstance(value, list):
                items = cast("list[Any]", value)
                if any(isinstance(item, float) and item != item for item in items):
                    row[name] = [None if isinstance(item, float) and item != item else item for item in items]
    return rows
