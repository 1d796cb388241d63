"""The store of SPICE's parses, without Java: what is damaged is parsed again."""

import sqlite3
from pathlib import Path

import pytest

from rlgf.text_metrics.worker import ParseStore

PARSES = [("a red car", [["car"], ["car", "red"]])]


def test_parses_are_read_as_they_were_written(tmp_path: Path) -> None:
    store = ParseStore(tmp_path / "parses.sqlite")
    store.write(PARSES)
    assert store.read(["a red car", "a blue car"]) == PARSES
    store.database.close()


@pytest.mark.parametrize("stored", ['[["car"], ["car", "fed"]] ', "", "null", '[["car"]]', b"\xff", 3])
def test_a_damaged_parse_is_missing_until_it_is_written_again(tmp_path: Path, stored: object) -> None:
    store = ParseStore(tmp_path / "parses.sqlite")
    store.write(PARSES)
    (whole,) = store.database.execute("SELECT parse FROM parses").fetchone()
    with store.database:
        damaged = stored + whole.rpartition(" ")[2] if isinstance(stored, str) and stored.endswith(" ") else stored
        store.database.execute("UPDATE parses SET parse = ?", (damaged,))
    assert store.read(["a red car"]) == []
    store.write(PARSES)
    assert store.read(["a red car"]) == PARSES
    store.database.close()


def test_parses_of_an_earlier_version_are_made_again(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "parses.sqlite") as database:
        database.execute("CREATE TABLE parses (text TEXT PRIMARY KEY, parse TEXT NOT NULL) WITHOUT ROWID")
        database.execute("INSERT INTO parses VALUES (?, ?)", ("a red car", '[["car"]]'))
    database.close()
    store = ParseStore(tmp_path / "parses.sqlite")
    assert store.read(["a red car"]) == []
    store.database.close()
