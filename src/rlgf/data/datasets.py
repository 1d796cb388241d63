"""Rows of a dataset, from a Hub name, a local folder or a file."""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rlgf.data.files import read_jsonl
from rlgf.data.hub import load_failure_reason, offline_if_unreachable
from rlgf.errors import DataError, list_columns
from rlgf.randomness import Purpose, permutation

# file suffix -> builder of `datasets`
TABLES = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".json": "json"}
KINDS = ".jsonl[.gz], .csv, .tsv, .parquet or .json"


def read_rows(source: str, split: str, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Load the rows of one split.

    A local folder holds `SPLIT.jsonl[.gz]`, or anything `datasets.load_dataset` reads. A single
    file is JSON lines, CSV, TSV, Parquet or JSON: a fifth of it, always the same rows, is the split
    'test', the rest is 'train', and any other split is the whole file.

    Raises `ConfigError` for a source that cannot be read, has a broken line, lacks a column or
    holds no row.
    """
    path = Path(source).expanduser()
    candidates = [path] if path.is_file() else [path / f"{split}.jsonl", path / f"{split}.jsonl.gz"]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    rows = _read_file(found) if found else _load_dataset(source, split)
    where = str(found or f"{source} ({split})")
    if not rows:
        raise DataError(f"{where} holds no rows: give a dataset with at least one.")
    for column in columns:
        for number, row in enumerate(rows, 1):
            if column not in row:
                raise DataError(f"{where}, row {number}: there is no column '{column}'; it has {list_columns(row)}.")
    return _part_of_file(rows, split) if path.is_file() else rows


def _part_of_file(rows: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    if split not in ("train", "test"):
        return rows
    return [row for row, held in zip(rows, held_out_keys(range(len(rows)))) if held == (split == "test")]


def held_out_keys(keys: Sequence[Hashable]) -> list[bool]:
    """Return for each row whether it is held out from a dataset with one split.

    A fifth of the distinct keys is held out, always the same; rows with equal keys stay together.
    """
    distinct = list(dict.fromkeys(keys))
    held = {distinct[place] for place in permutation(0, Purpose.TASK, 2, len(distinct))[: -(-len(distinct) // 5)]}
    return [key in held for key in keys]


def read_splits(
    source: str, subset: str | None = None, texts: Sequence[str] = ()
) -> dict[str, Callable[[], list[dict[str, Any]]]]:
    """Return the splits of a source by name, each as a function that loads its rows.

    A single file is one split, 'train'. `subset` names one of several in a Hub dataset. `texts` are
    columns of CSV files whose cells are texts, even if they look like numbers.

    Raises `ConfigError` for a source that cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": lambda: _read_file(path, texts)}
    files = [file for file in sorted(path.iterdir()) if _file_format(file)] if path.is_dir() else []
    # `datasets` joins the shards of a split
    if files and not any("-of-" in file.name for file in files):
        return {Path(file.name.removesuffix(".gz")).stem: lambda file=file: _read_file(file, texts) for file in files}
    loaded = _load(source, **({"name": subset} if subset else {}))
    return {str(name): lambda part=part: _as_rows(part) for name, part in loaded.items()}


def _file_format(file: Path) -> str | None:
    """Return "lines", a builder of `datasets`, or None (unknown) for a file name."""
    suffix = Path(file.name.removesuffix(".gz")).suffix
    return "lines" if suffix == ".jsonl" else TABLES.get(suffix)


def _read_file(path: Path, texts: Sequence[str] = ()) -> list[dict[str, Any]]:
    kind = _file_format(path)
    options: dict[str, Any] = {}
    if path.stat().st_size == 0:
        return []
    if kind not in TABLES.values():
        try:
            return read_jsonl(path)
        except DataError as error:
            if kind is None:  # the name does not tell the format
                known = f"The file extension gives the format ({KINDS}); this file was read as JSON lines."
                raise DataError(f"{error} {known}") from None
            raise
    if kind == "csv":  # an empty cell is an empty text, and 'NA' is a word
        options = {"keep_default_na": False, "sep": "\t" if ".tsv" in path.suffixes else ","}
        options["converters"] = dict.fromkeys(texts, str)
    return _as_rows(_load(str(kind), str(path), data_files=str(path), split="train", **options))


def _load_dataset(source: str, split: str) -> list[dict[str, Any]]:
    return _as_rows(_load(source, f"{source}', split '{split}", split=split))


def _load(builder: str, shown: str | None = None, **options: Any) -> Any:
    import datasets

    local, source = builder in TABLES.values() or Path(builder).expanduser().exists(), shown or builder
    try:
        with nullcontext() if local else offline_if_unreachable():
            return datasets.load_dataset(builder, **options)
    # each backend raises errors of its own; all mean that the data cannot be loaded
    except Exception as error:
        if "corresponds to no data" in str(error):
            return []
        first: BaseException = error
        # `datasets` wraps the cause in "an error occurred"
        while first.__cause__ is not None:
            first = first.__cause__
        reason = (
            load_failure_reason(builder, first) if not local else str(first).strip().partition("\n")[0] or type(first).__name__
        )
        what_to_do = "fix the file" if Path(source).is_file() else f"give a Hub name, a folder, or a file ({KINDS})"
        raise DataError(f"data '{source}' cannot be loaded ({reason}): {what_to_do}.") from None


def _as_rows(dataset: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [dict(row) for row in dataset]
