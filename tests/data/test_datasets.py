"""Rows and files: what is read, the error messages, and atomic writes."""

import gzip
import json
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlgf.data import hub
from rlgf.data.datasets import read_rows
from rlgf.data.files import read_json, read_jsonl, write_file, write_json
from rlgf.errors import INPUT_ERRORS

ROWS = [{"text": "größer\n", "label": 1}, {"text": "", "label": 0}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def file_with(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_a_fifth_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    path = file_with(tmp_path / "any.jsonl", "".join(f'{{"text": "{number}"}}\n' for number in range(50)))
    train, held_out = (read_rows(str(path), split, ["text"]) for split in ("train", "test"))
    assert len(held_out) == 10
    assert sorted(int(row["text"]) for row in train + held_out) == list(range(50))
    assert held_out == read_rows(str(path), "test")
    assert len(read_rows(str(path), "unsup")) == 50


def test_a_folder_holds_a_file_for_each_split_plain_or_gzipped(tmp_path: Path) -> None:
    file_with(tmp_path / "train.jsonl", LINES)
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(LINES[: LINES.index("\n") + 1].encode()))
    assert read_rows(str(tmp_path), "train") == ROWS
    assert read_rows(str(tmp_path), "test") == ROWS[:1]


def test_blank_lines_and_a_missing_last_newline_are_no_rows(tmp_path: Path) -> None:
    assert read_jsonl(file_with(tmp_path / "a.jsonl", "\n" + LINES.rstrip("\n").replace("\n", "\n  \n"))) == ROWS


def test_a_home_folder_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file_with(tmp_path / "a.jsonl", LINES)
    assert read_rows("~/a.jsonl", "all") == ROWS


def test_a_missing_column_is_named_with_its_row_and_those_there_are(tmp_path: Path) -> None:
    path = file_with(tmp_path / "a.jsonl", LINES + '{"text": "no label"}\n')
    with pytest.raises(INPUT_ERRORS, match=r"a\.jsonl, line 3: there is no column 'label'; it has text\."):
        read_rows(str(path), "train", ["text", "label"])


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    for name, write in (("a.jsonl", lambda text: text.encode()), ("a.jsonl.gz", lambda text: gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(write(LINES + '{"text": \n'))
        with pytest.raises(INPUT_ERRORS, match=f"{name}, line 3: not valid JSON"):
            read_rows(str(tmp_path / name), "train")


def test_a_file_whose_name_says_nothing_is_refused_with_the_names_that_do(tmp_path: Path) -> None:
    path = file_with(tmp_path / "a.txt", "hello\n")
    with pytest.raises(INPUT_ERRORS, match=r"line 1: not valid JSON .* extension gives the format \(\.jsonl\[\.gz\], \.csv"):
        read_rows(str(path), "train")


def test_a_line_that_is_no_object_is_named(tmp_path: Path) -> None:
    path = file_with(tmp_path / "a.jsonl", LINES + "[1, 2]\n")
    with pytest.raises(INPUT_ERRORS, match="line 3: expected an object, found list"):
        read_rows(str(path), "train")


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    for content in ("", "\n\n"):
        path = file_with(tmp_path / "a.jsonl", content)
        with pytest.raises(INPUT_ERRORS, match=r"a\.jsonl holds no rows"):
            read_rows(str(path), "train")


@pytest.mark.parametrize("harm", ["cut short", "not gzip", "wrong text", "wrong stream"])
def test_a_file_that_cannot_be_decoded_is_refused(tmp_path: Path, harm: str) -> None:
    whole = gzip.compress("".join(json.dumps({"text": str(i)}) + "\n" for i in range(1000)).encode())
    damaged = bytearray(whole)
    damaged[20:60] = bytes(40)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(
        {
            "cut short": whole[: len(whole) // 2],
            "not gzip": b"plain text",
            "wrong text": gzip.compress(b'{"text": "\xff\xfe"}\n'),
            "wrong stream": bytes(damaged),
        }[harm]
    )
    with pytest.raises(INPUT_ERRORS, match=r"cannot be decoded|not valid JSON"):
        read_rows(str(path), "train")


def test_what_is_no_file_is_asked_of_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load_dataset(source: str, split: str) -> list[dict[str, Any]]:
        asked.append((source, split))
        return ROWS

    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, config=SimpleNamespace(HF_HUB_OFFLINE=True))
    )
    assert read_rows("someone/reviews", "validation", ["text"]) == ROWS
    assert asked == [("someone/reviews", "validation")]
    with pytest.raises(INPUT_ERRORS, match=r"someone/reviews \(validation\), row 1: there is no column 'title'"):
        read_rows("someone/reviews", "validation", ["title"])


def test_a_dataset_that_cannot_be_loaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(source: str, split: str) -> list[dict[str, Any]]:
        raise RuntimeError("no such thing\nand twenty more lines")

    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset, config=SimpleNamespace(HF_HUB_OFFLINE=True))
    )
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)
    with pytest.raises(INPUT_ERRORS) as caught:
        read_rows("someone/reviews", "train")
    assert str(caught.value) == (
        "data 'someone/reviews', split 'train' cannot be loaded (no such thing): "
        "give a Hub name, a folder, or a file (.jsonl[.gz], .csv, .tsv, .parquet or .json)."
    )
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    with pytest.raises(INPUT_ERRORS, match="there is no such file or folder, and the Hugging Face Hub is unreachable"):
        read_rows("someone/reviews", "train")
    with pytest.raises(INPUT_ERRORS, match=r"rows\.csv.* cannot be loaded \(there is no such file or folder\)"):
        read_rows("rows.csv", "train")


@pytest.mark.parametrize("name", ["./rows", "~/rows", "/rows", "a/b/c", "rows.csv", "data/rows.jsonl.gz"])
def test_a_name_that_the_hub_cannot_have_is_a_file(name: str) -> None:
    assert hub.is_local_name(name)


@pytest.mark.parametrize(
    "name", ["imdb", "stanfordnlp/imdb", "hf://datasets/stanfordnlp/imdb", "https://example.org/a/rows.csv"]
)
def test_other_names_may_be_the_hubs(name: str) -> None:
    assert not hub.is_local_name(name)


def test_no_name_is_too_odd_to_be_looked_for() -> None:
    assert not any(hub.path_exists(name) for name in ("~nobody-of-that-name/rows", "x" * 300 + ".jsonl"))


def test_a_file_is_written_whole_with_its_folders(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folders" / "a.txt"
    write_file(path, "größer")
    assert path.read_bytes() == "größer".encode()
    write_file(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert [each.name for each in path.parent.iterdir()] == ["a.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "a.txt"
    write_file(path, "old")

    def fail(*arguments: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, "fsync" if broken == "write" else "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["a.txt"]


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    value = {"größer": [1, 0.1, None, True, {"a": "b"}]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "größer" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_json_that_cannot_be_read_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(INPUT_ERRORS, match=r"missing\.json cannot be read"):
        read_json(tmp_path / "missing.json")
    with pytest.raises(INPUT_ERRORS, match=r"broken\.json cannot be read"):
        read_json(file_with(tmp_path / "broken.json", "{"))
    (tmp_path / "bytes.json").write_bytes(b"\xff")
    with pytest.raises(INPUT_ERRORS, match=r"bytes\.json cannot be read"):
        read_json(tmp_path / "bytes.json")


def test_tests_cannot_reach_the_network() -> None:
    with socket.socket() as outside, pytest.raises(ConnectionRefusedError, match="tests may not use the network"):
        outside.connect(("192.0.2.1", 80))
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())


def test_a_name_on_the_hub_may_have_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def load_dataset(name: str, **options: Any) -> list[dict[str, Any]]:
        asked.append((name, options))
        return [{"text": "a review"}]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_rows("owner/name@0123abc", "train") == [{"text": "a review"}]
    assert read_rows("owner/name", "train") == [{"text": "a review"}]
    assert asked == [("owner/name", {"split": "train", "revision": "0123abc"}), ("owner/name", {"split": "train"})]


def test_a_local_folder_may_have_an_at_sign(tmp_path: Path) -> None:
    folder = tmp_path / "rows@home"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n')
    assert read_rows(str(folder), "train") == [{"text": "a"}]
