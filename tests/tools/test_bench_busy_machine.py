"""The benchmark of a busy machine: its pairs and its numbers; the sides are faked."""

from typing import Any

import pytest
from bench import busy_machine


class FakeSide:
    """Takes a second alone and twice as long next to a busy process."""

    def __init__(self) -> None:
        self.is_busy, self.calls = False, list[bool]()

    def iterate(self, count: int) -> float:
        self.calls.append(self.is_busy)
        return 2.0 if self.is_busy else 1.0


@pytest.mark.parametrize("busy_first", [False, True])
def test_a_pair_is_alone_and_next_to_a_busy_process(busy_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    side: Any = FakeSide()

    class Busy:
        def __enter__(self) -> None:
            side.is_busy = True

        def __exit__(self, *error: object) -> None:
            side.is_busy = False

    monkeypatch.setattr(busy_machine, "busy_process", Busy)
    assert busy_machine.pair(side, 3, busy_first) == {"alone": 1.0, "busy": 2.0}
    assert side.calls == [busy_first, not busy_first]


def test_ratios_are_taken_within_a_round() -> None:
    rounds = [{name: {"alone": alone * speed, "busy": alone * speed * cost} for name, speed, cost in
               (("passive", 1.1, 1.4), ("default", 1.0, 2.0), ("one", 1.5, 1.0))} for alone in (1.0, 7.0, 3.0)]  # fmt: skip
    sides = {name: busy_machine.figures(rounds, name) for name in busy_machine.SIDES}
    assert [round(side["busy_over_alone"]["median"], 6) for side in sides.values()] == [1.4, 2.0, 1.0]
    assert round(busy_machine.command_line(rounds)["median"], 6) == 1.54
    assert [round(side["alone_over_default_alone"]["median"], 6) for side in sides.values()] == [1.1, 1.0, 1.5]
    assert sides["default"]["seconds_busy"] == {"median": 6.0, "min": 2.0, "max": 14.0}
    whole = busy_machine.command_line(rounds)
    result = {"sides": sides, "machine": {"load_before": [0.1]}, "command_line_busy_over_alone": whole}
    text = busy_machine.printed(result)
    assert "passive     3.30 s   4.62 s   1.40 [1.40, 1.40]" in text
