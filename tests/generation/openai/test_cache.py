"""The cache of responses: rows with checksums, and files that cannot be used."""

import json
import sqlite3
import zlib
from pathlib import Path
from typing import Any

import pytest

from rlgf.errors import ConfigError, TrainingError
from rlgf.generation.openai.cache import ResponseCache

RESPONSE = {"text": " superb acting", "finished": True}


def fail(line: str) -> None:
    pytest.fail(line)


def rows_of(path: Path) -> dict[str, Any]:
    with sqlite3.connect(path) as database:
        found = dict(database.execute("SELECT key, response FROM responses").fetchall())
    database.close()
    return found


def change(path: Path, statement: str, *values: object) -> None:
    with sqlite3.connect(path) as database:
        database.execute(statement, values)
    database.close()


def test_a_response_is_kept_as_it_was(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "a.sqlite", report=fail)
    assert cache.put("key", RESPONSE)
    assert not cache.put("key", {"text": " dull", "finished": True})
    assert cache.get("key") == RESPONSE
    assert ResponseCache(tmp_path / "a.sqlite", report=fail).get("key") == RESPONSE
    assert cache.get("another") is None


@pytest.mark.parametrize("place", range(len(json.dumps(RESPONSE))))
def test_a_changed_response_is_not_used_but_kept_and_asked_for_again(tmp_path: Path, place: int) -> None:
    path, lines = tmp_path / "a.sqlite", list[str]()
    cache = ResponseCache(path, report=lines.append)
    cache.put("key", RESPONSE)
    text = json.dumps(RESPONSE)
    damaged = text[:place] + chr(ord(text[place]) ^ 1) + text[place + 1 :]
    change(path, "UPDATE responses SET response = ?", damaged)
    assert cache.get("key") is None
    assert lines == [f"warning: a response in the guide's cache {path} is damaged: it is requested again"]
    assert list(rows_of(path).values()) == [damaged]
    assert cache.put("key", RESPONSE)
    assert cache.get("key") == RESPONSE


@pytest.mark.parametrize(
    "row", ["", "[]", "null", '"text"', '{"text": 3, "finished": true}', '{"text": "a"}', "{}", '{"took": []}', b"\xff", 3]
)
def test_a_row_of_another_shape_counts_as_damaged(tmp_path: Path, row: object) -> None:
    path, lines = tmp_path / "a.sqlite", list[str]()
    cache = ResponseCache(path, report=lines.append)
    text = row.decode("latin-1") if isinstance(row, bytes) else str(row)
    change(path, "INSERT INTO responses VALUES (?, ?, ?)", "key", row, zlib.crc32(f"key {text}".encode()))
    assert cache.get("key") is None
    assert len(lines) == 1


def test_a_cache_of_an_earlier_rlgf_is_refused_in_one_sentence(tmp_path: Path) -> None:
    change(tmp_path / "a.sqlite", "CREATE TABLE answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
    with pytest.raises(ConfigError, match=r"^the guide's cache .*a\.sqlite is of an earlier rlgf: choose another guide\."):
        ResponseCache(tmp_path / "a.sqlite")


def test_a_full_disk_is_one_sentence_and_loses_no_response(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "a.sqlite", "judge", report=fail)
    cache.put("key", RESPONSE)
    cache._run("PRAGMA max_page_count = 1")  # as on a full disk  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(TrainingError, match=r"^the judge's cache .*a\.sqlite cannot be used \(database or disk is full\): "):
        cache.put("large", {"text": "x" * 100_000, "finished": True})
    assert cache.get("key") == RESPONSE


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + b"\0" * 5000])
def test_a_file_that_is_no_cache_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.sqlite").write_bytes(content)
    with pytest.raises(ConfigError, match=r"the guide's cache .* cannot be opened .*choose another guide.endpoint.cache"):
        ResponseCache(tmp_path / "a.sqlite")


def test_a_table_of_another_program_is_refused(tmp_path: Path) -> None:
    change(tmp_path / "a.sqlite", "CREATE TABLE responses (question TEXT)")
    with pytest.raises(ConfigError, match="cannot be opened"):
        ResponseCache(tmp_path / "a.sqlite")
