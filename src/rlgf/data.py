"""Rows of a dataset, from a Hub name, a local folder or a file; and files written in one piece."""

import gzip
import io
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Generator, Hashable, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlgf.errors import UserError
from rlgf.hub import asking_if_it_answers, why_not
from rlgf.randomness import Purpose, permutation

TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json"}  # files that `datasets` reads, and its builders
KINDS = ".jsonl[.gz], .csv, .tsv, .parquet or .json"


def read_rows(source: str, split: str, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of one split.

    A local folder holds `SPLIT.jsonl[.gz]`, or anything `datasets.load_dataset` reads; a single file is JSON lines, CSV, TSV,
    Parquet or JSON. Of a single file a fifth, always the same rows, is the split 'test', the rest is 'train', and any other
    split is all of it.
    Raises `UserError` for a source that cannot be read, has a broken line, lacks a column or holds no row.
    """
    path = Path(source).expanduser()
    candidates = [path] if path.is_file() else [path / f"{split}.jsonl", path / f"{split}.jsonl.gz"]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    rows = _read_file(found) if found else _load_dataset(source, split)
    where = str(found or f"{source} ({split})")
    if not rows:
        raise UserError(f"{where} holds no rows: give a dataset with at least one.")
    for column in columns:
        for number, row in enumerate(rows, 1):
            if column not in row:
                raise UserError(f"{where}, row {number}: there is no column '{column}'; it has {', '.join(sorted(row))}.")
    return _part_of_file(rows, split) if path.is_file() else rows


def _part_of_file(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    if split not in ("train", "test"):
        return rows
    return [row for row, held in zip(rows, held_out(range(len(rows)))) if held == (split == "test")]


def held_out(keys: Sequence[Hashable]) -> list[bool]:
    """Which rows are held out where a dataset has one split: a fifth of the keys, always the same; equal keys go together."""
    distinct = list(dict.fromkeys(keys))
    held = {distinct[place] for place in permutation(0, Purpose.TASK, 2, len(distinct))[: -(-len(distinct) // 5)]}
    return [key in held for key in keys]


def read_splits(
    source: str, subset: str | None = None, texts: Sequence[str] = ()
) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Every split of a source by its name, each as a function that reads it; a single file is one split, 'train'.

    `subset` names one of several in a Hub dataset; `texts` are columns whose cells are texts in CSV files, even if they look
    like numbers. Raises `UserError` for a source that cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": lambda: _read_file(path, texts)}
    files = [file for file in sorted(path.iterdir()) if _kind(file)] if path.is_dir() else []
    if files and not any("-of-" in file.name for file in files):  # parts of a split are left to `datasets`
        return {Path(file.name.removesuffix(".gz")).stem: lambda file=file: _read_file(file, texts) for file in files}
    loaded = _loaded(source, **({"name": subset} if subset else {}))
    return {str(name): lambda part=part: _as_rows(part) for name, part in loaded.items()}


def _kind(file: Path) -> str | None:
    """Who reads a file, by its name; None: nobody."""
    suffix = Path(file.name.removesuffix(".gz")).suffix
    return "lines" if suffix == ".jsonl" else TABLES.get(suffix)


def _read_file(path: Path, texts: Sequence[str] = ()) -> list[dict[str, Any]]:
    kind = _kind(path)
    options: dict[str, Any] = {}
    if path.stat().st_size == 0:
        return []
    if kind not in TABLES.values():
        try:
            return read_jsonl(path)
        except UserError as error:
            if kind is None:  # nothing in its name says what it holds
                known = f"Files are told apart by how their names end ({KINDS}); this one was read as JSON lines."
                raise UserError(f"{error} {known}") from None
            raise
    if kind == "csv":  # an empty cell is an empty text, and 'NA' a word
        options = {"keep_default_na": False, "sep": "\t" if ".tsv" in path.suffixes else ","}
        options["converters"] = dict.fromkeys(texts, str)
    return _as_rows(_loaded(str(kind), str(path), data_files=str(path), split="train", **options))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, plain or gzip; a broken line is an error that names it."""
    try:
        with path.open("rb") as file:
            return [row for _, row in numbered_rows(file, str(path))]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None


def numbered_rows(file: io.BufferedReader, where: str) -> list[tuple[int, dict[str, Any]]]:
    """The objects of an open JSON-lines file, each with the number of its line; what is gzip tells by its first bytes.

    Lines that hold nothing are passed over; `where` names the file in errors.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    number = 0
    content = gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file
    lines = io.TextIOWrapper(content, encoding="utf-8-sig")
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                row: Any = json.loads(line)
                if not isinstance(row, dict):
                    raise UserError(f"{where}, line {number}: expected an object, found {type(row).__name__}.")
                rows.append((number, cast("dict[str, Any]", row)))
    except json.JSONDecodeError as error:
        raise UserError(f"{where}, line {number}: not valid JSON ({error.msg}): mend or remove the line.") from None
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{where}, after line {number}: cannot be decoded ({error}).") from None
    except RecursionError:
        raise UserError(f"{where}, line {number}: nested too deeply to be read: mend or remove the line.") from None
    finally:
        lines.detach()  # whoever opened the file closes it
    return rows


def _load_dataset(source: str, split: str) -> list[dict[str, Any]]:
    return _as_rows(_loaded(source, f"{source}', split '{split}", split=split))


def _loaded(builder: str, shown: str | None = None, **options: Any) -> Any:
    import datasets

    local, source = builder in TABLES.values() or Path(builder).expanduser().exists(), shown or builder
    try:
        with nullcontext() if local else asking_if_it_answers():
            return datasets.load_dataset(builder, **options)
    except Exception as error:  # every backend has errors of its own; all mean that the data cannot be had
        if "corresponds to no data" in str(error):
            return []
        first: BaseException = error
        while first.__cause__ is not None:  # "an error occurred" says nothing; what it came from does
            first = first.__cause__
        reason = why_not(builder, first) if not local else str(first).strip().partition("\n")[0] or type(first).__name__
        what_to_do = "mend the file" if Path(source).is_file() else f"give a Hub name, a folder, or a file ({KINDS})"
        raise UserError(f"data '{source}' cannot be loaded ({reason}): {what_to_do}.") from None


def _as_rows(dataset: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [dict(row) for row in dataset]


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """A file beside `path` to be written, which takes its place once it is whole; after an error nothing is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        with open(name, "w+b") as file:  # by its name, which those who write it may need
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: object) -> None:
    """A JSON file, atomically."""
    write_atomically(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it and make it again.") from None
