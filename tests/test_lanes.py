"""Two tasks at once: the same results, errors that surface, and nobody side by side who shares something."""

import threading
from typing import Any

import pytest
import torch

from helpers import config_of, tiny_trainer
from rlgf import lanes
from rlgf.algorithms import d2lols, ppo
from rlgf.lanes import Lanes


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


def where() -> tuple[str, int]:
    return threading.current_thread().name, torch.get_num_threads()


@pytest.mark.parametrize(("threads", "halves"), [(2, (1, 1)), (5, (3, 2))])
def test_each_of_two_tasks_has_half_of_the_threads(threads: int, halves: tuple[int, int]):
    torch.set_num_threads(threads)
    first, second = Lanes().run(where, where)
    assert first == (threading.current_thread().name, halves[0])
    assert second[0].startswith("rlgf-lane")
    assert second[1] == halves[1]
    assert torch.get_num_threads() == threads


def test_they_run_at_the_same_time():
    meeting = threading.Barrier(2, timeout=20)  # broken, an error, if only one of them comes
    assert sorted(Lanes().run(meeting.wait, meeting.wait)) == [0, 1]


def test_with_one_thread_or_among_processes_they_follow_each_other(monkeypatch: pytest.MonkeyPatch):
    own = threading.current_thread().name
    monkeypatch.setattr(lanes, "several", lambda: True)
    assert Lanes().run(where, where) == ((own, 2), (own, 2))
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert Lanes().run(where, where) == ((own, 1), (own, 1))


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_an_error_of_either_is_raised_when_both_have_ended(first: bool, second: bool):
    ended: list[str] = []

    def task(name: str, fails: bool) -> None:
        ended.append(name)
        if fails:
            raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="first" if first else "second"):
        Lanes().run(lambda: task("first", first), lambda: task("second", second))
    assert sorted(ended) == ["first", "second"]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("algorithm", [ppo(), d2lols(0.5, 0.5, 1)])
def test_side_by_side_learns_what_one_after_the_other_does(algorithm: Any):
    together, apart = (tiny_trainer(algorithm, config_of()) for _ in range(2))
    assert together.updater.lanes is not None
    apart.updater.lanes = None
    for iteration in range(3):
        found, expected = (trainer.step(iteration)[0] for trainer in (together, apart))
        for key in ("policy_loss", "value_loss", "policy_gradient_norm", "critic_gradient_norm", "old_policy_kl"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("change", [{"critic__kind": "trunk"}, {"ppo__dropout": True}])
def test_who_shares_a_trunk_or_the_draws_of_dropout_learns_one_after_the_other(change: dict[str, Any]):
    assert tiny_trainer(ppo(), config_of(**change)).updater.lanes is None
