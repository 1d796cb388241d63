"""Logs of a run: every line has its check, and damage costs no whole line."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlgf.data.files import read_complete_lines, to_checked_line, to_line
from rlgf.runs.logs import amend_row, append_rows, drop_lines_after, missing_iterations, read_rows

ROWS: list[dict[str, Any]] = [
    {"iteration": 0, "text": "a\x85b\u2028c\u2029d\re\nf", "score": 0.1},
    {"iteration": 0, "text": "naïve 中文 \udc80", "score": float("nan")},
    {"iteration": 1, "text": '"}, "crc32": "00000000"}', "score": 1e-300},
    {"iteration": 2, "text": "", "score": None},
]
READ = [{**row, "score": None if row["score"] != row["score"] else row["score"]} for row in ROWS]  # NaN becomes null


def fail(line: str) -> None:
    pytest.fail(line)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    for row in ROWS:
        append_rows(path, [row])
    return path


def test_a_log_is_json_lines_whose_last_entry_is_the_check(log: Path) -> None:
    lines = log.read_bytes().decode().split("\n")  # UTF-8, whatever the text was
    assert lines.pop() == ""
    for line, row in zip(lines, READ, strict=True):
        assert list(json.loads(line)) == [*row, "crc32"]
    assert read_rows(log, fail) == read_complete_lines(log) == READ


def test_no_flipped_bit_is_read_as_another_row(log: Path) -> None:
    content = log.read_bytes()
    for place in range(len(content)):
        flipped = content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]
        log.write_bytes(flipped)
        warnings = list[str]()
        rows = read_rows(log, warnings.append)
        assert all(row in READ for row in rows), place
        assert len(rows) >= len(READ) - 2  # a flipped line end damages two lines
        assert len(rows) == len(READ) or warnings


def test_a_line_without_a_check_counts_only_where_it_may(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text(to_line(READ[3]))
    assert read_rows(path, fail, needs_check=False) == [READ[3]]
    warnings = list[str]()
    assert read_rows(path, warnings.append) == []
    assert warnings == [f"{path}: 1 damaged or incomplete line is left out"]


def test_lines_of_iterations_that_run_again_are_dropped(log: Path) -> None:
    whole = log.read_bytes()
    assert drop_lines_after(log, 3, fail) == {0, 1, 2}
    assert log.read_bytes() == whole
    assert drop_lines_after(log, 1, fail) == {0}
    assert read_rows(log, fail) == READ[:2]
    assert drop_lines_after(log, 0, fail) == set()
    assert log.read_bytes() == b""
    assert sorted(path.name for path in log.parent.iterdir()) == [log.name]


TORN = to_checked_line(READ[3])[:-20]


@pytest.mark.parametrize(
    "tail", [TORN, b"\0" * 5000, TORN + b"\0" * 100, b"\xff\xfe not UTF-8", b"[1, 2]\n", b"{" * 9999 + b"\n"]
)
def test_a_damaged_end_is_cut_off_behind_the_last_whole_line_and_kept_beside(log: Path, tail: bytes) -> None:
    whole, warnings = log.read_bytes(), list[str]()
    log.write_bytes(whole + tail)
    assert drop_lines_after(log, 3, warnings.append) == {0, 1, 2}
    assert log.read_bytes() == whole
    aside = log.with_name("metrics.jsonl.damaged-1")
    assert aside.read_bytes() == tail.rstrip(b"\n")
    assert warnings == [f"{log} has {len(aside.read_bytes()):,} bytes that are no usable lines: they are in {aside.name} now"]
    append_rows(log, [READ[3]])
    assert read_rows(log, fail) == [*READ, READ[3]]


def test_a_torn_middle_costs_no_line_behind_it(log: Path) -> None:
    lines, warnings = log.read_bytes().split(b"\n"), list[str]()
    log.write_bytes(b"\n".join([lines[0], lines[1][:30], b"\0\0\0", lines[2], lines[3], b"{}"]))
    log.with_name("metrics.jsonl.damaged-1").write_text("of an earlier time")
    assert drop_lines_after(log, 2, warnings.append) == {0, 1}
    assert read_rows(log, fail) == [READ[0], READ[2]]
    assert log.with_name("metrics.jsonl.damaged-1").read_text() == "of an earlier time"
    assert log.with_name("metrics.jsonl.damaged-2").read_bytes() == b"\n".join([lines[1][:30], b"\0\0\0", b"{}"])
    assert len(warnings) == 1


def test_missing_iterations_are_named() -> None:
    assert missing_iterations({0, 1, 2}, 3) is None
    assert missing_iterations({0, 2}, 4) == "1, 3"
    assert missing_iterations(set(), 9) == "0, 1, 2, 3, 4 and 4 more"


def test_a_row_is_amended_and_the_others_stay(log: Path) -> None:
    amend_row(log, 1, lambda row: {**row, "evaluation": {"score": 1.0}}, fail)
    assert read_rows(log, fail) == [*READ[:2], {**READ[2], "evaluation": {"score": 1.0}}, READ[3]]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_leaves_the_log_as_it_was_and_names_it(log: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    whole, write = log.read_bytes(), os.write

    def write_half(handle: int, content: bytes) -> int:
        if len(content) < 50:
            raise OSError(number, os.strerror(number))
        return write(handle, content[: len(content) // 2])

    monkeypatch.setattr(os, "write", write_half)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        append_rows(log, ROWS)
    monkeypatch.setattr(os, "write", write)
    assert caught.value.filename == str(log)
    assert log.read_bytes() == whole


@pytest.mark.parametrize("number", [True, -5, 1.0, "1", None, [1]])
def test_lines_without_a_whole_iteration_are_kept_beside(log: Path, number: object) -> None:
    whole, warnings = log.read_bytes(), list[str]()
    append_rows(log, [{"iteration": number}, {"x": 1}])
    assert drop_lines_after(log, 3, warnings.append) == {0, 1, 2}
    assert log.read_bytes() == whole
    assert len(warnings) == 1


def test_metrics_have_their_key_and_one_line_for_each_iteration(tmp_path: Path) -> None:
    path, warnings = tmp_path / "metrics.jsonl", list[str]()
    rows = [{"iteration": 0, "seconds": 1.5}, {"iteration": 1, "seconds": None}]
    others = [
        {"iteration": 0, "seconds": 2.0},
        {"iteration": 2},
        {"iteration": 2, "seconds": "1"},
        {"iteration": 2, "seconds": True},
    ]
    append_rows(path, [rows[0], *others, rows[1]])
    assert drop_lines_after(path, 3, warnings.append, "seconds") == {0, 1}
    assert [{key: row[key] for key in ("iteration", "seconds")} for row in read_rows(path, fail)] == rows
    assert len(warnings) == 1
    assert path.with_name("metrics.jsonl.damaged-1").read_bytes().count(b"iteration") == len(others)
