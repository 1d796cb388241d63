"""Files: atomic writes, JSON and JSON lines."""

import errno
import io
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlgf.data.tables.json_file import parse_json
from rlgf.data.tables.text import Rows, decode
from rlgf.errors import ConfigError, DataError
from rlgf.types import FORMAT_VERSION
from rlgf.untrusted_text import escape_json, replace_surrogates, shorten

HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # JSON's escape of a surrogate, paired or not

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE)
CHECK = "crc32"
CHECKED = re.compile(rb', "crc32": "([0-9a-f]{8})"\}$')


def read_jsonl(path: Path, encoding: str | None = None) -> Rows:
    """Load the objects of a JSON-lines file, plain or compressed.

    Raises `DataError` that names a broken line, or for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            numbered = read_numbered_jsonl(file, str(path), encoding)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None
    return Rows([row for _, row in numbered], [number for number, _ in numbered])


def read_numbered_jsonl(file: io.BufferedReader, where: str, encoding: str | None = None) -> list[tuple[int, dict[str, Any]]]:
    """Load the objects of an open JSON-lines file, each with its line number.

    Compression and byte order marks are recognized. Empty lines are skipped; `where` names the file
    in errors. Halves of characters (unpaired surrogates) become U+FFFD, as tokenizers and files
    cannot hold them. Raises `DataError` for a line that is not a JSON object.
    """
    return parse_json_lines(decode(file.read(), where, encoding), where)


def parse_json_lines(text: str, where: str) -> list[tuple[int, dict[str, Any]]]:
    """Return the objects in the lines of a text, each with its line number."""
    rows: list[tuple[int, dict[str, Any]]] = []
    # not splitlines(), which also splits at characters that JSON may hold (U+0085, U+2028)
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, where, number)
        if HALF_CHARACTER.search(line):
            row = replace_halves(row)
        if not isinstance(row, dict):
            raise DataError(f"{where}, line {number}: expected an object, found {type(row).__name__}.")
        rows.append((number, cast("dict[str, Any]", row)))
    return rows


def replace_halves(value: Any) -> Any:
    """Replace unpaired surrogates by U+FFFD in all texts and keys of a JSON value."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, dict):
        return {replace_surrogates(key): replace_halves(item) for key, item in cast("dict[str, Any]", value).items()}
    return list(map(replace_halves, cast("list[Any]", value))) if isinstance(value, list) else value


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Add a file's name to write errors that name none, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno in WRITE_ERRORS:
            error.filename = str(path)
        raise


@contextmanager
def atomic_write(path: Path) -> Generator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends.

    After an error the temporary file is removed and `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        # opened by name, since callers may use `file.name`
        with naming(path), open(name, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file atomically: a reader sees the old content or the new."""
    with atomic_write(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def to_json(value: object, indent: int | None = None) -> str:
    """Convert a value to JSON, with escapes only for control and invisible characters."""
    return escape_json(json.dumps(value, indent=indent, ensure_ascii=False))


def write_json(path: Path, value: object) -> None:
    """Write a JSON file atomically."""
    write_file(path, render_json(value))


def render_json(value: object) -> str:
    """Return a value as the text of a JSON file."""
    return to_json(value, indent=2) + "\n"


def require_format(found: Mapping[str, Any], path: Path) -> None:
    """Raise unless a file's content has the format version of this rlgf."""
    # a file of another program may hold anything
    version = found.get("format_version") if isinstance(found, Mapping) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {version}, and this rlgf reads version {FORMAT_VERSION}: recreate it, or use "
            "the version of rlgf that wrote it."
        )


def read_json(path: Path) -> Any:
    """Load the value of a JSON file; raise `ConfigError` if that fails."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({error}): remove it and recreate it.") from None


def to_line(row: Mapping[str, Any]) -> str:
    """Convert an object to a line of JSON, with null for non-finite numbers."""
    return to_json(json_safe(row)) + "\n"


def json_safe(value: Any) -> Any:
    """Replace NaN and infinities in a value by None, as strict JSON demands."""
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_checked_line(row: Mapping[str, Any]) -> bytes:
    """Return an object as a line of JSON whose last entry is its checksum."""
    text = to_line(row).rstrip("\n").encode("utf-8", "backslashreplace")
    return text[:-1] + f', "{CHECK}": "{zlib.crc32(text):08x}"}}\n'.encode()


def read_line(line: bytes, needs_check: bool = False) -> dict[str, Any] | None:
    """Return the object of a line without its checksum, or None if it is damaged.

    A line without a checksum is whole unless `needs_check` is set.
    """
    found = CHECKED.search(line)
    text = line[: found.start()] + b"}" if found else line
    if (found and zlib.crc32(text) != int(found[1], 16)) or (needs_check and not found):
        return None
    try:
        row: Any = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return cast("dict[str, Any]", row) if isinstance(row, dict) else None


def read_complete_lines(path: Path) -> list[dict[str, Any]]:
    """Load the objects of a JSON-lines file, without lines that are incomplete or damaged."""
    # not splitlines(), which also splits at characters that JSON does not escape (U+0085, U+2028)
    rows = (read_line(line) for line in path.read_bytes().split(b"\n"))
    return [row for row in rows if row is not None]


def require_valid_path(path: Path, option: str) -> None:
    """Raise `ConfigError` for a path with bytes that not every library can write to."""
    text = str(path)
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ConfigError(f"{shorten(text, 120)} is not a path in UTF-8 without NUL: choose another {option}.")
