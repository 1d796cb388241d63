"""Rows of JSON files.

They are read here, not by `datasets`, whose reader falls back to pandas: that turns columns named
like dates and texts of digits into dates and numbers, and refuses NaN.
"""

import json
from collections.abc import Mapping
from typing import Any, cast

from rlgf.data.tables.text import Rows
from rlgf.errors import DataError


class DuplicateKeyError(ValueError):
    """A JSON object with a repeated key, whose first value parsers drop."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's keys and values as a dict; raise if a key repeats."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for place, key in enumerate(keys) if key in keys[:place])
        raise DuplicateKeyError(f"the key '{twice[:60]}' occurs twice")
    return found


def parse_json(text: str, where: str, line: int | None = None) -> Any:
    """Return the value of a JSON text; raise `DataError` with the line of a fault.

    `line` is the number of the only line of the text.
    """
    place = where if line is None else f"{where}, line {line}"
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        number = error.lineno if line is None else line
        raise DataError(f"{where}, line {number}: not valid JSON ({error.msg}): fix or remove the line.") from None
    except DuplicateKeyError as error:
        raise DataError(f"{place}: {error} in one object: rename one.") from None
    except ValueError:  # of a whole number
        raise DataError(f"{place}: has a number of thousands of digits: fix or remove it.") from None
    except RecursionError:
        raise DataError(f"{place}: nested too deeply to be read: fix or remove the row.") from None


def is_json_lines(text: str) -> bool:
    """Return whether a text is one JSON object per line, not one JSON value."""
    start = text.lstrip()
    try:
        _, end = json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        first = start.partition("\n")[0].strip()
        return first.startswith("{") and first.endswith("}")
    return bool(start[end:].strip())


def rows_of(value: Any, where: str) -> Rows:
    """Return the rows in the value of a JSON file.

    It is a list of objects; an object with such a list; one with a list (or pandas' mapping of row
    numbers) per column; or one row.
    """
    if isinstance(value, Mapping):
        value = _from_object(cast("Mapping[str, Any]", value), where)
    if not isinstance(value, list):
        raise DataError(f"{where} holds {type(value).__name__}, but must hold a list of objects: write one object per row.")
    for number, row in enumerate(cast("list[Any]", value), 1):
        if not isinstance(row, dict):
            raise DataError(f"{where}, row {number}: expected an object, found {type(row).__name__}.")
    return Rows(cast("list[dict[str, Any]]", value))


def _from_object(value: Mapping[str, Any], where: str) -> list[Any]:
    parts = list(value.values())
    lists = [part for part in parts if isinstance(part, list) and part and all(isinstance(row, dict) for row in part)]
    if len(lists) == 1 and not all(isinstance(part, list) for part in parts if part is not lists[0]):
        return lists[0]
    if len(parts) == 1 and lists:
        return lists[0]
    if len(lists) > 1:
        raise DataError(f"{where} holds several lists of rows ({', '.join(value)}): write each to a file of its own.")
    if parts and all(isinstance(part, list) for part in parts):
        if len({len(part) for part in parts}) > 1:
            raise DataError(f"{where} holds columns of different lengths ({', '.join(value)}): write one object per row.")
        return [dict(zip(value, cells)) for cells in zip(*parts)]
    if parts and all(isinstance(part, Mapping) for part in parts) and len({tuple(part) for part in parts}) == 1:
        return [{name: part[key] for name, part in value.items()} for key in parts[0]]
    return [dict(value)]
