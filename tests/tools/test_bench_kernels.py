"""The benchmark of the fast paths: turns, a run that goes on, and its numbers; workers are faked."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from bench import kernels
from bench.workload import WORKLOADS

SECONDS = {"native": 4.0, "torch": 5.0, "off": 8.0, "attention": 4.4}
COUNTS = WORKLOADS["S"].expected


class FakeWorker:
    """Takes the same time in every turn, and notes whose turn it was."""

    turns: list[str] = []  # noqa: RUF012
    dies_after = 10**6

    def __init__(self, name: str, command: Sequence[str], threads: int, log: Path) -> None:
        self.name, self.options = name, list(command[-2:])
        paths = {"paths": ["attention", "products"], "unused": {"products": "no library"}} if name == "native" else {}
        self.about = {"cpu_capability": "AVX2", "versions": {"torch": "2"}, "options": self.options, **paths}

    def turn(self) -> dict[str, Any]:
        if len(self.turns) >= FakeWorker.dies_after:
            raise SystemExit("killed")
        self.turns.append(self.name)
        return {
            "seconds": SECONDS[self.name], "cpu_seconds": 2 * SECONDS[self.name], "stages": {"rollout": 1.0},
            "counts": COUNTS, "peak_rss_mb": 1.0,
        }  # fmt: skip

    def close(self) -> None:
        pass


@pytest.fixture
def arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    monkeypatch.setattr(kernels, "Worker", FakeWorker)
    monkeypatch.setattr(kernels, "commit", lambda: "abc")
    monkeypatch.setattr(kernels.subprocess, "run", lambda *args, **options: None)  # the workload's files
    monkeypatch.setattr(FakeWorker, "turns", [])
    monkeypatch.setattr(FakeWorker, "dies_after", 10**6)
    return argparse.Namespace(work=tmp_path, rounds=3, threads=2, quick=False)


FORWARD = ["off", "torch", "native", "attention"]


def test_sides_take_turns_in_alternating_order(arguments: argparse.Namespace) -> None:
    found = kernels.measure("S", arguments)
    assert FakeWorker.turns == [*FORWARD, *FORWARD, *FORWARD[::-1], *FORWARD]  # the first ones warm up
    assert len(found.turns) == 3
    told = {side: about["options"] for side, about in found.about.items()}
    assert told["off"] == ["--kernels", "off"]
    assert told["attention"] == ["--without", "attention"]


def test_a_killed_run_goes_on_after_its_last_whole_round(
    arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeWorker, "dies_after", 10)  # in the second round
    with pytest.raises(SystemExit):
        kernels.measure("S", arguments)
    path = arguments.work / "S" / "rounds.jsonl"
    path.write_text(path.read_text() + '{"off": {"sec')  # killed while it wrote
    FakeWorker.turns.clear()
    monkeypatch.setattr(FakeWorker, "dies_after", 10**6)
    found = kernels.measure("S", arguments)
    assert FakeWorker.turns == [*FORWARD, *FORWARD[::-1], *FORWARD]
    assert [list(turn) for turn in found.turns] == [FORWARD, FORWARD[::-1], FORWARD]
    assert len(path.read_text().splitlines()) == 4
    FakeWorker.turns.clear()
    assert kernels.measure("S", arguments).turns == found.turns
    assert FakeWorker.turns == []


def test_rounds_of_other_code_are_dropped(arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.measure("S", arguments)
    monkeypatch.setattr(kernels, "commit", lambda: "def")
    FakeWorker.turns.clear()
    kernels.measure("S", arguments)
    assert len(FakeWorker.turns) == 4 * 4


def test_other_work_is_not_reported(arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COUNTS, "tokens_generated", 0)
    with pytest.raises(SystemExit, match="other work"):
        kernels.measure("S", arguments)


def test_a_result_says_what_each_path_saves(arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    result = kernels.result_of({"S": kernels.measure("S", arguments)}, arguments)
    sides = json.loads(json.dumps(result))["workloads"]["S"]["sides"]
    assert {side: figures["ratio"]["median"] for side, figures in sides.items()} == {
        "off": 2.0, "torch": 1.25, "native": 1.0, "attention": pytest.approx(1.1),
    }  # fmt: skip
    assert sides["off"]["saved"] == {"median": 0.5, "interval": [0.5, 0.5]}
    assert sides["off"]["rounds"] == [8.0] * 3
    monkeypatch.setitem(result["machine"], "processor", "Some CPU")
    result["machine"] |= {"cpu_family": "25", "cpu_model": "1"}
    assert kernels.markdown([result]).splitlines() == [
        "| fast path | Some CPU (25/1), S |",
        "| --- | --- |",
        "| all of them | 50.0 % [50.0, 50.0] |",
        "| all C kernels | 20.0 % [20.0, 20.0] |",
        "| `attention` | 9.1 % [9.1, 9.1] |",
        "| `products` | – |",
    ]
    assert "products is left out: no library" in kernels.printed(result)


def test_the_interval_is_that_of_the_median() -> None:
    low, high = kernels.interval([1.0, 1.1, 1.2, 1.3, 9.0])
    assert 1.0 <= low < 1.2 < high <= 9.0
    assert kernels.interval([2.0, 2.0]) == (2.0, 2.0)
    assert kernels.interval([1.0, 2.0, 3.0]) == kernels.interval([1.0, 2.0, 3.0])
