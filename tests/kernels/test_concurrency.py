"""Two tasks at once: equal results, propagated errors, and no concurrency with shared weights."""

import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from helpers import config_of, requires_bf16_products, tiny_trainer, with_fast
from rlgf.algorithms.registry import d2lols, ppo
from rlgf.kernels import concurrency, linear
from rlgf.kernels.concurrency import ConcurrentPair, DeferredGradients, deferred_gradients
from rlgf.models.language_model import LanguageModel
from rlgf.rl import experience
from rlgf.rl.experience import compute_log_probs


@pytest.fixture(autouse=True)
def _two_threads() -> None:
    torch.set_num_threads(2)


def where() -> tuple[str, int]:
    return threading.current_thread().name, torch.get_num_threads()


@pytest.mark.parametrize(("threads", "halves"), [(2, (1, 1)), (5, (3, 2))])
def test_each_of_two_tasks_has_half_of_the_threads(threads: int, halves: tuple[int, int]):
    torch.set_num_threads(threads)
    first, second = ConcurrentPair().run(where, where)
    assert first == (threading.current_thread().name, halves[0])
    assert second[0].startswith("rlgf-second")
    assert second[1] == halves[1]
    assert torch.get_num_threads() == threads


def test_they_run_at_the_same_time():
    meeting = threading.Barrier(2, timeout=20)  # broken, an error, if only one of them comes
    assert sorted(ConcurrentPair().run(meeting.wait, meeting.wait)) == [0, 1]


def test_with_one_thread_or_among_processes_they_follow_each_other(monkeypatch: pytest.MonkeyPatch):
    own = threading.current_thread().name
    monkeypatch.setattr(concurrency, "is_distributed", lambda: True)
    assert ConcurrentPair().run(where, where) == ((own, 2), (own, 2))
    monkeypatch.undo()
    torch.set_num_threads(1)
    assert ConcurrentPair().run(where, where) == ((own, 1), (own, 1))


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_an_error_of_either_is_raised_when_both_have_ended(first: bool, second: bool):
    ended: list[str] = []

    def task(name: str, fails: bool) -> None:
        ended.append(name)
        if fails:
            raise RuntimeError(name)

    with pytest.raises(RuntimeError, match="first" if first else "second"):
        ConcurrentPair().run(lambda: task("first", first), lambda: task("second", second))
    assert sorted(ended) == ["first", "second"]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("algorithm", with_fast([ppo().build(), d2lols(0.5, 0.5, 1).build()], d2lols(0.5, 0.5, 1).build()))
def test_side_by_side_learns_what_one_after_the_other_does(algorithm: Any):
    together, apart = (tiny_trainer(algorithm, config_of()) for _ in range(2))
    assert together.updater.independent_critics
    apart.updater.independent_critics = False
    for iteration in range(3):
        found, expected = (trainer.step(iteration)[0] for trainer in (together, apart))
        for key in ("policy_loss", "value_loss", "policy_grad_norm", "critic_grad_norm", "approx_kl"):
            assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("change", [{"critic__kind": "value_head"}, {"ppo__dropout": True}])
def test_who_shares_a_trunk_or_the_draws_of_dropout_learns_one_after_the_other(change: dict[str, Any]):
    assert tiny_trainer(ppo().build(), config_of(**change)).updater.independent_critics is False


def test_what_is_lent_is_computed_by_the_lane_that_is_done_and_summed_in_its_order():
    parameter, other = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
    other.grad = torch.ones(2)
    computed, begun = list[tuple[str, int]](), threading.Event()

    def gradient(value: float) -> torch.Tensor:
        computed.append((threading.current_thread().name, torch.get_num_threads()))
        begun.set()
        return torch.full((2,), value)

    def first() -> int:
        lent = deferred_gradients()
        assert lent is not None
        lent.defer(parameter, lambda: gradient(1e8))
        assert begun.wait(20)  # by the other lane, which has nothing to do
        for value in (1.0, -1e8):
            lent.defer(parameter, lambda value=value: gradient(value))
        lent.defer(other, lambda: gradient(3.0))
        assert parameter.grad is None
        return 1

    assert ConcurrentPair().run(first, lambda: 2) == (1, 2)
    assert deferred_gradients() is None
    assert computed[0][0].startswith("rlgf-second")
    assert {threads for _, threads in computed} == {1}
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [0.0, 0.0]  # (1e8 + 1) − 1e8 in fp32: the order in which they were lent
    assert other.grad.tolist() == [4.0, 4.0]


def test_a_busy_lane_leaves_what_is_lent_to_the_one_that_lends():
    parameter, finished = torch.nn.Parameter(torch.zeros(1)), threading.Event()
    computed: list[str] = []

    def gradient() -> torch.Tensor:
        computed.append(threading.current_thread().name)
        return torch.ones(1)

    def first() -> None:
        lent = deferred_gradients()
        assert lent is not None
        for _ in range(DeferredGradients.MAX_WAITING + 1):
            assert not computed
            lent.defer(parameter, gradient)
        assert computed == [threading.current_thread().name]  # before more would wait
        finished.set()

    ConcurrentPair().run(first, lambda: finished.wait(20))
    assert len(computed) == DeferredGradients.MAX_WAITING + 1
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [DeferredGradients.MAX_WAITING + 1.0]


def test_two_lanes_compute_at_once_but_never_for_the_same_parameter():
    one, two = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    meeting = threading.Barrier(2, timeout=20)  # broken, an error, if only one of them comes
    at_work = threading.Lock()

    def meet(value: float) -> torch.Tensor:
        meeting.wait()
        return torch.full((1,), value)

    def alone(value: float) -> torch.Tensor:
        assert at_work.acquire(blocking=False)
        time.sleep(0.02)
        at_work.release()
        return torch.full((1,), value)

    def first() -> None:
        lent = deferred_gradients()
        assert lent is not None
        lent.defer(one, lambda: meet(1.0))
        lent.defer(two, lambda: meet(2.0))
        for _ in range(4):
            lent.defer(one, lambda: alone(3.0))

    ConcurrentPair().run(first, lambda: None)
    assert (one.grad, two.grad) == (torch.tensor([13.0]), torch.tensor([2.0]))


@pytest.mark.parametrize("where", ["first", "second", "lent"])
def test_an_error_while_something_is_lent_leaves_no_lane_waiting(where: str):
    parameter = torch.nn.Parameter(torch.zeros(1))

    def fail() -> torch.Tensor:
        raise RuntimeError("here")

    def first() -> None:
        lent = deferred_gradients()
        assert lent is not None
        lent.defer(parameter, fail if where == "lent" else lambda: torch.ones(1))
        if where == "first":
            fail()

    runs = ConcurrentPair()
    with pytest.raises(RuntimeError, match="here"):
        runs.run(first, fail if where == "second" else lambda: None)
    assert parameter.grad is None
    assert deferred_gradients() is None
    assert runs.run(lambda: 1, lambda: 2) == (1, 2)


def test_nothing_is_lent_where_it_would_matter_who_computes_or_nobody_is_beside():
    assert deferred_gradients() is None
    torch.set_num_threads(3)
    assert ConcurrentPair().run(deferred_gradients, deferred_gradients) == (None, None)
    torch.set_num_threads(1)
    assert ConcurrentPair().run(deferred_gradients, deferred_gradients) == (None, None)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_lent_gradient_is_the_one_that_is_not(precision: str, monkeypatch: pytest.MonkeyPatch):
    if precision == "bf16":
        requires_bf16_products()
    monkeypatch.setattr(linear, "MIN_MULTIPLICATIONS", 0)

    def learnt(least: int) -> list[torch.Tensor]:
        monkeypatch.setattr(linear, "MIN_DEFERRED", least)
        trainer = tiny_trainer(ppo().build(), config_of(runtime__precision=precision, ppo__old_log_probs="recompute"))
        for iteration in range(2):
            trainer.step(iteration)
        return [value.detach().clone() for value in trainer.components.models.policy.trainable_parameters()]

    lent, own = learnt(0), learnt(2**40)
    seen = list[int]()
    plain = DeferredGradients.defer
    monkeypatch.setattr(DeferredGradients, "defer", lambda self, *rest: (seen.append(1), plain(self, *rest))[1])
    again = learnt(0)
    assert seen  # every layer's, here
    for one, other, third in zip(lent, own, again):
        assert torch.equal(one, third)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_reference_and_critic_read_side_by_side_what_they_read_one_after_the_other():
    trainer = tiny_trainer(d2lols(0.5, 0.5, 1).build(), config_of())
    assert trainer.updater.independent_critics
    rollout, parts = trainer.collect_rollout(0), trainer.components
    apart = compute_log_probs(rollout, trainer.phase_weights(0), parts.models, trainer.forward_config)
    beside = compute_log_probs(rollout, trainer.phase_weights(0), parts.models, trainer.forward_config, concurrently=True)
    torch.testing.assert_close(beside.reference_log_probs, apart.reference_log_probs)
    assert beside.values.keys() == apart.values.keys()
    for origin, values in apart.values.items():
        torch.testing.assert_close(beside.values[origin], values)


@pytest.mark.parametrize(("vocabulary", "alike"), [(100, True), (100_000, False)])
def test_a_reference_reads_beside_a_critic_unless_its_head_is_most_of_the_work(vocabulary: int, alike: bool):
    trainer = tiny_trainer(d2lols(0.5, 0.5, 1).build(), config_of())
    head, body = nn.Linear(8, vocabulary), nn.Linear(100, 100)
    model: Any = SimpleNamespace(get_output_embeddings=lambda: head, parameters=lambda: [*head.parameters(), body.weight])
    language_model = replace(trainer.components.models.policy, model=model)
    assert experience._costs_alike(language_model, trainer.collect_rollout(0)) == alike


def test_parameters_are_counted_once_per_model(monkeypatch: pytest.MonkeyPatch):
    trainer = tiny_trainer(ppo().build(), config_of())
    counted, count = list[LanguageModel](), LanguageModel.head_to_body.func
    monkeypatch.setattr(LanguageModel.head_to_body, "func", lambda self: (counted.append(self), count(self))[1])
    for iteration in range(2):
        trainer.step(iteration)
    assert len(counted) == 2  # the policy, and the reference


@pytest.mark.parametrize("alike", [True, False])
def test_nobody_reads_or_learns_beside_a_critic_where_the_head_is_most_of_the_work(
    alike: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(experience, "_costs_alike", lambda model, rollout: alike)
    ran, plain = list[int](), ConcurrentPair.run
    monkeypatch.setattr(ConcurrentPair, "run", lambda self, *tasks: (ran.append(1), plain(self, *tasks))[1])
    trainer = tiny_trainer(ppo().build(), config_of())
    steps = trainer.step(0)[0]["optimizer_steps"]
    assert len(ran) == (1 + 2 * steps if alike else 0)  # once for log-probabilities; gradients and optimizers in each step
