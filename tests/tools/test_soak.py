"""The soak run's verdict: what grows is told from what only varies."""

import importlib
import json
import math
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
RESULT = TOOLS.parent / "docs" / "results" / "soak" / "soak.json"


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("soak")


VALUES = {"memory_mb": 600.0, "handles": 9.0, "threads": 4.0, "seconds": 0.1, "cpu_seconds": 0.2}


def samples(soak: ModuleType, **changes: list[float]) -> object:
    flat = {name: [value] * 2000 for name, value in VALUES.items()}
    return soak.Samples(**{**flat, **changes})


def test_what_varies_without_growing_is_flat(soak: ModuleType) -> None:
    wave = [0.1 + 0.04 * math.sin(number / 7) + 0.5 * (number % 100 == 0) for number in range(2000)]
    slow = [0.1 if not 900 < number < 1100 else 0.3 for number in range(2000)]  # others used the machine
    start = [300.0 + min(number, 150) * 2 for number in range(2000)]  # memory that is taken once
    for change in ({"seconds": wave}, {"seconds": slow}, {"memory_mb": start}):
        assert soak.summarize(samples(soak, **change))["flat"], change.keys()


LEAKS = [
    ("memory_mb", 600.0, 0.008), ("handles", 9.0, 1 / 900), ("threads", 4.0, 1 / 900), ("seconds", 0.1, 7e-6),
    ("cpu_seconds", 0.2, 14e-6),
]  # fmt: skip


@pytest.mark.parametrize(("name", "first", "each"), LEAKS)
def test_what_grows_a_little_in_every_iteration_is_found(soak: ModuleType, name: str, first: float, each: float) -> None:
    leak = [first + (each * number if name not in ("handles", "threads") else int(each * number)) for number in range(2000)]
    found = soak.summarize(samples(soak, **{name: leak}))
    assert not found["flat"]
    assert [key for key, row in found["quantities"].items() if not row["flat"]] == [name]


def test_the_growth_is_the_median_slope_times_the_steps(soak: ModuleType) -> None:
    assert soak.total_growth([1.0, 2.0, 3.0]) == 2.0
    assert soak.total_growth([1.0, 1.0, 9.0, 1.0, 1.0]) == 0.0
    assert soak.total_growth([1.0]) == 0.0
    assert soak.block_medians([1.0, 2.0, 3.0, 9.0, 8.0, 7.0], 2) == [2.0, 8.0]


@pytest.mark.slow
def test_a_few_iterations_are_read_and_drawn(soak: ModuleType, tmp_path: Path) -> None:
    found = soak.run(5)
    assert len(found.seconds) == len(found.handles) == 5
    assert min(found.memory_mb) > 50
    assert min(found.threads) >= 1
    result = {"iterations": 5, "run_seconds": 1.0, **soak.summarize(found)}
    soak.draw(result, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 1000
    assert soak.printed(result).count("\n") == 5


def test_the_committed_run_is_whole_and_flat() -> None:
    result = json.loads(RESULT.read_text())
    assert result["iterations"] == 2000
    assert result["flat"]
    assert (RESULT.parent / "soak.png").is_file()
