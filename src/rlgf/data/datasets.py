"""Rows of a dataset, from a Hub name, a local folder or a file.

Parquet, Arrow, folders of `save_to_disk` and the Hub are read by `datasets` and `pyarrow`. Texts
(JSON lines, JSON, CSV, TSV) are read in `rlgf.data.tables`, which says why.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rlgf.data.conversations.messages import without_nulls
from rlgf.data.files import parse_json_lines, read_jsonl
from rlgf.data.hub import load_failure_reason, offline_if_unreachable
from rlgf.data.tables.delimited import read_delimited
from rlgf.data.tables.json_file import is_json_lines, parse_json, rows_of
from rlgf.data.tables.text import Rows, decode, missing_as_none, places_of
from rlgf.errors import DataError, list_columns
from rlgf.randomness import Purpose, permutation

# file suffix -> format
FORMATS = {
    ".jsonl": "lines", ".ndjson": "lines", ".csv": "delimited", ".tsv": "delimited", ".json": "json",
    ".parquet": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
COMPRESSED = (".gz", ".bz2", ".xz")
KINDS = ".jsonl[.gz], .csv, .tsv, .parquet or .json"
# files of a folder that describe its data
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json", "package.json")
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}(-\w+)?$")


def read_rows(source: str, split: str, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Load the rows of one split.

    A Hub name may end with `@REVISION`. A local folder has one or several files per split, or is
    one of `datasets` (`save_to_disk`, or a clone from the Hub). A single file is JSON lines, JSON,
    CSV, TSV, Parquet or Arrow: a fifth of it, always the same rows, is the split 'test', the rest
    is 'train', and any other split is the whole file.

    Raises `DataError` for a source that cannot be read, has a broken line, lacks a column or holds
    no row.
    """
    path = Path(source).expanduser()
    candidates = [path] if path.is_file() else [path / f"{split}.jsonl", path / f"{split}.jsonl.gz"]
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found:
        rows = read_file(found, columns)
    else:
        part = _folder_splits(path, None, columns, None).get(split) if path.is_dir() else None
        rows = part() if part is not None else _load_dataset(source, split, columns)
    where = str(found or f"{source} ({split})")
    if not rows:
        raise DataError(f"{where} holds no rows: give a dataset with at least one.")
    for column in columns:
        for place, row in zip(places_of(rows), rows):
            if column not in row:
                raise DataError(f"{where}, {place}: there is no column '{column}'; it has {list_columns(row)}.")
    return _part_of_file(rows, split) if path.is_file() else rows


def _part_of_file(rows: Rows, split: str) -> Rows:
    if split not in ("train", "test"):
        return rows
    return rows.part([held == (split == "test") for held in held_out_keys(range(len(rows)))])


def held_out_keys(keys: Sequence[Hashable]) -> list[bool]:
    """Return for each row whether it is held out from a dataset with one split.

    A fifth of the distinct keys is held out, always the same; rows with equal keys stay together.
    """
    distinct = list(dict.fromkeys(keys))
    held = {distinct[place] for place in permutation(0, Purpose.TASK, 2, len(distinct))[: -(-len(distinct) // 5)]}
    return [key in held for key in keys]


def read_splits(
    source: str, subset: str | None = None, texts: Sequence[str] = (), encoding: str | None = None
) -> dict[str, Callable[[], Rows]]:
    """Return the splits of a source: functions that load the rows, by name.

    A single file is one split, 'train'. `subset` names one of several in a Hub dataset. `texts` are
    columns of texts, messages or tools: cells of CSV files there are texts even if they look like
    numbers, NaN is a missing text, and fields of messages that Arrow added are removed. `encoding`
    is that of text files which are not UTF-8.

    Raises `DataError` for a source that cannot be read.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return {"train": lambda: read_file(path, texts, encoding)}
    if path.is_dir():
        return _folder_splits(path, subset, texts, encoding)
    return _splits_of(_load(source, **({"name": subset} if subset else {})), texts)


def describe_source(source: str) -> str:
    """Return a source's name, with the kind of its folder if `datasets` wrote it."""
    is_saved = _is_saved(Path(source).expanduser())
    return f"{source} (a folder of save_to_disk)" if is_saved else source


def _is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` of `datasets` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _folder_splits(
    folder: Path, subset: str | None, texts: Sequence[str], encoding: str | None
) -> dict[str, Callable[[], Rows]]:
    """Return the splits of a folder: of `save_to_disk`, of files, or as `datasets` finds them."""
    if _is_saved(folder):
        return _splits_of(_load_saved(folder), texts)
    groups = _group_files(folder) or _group_files(folder / "data")
    if groups and not subset:
        return {
            split: lambda files=files: _concatenate([read_file(file, texts, encoding) for file in files])
            for split, files in groups.items()
        }
    return _splits_of(_load(str(folder), **({"name": subset} if subset else {})), texts)


def _group_files(folder: Path) -> dict[str, list[Path]]:
    """Return the data files of a folder by split, shards in order."""
    groups: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not file.is_file() or not _file_format(file) or file.name in DESCRIPTIONS or file.name.startswith("."):
            continue
        stem = Path(_uncompressed(file.name)).stem
        shard = SHARD.match(stem)
        split = shard.group(1) if shard else stem
        if split in groups and not shard:
            raise DataError(
                f"{folder} has two files for the split '{split}' ({groups[split][0].name}, {file.name}): remove one."
            )
        groups.setdefault(split, []).append(file)
    return groups


def _concatenate(parts: Sequence[Rows]) -> Rows:
    return parts[0] if len(parts) == 1 else Rows([row for part in parts for row in part])


def _splits_of(loaded: Any, texts: Sequence[str]) -> dict[str, Callable[[], Rows]]:
    """Return the splits of what `datasets` loaded; a dataset without splits is 'train'."""
    parts = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    return {str(name): lambda part=part: _as_rows(part, texts) for name, part in parts.items()}


def _uncompressed(name: str) -> str:
    return next((name.removesuffix(suffix) for suffix in COMPRESSED if name.endswith(suffix)), name)


def _file_format(file: Path) -> str | None:
    """Return one of the `FORMATS`, or None (unknown) for a file name."""
    return FORMATS.get(Path(_uncompressed(file.name)).suffix.lower())


def read_file(path: Path, texts: Sequence[str] = (), encoding: str | None = None) -> Rows:
    """Load the rows of a file; `texts` and `encoding` are those of `read_splits`."""
    kind = _file_format(path)
    if path.stat().st_size == 0:
        return Rows()
    if kind == "parquet":
        return _as_rows(_load("parquet", str(path), data_files=str(path), split="train"), texts)
    if kind == "arrow":
        return _as_rows(_read_arrow(path), texts)
    if kind in ("delimited", "json"):
        text = decode(_bytes_of(path), str(path), encoding)
        if kind == "delimited":
            delimiter = "\t" if Path(_uncompressed(path.name)).suffix.lower() == ".tsv" else None
            return read_delimited(text, str(path), delimiter, texts)
        if not is_json_lines(text):
            return missing_as_none(rows_of(parse_json(text, str(path)), str(path)), texts)
        numbered = parse_json_lines(text, str(path))
        return missing_as_none(Rows([row for _, row in numbered], [number for number, _ in numbered]), texts)
    try:
        return missing_as_none(read_jsonl(path, encoding), texts)
    except DataError as error:
        if kind is None:  # the name does not tell the format
            known = f"The file extension gives the format ({KINDS}); this file was read as JSON lines."
            raise DataError(f"{error} {known}") from None
        raise


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read_arrow(path: Path) -> list[dict[str, Any]]:
    """Load the rows of an Arrow file, in either of its two formats."""
    import pyarrow as pa

    failures: list[Exception] = []
    for open_file in (pa.ipc.open_file, pa.ipc.open_stream):
        try:
            with pa.OSFile(str(path)) as file:
                return open_file(file).read_all().to_pylist()
        except (pa.ArrowInvalid, OSError) as error:
            failures.append(error)
    reason = str(failures[-1]).partition("\n")[0]
    raise DataError(f"data '{path}' cannot be loaded ({reason}): fix the file.")


def _load_saved(folder: Path) -> Any:
    """Load a folder that `save_to_disk` of `datasets` wrote."""
    import datasets

    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # each backend raises errors of its own
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DataError(f"data '{folder}', a folder of save_to_disk, cannot be loaded ({reason}): write it again.") from None


def _load_dataset(source: str, split: str, texts: Sequence[str]) -> Rows:
    return _as_rows(_load(source, f"{source}', split '{split}", split=split), texts)


def _load(builder: str, shown: str | None = None, **options: Any) -> Any:
    import datasets

    local, source = builder == "parquet" or Path(builder).expanduser().exists(), shown or builder
    name, _, revision = (builder, "", "") if local else builder.partition("@")
    options |= {"revision": revision} if revision else {}
    try:
        with nullcontext() if local else offline_if_unreachable():
            return datasets.load_dataset(name, **options)
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


def _as_rows(dataset: Iterable[Mapping[str, Any]], texts: Sequence[str]) -> Rows:
    """Return the rows of an Arrow table, without the nulls that it added."""
    rows = Rows(list(dataset))
    for row in rows:
        row.update({name: without_nulls(row[name]) for name in texts if isinstance(row.get(name), (list, dict))})
    return missing_as_none(rows, texts)
