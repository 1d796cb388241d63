"""Numbers that are not finite, and iterations that teach nothing."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import (
    config_of,
    experience_of,
    known_word,
    parameters,
    rollout_of,
    small,
    tiny_parts,
    tiny_trainer,
    with_fast,
    word_reward,
)
from rlgf.algorithms import registry
from rlgf.config.schema import Config
from rlgf.data.files import read_complete_lines
from rlgf.errors import TrainingError
from rlgf.guides.local import FunctionGuide
from rlgf.models import memory
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.run import train
from rlgf.rewards.weighted_sum import WeightedSum
from rlgf.rl.guards import DIVERGED_ITERATIONS, Guard, NonFiniteError, TrainingWarnings, check_kl
from rlgf.rl.update import Updater
from rlgf.trainer import Trainer

LARGE = "def reward(prompts, texts):\n    return [{value} if len(text) % 2 else 1.0 for text in texts]\n"


@pytest.fixture
def large_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A maker of rewards that are large for some completions, by their path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(value: str) -> str:
        (tmp_path / "large_reward.py").write_text(LARGE.format(value=value))
        return "python:large_reward:reward"

    yield make
    sys.modules.pop("large_reward", None)


def trainer_of(config: Config, reward: Any = word_reward) -> Trainer:
    return Trainer(replace(tiny_parts(registry.ppo().build(), config), reward=reward))


@pytest.mark.parametrize("value", with_fast(["3e38", "-3e38", "1e300", "2e19"], "2e19"))
def test_a_reward_beyond_fp32_stops_the_run_with_its_texts_and_an_unchanged_checkpoint(
    tmp_path: Path, large_reward: Any, value: str
) -> None:
    config = small(("reward.path", large_reward(value)), ("evaluation.every", 0))
    run = tmp_path / "run"
    with pytest.raises(
        TrainingError, match=r"iteration 0: the .*reward.* is not finite, in the completions .*set reward\.clip"
    ):
        train(config, run, tmp_path / "stages")
    rows = read_complete_lines(run / "nonfinite.jsonl")
    assert 0 < len(rows) < 8
    assert all(len(row["text"]) % 2 for row in rows)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["iteration-000000"]
    assert not (run / "policy").exists()
    assert not (run / "results.json").exists()


@pytest.mark.parametrize("terms", [(math.inf, -math.inf), (1e308, 1e308), (math.nan, 1.0)], ids=str)
def test_a_sum_of_rewards_that_has_no_value_is_guarded(terms: tuple[float, float]) -> None:
    """An exact sum raises errors of its own for these."""
    parts = {str(n): (1.0, lambda prompts, texts, value=value: [value] * len(texts)) for n, value in enumerate(terms)}
    trainer = trainer_of(config_of(), WeightedSum(parts))
    with pytest.raises(NonFiniteError, match=r"iteration 0: the reward in fp32 is not finite"):
        next(iter(trainer.iterate()))


def test_rewards_of_a_skipped_iteration_leave_the_running_scale() -> None:
    config = config_of(reward__normalize=True, runtime__on_nonfinite="skip", runtime__max_skipped=99, evaluation__every=0)
    calls = list[int]()

    def reward(prompts: Any, texts: Any) -> list[float]:
        calls.append(1)
        return [math.nan if len(calls) == 2 else float(n) for n in range(len(texts))]

    trainer = trainer_of(config, reward)
    counts = [(step.metrics["optimizer_steps"] > 0, trainer.shaper.running_stats.count) for step in trainer.iterate()]
    rows = config.ppo.completions_per_iteration
    assert counts == [(True, rows), (False, rows), (True, 2 * rows)]
    assert math.isfinite(trainer.shaper.running_stats.mean)


def test_a_clipped_reward_is_used(tmp_path: Path, large_reward: Any) -> None:
    config = small(("reward.path", large_reward("3e38")), ("reward.clip", 1.0), ("ppo.iterations", 1), ("evaluation.every", 0))
    metrics = next(iter(Trainer(prepare(config, tmp_path)).iterate())).metrics
    assert metrics["steps_skipped"] == 0
    assert math.isfinite(metrics["value_loss"])


def test_a_learning_rate_that_breaks_the_weights_stops_before_a_checkpoint_of_them(tmp_path: Path) -> None:
    config = small(("evaluation.every", 0), ("runtime.checkpoint_every", 1))
    object.__setattr__(config.ppo, "learning_rate", 1e30)  # beyond its bounds
    run = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"iteration \d: .* is not finite.*lower ppo\.learning_rate"):
        train(config, run, tmp_path / "stages")
    assert not (run / "policy").exists()
    rows = read_complete_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    for row in rows:
        assert row["policy_loss"] is not None
        assert row["policy_grad_norm"] is not None


def test_no_optimizer_moves_by_a_loss_that_is_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = tiny_trainer(registry.ppo().build(), config_of())
    experience = trainer.make_experience(trainer.collect_rollout(0), 0)
    experience.returns[0, -1] = math.inf
    experience.returns[:] = math.inf
    models = trainer.components.models
    modules = [models.policy.model, *(critic for critic in models.critics.values())]
    before = [value for module in modules for value in parameters(module)]
    with pytest.raises(NonFiniteError, match=r"value loss \(inf\) is not finite"):
        trainer.update(experience, 0)
    after = [value for module in modules for value in parameters(module)]
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not trainer.is_between_iterations


def test_skipped_steps_are_counted_and_the_run_goes_on(tmp_path: Path, large_reward: Any) -> None:
    config = small(
        ("reward.path", large_reward("1e300")), ("evaluation.every", 0), ("runtime.on_nonfinite", "skip"),
        ("runtime.max_skipped", 12),
    )  # fmt: skip
    trainer = Trainer(prepare(config, tmp_path))
    before = parameters(trainer.components.models.policy.model)
    rows = [progress.metrics for progress in trainer.iterate()]
    per_iteration = trainer.updater.steps_per_iteration
    assert [row["steps_skipped"] for row in rows] == [per_iteration] * 3
    assert [row["optimizer_steps"] for row in rows] == [0] * 3
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer.components.models.policy.model)))
    assert trainer.state()["updater"]["skipped_in_a_row"] == 3 * per_iteration


def test_too_many_skipped_steps_in_a_row_stop_the_run() -> None:
    guard = Guard("skip", 2)
    experience = experience_of(rollout_of(["xGP"]))
    bad, good, rows = {"value loss": math.nan}, {"value loss": 1.0}, torch.tensor([0])
    assert not guard.check_step(bad, experience, rows, 0)
    assert guard.check_step(good, experience, rows, 0)  # the count begins again
    assert not guard.check_step(bad, experience, rows, 0)
    assert not guard.check_step(bad, experience, rows, 0)
    with pytest.raises(NonFiniteError, match=r"value loss \(nan\) is not finite after 3 optimizer steps in a row"):
        guard.check_step(bad, experience, rows, 0)


@pytest.mark.parametrize("name", ["old_log_probs", "reference_log_probs", "values", "returns", "advantages"])
def test_every_quantity_of_an_experience_is_guarded(name: str) -> None:
    values = torch.zeros(2, 3)
    values[1, 2] = math.nan
    experience = experience_of(rollout_of(["xGP", "xPP"]), **{name: values})
    with pytest.raises(NonFiniteError) as raised:
        Guard("stop", 1).check_experience(experience, [0.0, 0.0], 5, 2)
    assert raised.value.rows == [1]
    assert str(raised.value).startswith("iteration 5: the ")


def test_a_finite_experience_passes() -> None:
    assert Guard("stop", 1).check_experience(experience_of(rollout_of(["xGP"])), [1e19], 0, 1)


@pytest.mark.parametrize("key", ["sft.learning_rate", "guide.sft.learning_rate"])
def test_a_supervised_stage_of_numbers_that_are_not_finite_is_not_kept(tmp_path: Path, key: str) -> None:
    steps = (key.replace("learning_rate", "steps"), 20)
    config = small(steps, ("guide.spec", "trained"), ("algorithm.name", "ppo_pp"))
    section = config.guide.sft if key.startswith("guide") else config.sft
    object.__setattr__(section, "learning_rate", 1e30)  # beyond its bounds
    with pytest.raises(TrainingError, match=r"step \d+ of 20: the .* is (nan|inf).*lower its learning_rate"):
        prepare(config, tmp_path)
    assert not list(tmp_path.glob("sft-*" if key.startswith("sft") else "guide-*"))


def test_a_kl_above_its_bound_stops_between_iterations(tmp_path: Path) -> None:
    check_kl(1.0, None, 0)
    check_kl(1.0, 1.0, 0)
    with pytest.raises(TrainingError, match=r"iteration 3: the KL is 2 nats per completion, above kl\.stop_above=1"):
        check_kl(2.0, 1.0, 3)
    trainer = tiny_trainer(registry.ppo().build(), config_of(kl__stop_above=1e-9))
    with pytest.raises(TrainingError, match=r"kl\.stop_above"):
        trainer.step(0)
    assert trainer.is_between_iterations


@pytest.mark.integration
def test_identical_rewards_are_said_once_and_counted_always() -> None:
    config = config_of(evaluation__every=0)
    trainer = trainer_of(config, lambda prompts, texts: [1.0] * len(texts))
    progress = list(trainer.iterate())
    assert [step.metrics["identical_rewards"] for step in progress] == [1.0, 1.0, 1.0]
    assert [len(step.warnings) for step in progress] == [1, 0, 0]
    assert "same reward" in progress[0].warnings[0]
    assert [step.metrics["identical_rewards"] for step in trainer_of(config).iterate()] == [0.0, 0.0, 0.0]


def test_an_iteration_without_tokens_of_the_policy_is_said_once() -> None:
    algorithm = registry.aggrevated(beta=0.0).build()
    trainer = tiny_trainer(algorithm, config_of(evaluation__every=0), FunctionGuide(known_word))
    progress = list(trainer.iterate())
    assert [step.metrics["no_policy_tokens"] for step in progress] == [1.0, 1.0, 1.0]
    assert sum("no token of the iteration" in line for step in progress for line in step.warnings) == 1


def test_a_critic_that_diverges_for_long_is_said_once() -> None:
    warnings, said = TrainingWarnings(), []
    for iteration in range(3 * DIVERGED_ITERATIONS):
        said += warnings.new_warnings({"iteration": iteration, "critic_diverges": float(iteration != 2)})
    assert len(said) == 1
    assert said[0].startswith(f"iteration {2 + DIVERGED_ITERATIONS}: the critic")


@pytest.mark.integration
def test_a_device_without_memory_gets_smaller_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(runtime__token_budget=64, evaluation__every=0, ppo__iterations=1)
    plain = next(iter(tiny_trainer(registry.ppo().build(), config).iterate())).metrics
    trainer, original, failures = tiny_trainer(registry.ppo().build(), config), Updater._policy_gradients, [0]

    def fails_when_large(self: Updater, *arguments: Any) -> Any:
        if self.forward_config.token_budget > 20:
            failures[0] += 1
            raise torch.OutOfMemoryError("out of memory")
        return original(self, *arguments)

    monkeypatch.setattr(Updater, "_policy_gradients", fails_when_large)
    metrics = next(iter(trainer.iterate())).metrics
    assert failures[0] == 2
    assert trainer.forward_config.token_budget == trainer.state()["token_budget"] == 16
    for name in ("policy_loss", "value_loss", "policy_grad_norm"):
        assert metrics[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")]
)
def test_a_host_without_memory_ends_in_one_sentence(error: Exception) -> None:
    with pytest.raises(TrainingError, match=r"memory of the host is too small.*runtime\.token_budget"):
        memory.smaller_token_budget(error, 2048, 8)


def test_other_errors_are_not_taken_for_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        memory.smaller_token_budget(RuntimeError("shapes differ"), 2048, 8)
    with pytest.raises(TrainingError, match="memory of the accelerator is too small for micro-batches of 8"):
        memory.smaller_token_budget(torch.OutOfMemoryError("x"), 8, 8)


def test_the_rows_of_a_number_that_is_not_finite_are_json() -> None:
    assert json.loads(json.dumps(NonFiniteError("x", experience_of(rollout_of(["xGP"])), [0]).rows)) == [0]
