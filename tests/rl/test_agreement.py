"""Before the first update: the sampler's log-probabilities are the trainer's, or the run ends in one sentence."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from helpers import config_of, parameters, tiny_trainer
from rlgf.algorithms.registry import ppo, ppo_pp
from rlgf.errors import TrainingError
from rlgf.generation.base import SampledCompletions, SampleRequest
from rlgf.generation.decoder import LocalSampler
from rlgf.guides.base import CompletionRequest
from rlgf.guides.local import FunctionGuide
from rlgf.randomness import Purpose
from rlgf.rl.agreement import NUM_PROMPTS, sample_restarts
from rlgf.trainer import Trainer
from rlgf.types import SamplingParams

BF16 = {"runtime__precision": "bf16", "ppo__old_log_probs": "recompute"}


class WrongInProcess(LocalSampler):
    """A sampler of this process whose log-probabilities are off by a number."""

    error = 0.0

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, seed: int, purpose: Purpose
    ) -> SampledCompletions:
        right = super().sample(requests, params, seed, purpose)
        return replace(right, log_probs=right.log_probs + self.error)


class Engine:
    """An engine of its own, which rounds otherwise: all or some log-probabilities are off."""

    def __init__(self, sampler: LocalSampler, error: float, tokens: bool = True) -> None:
        self.sampler, self.error, self.tokens = sampler, error, tokens

    is_exact = False

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, seed: int, purpose: Purpose
    ) -> SampledCompletions:
        right = self.sampler.sample(requests, params, seed, purpose)
        lengths = right.lengths if self.tokens else torch.zeros_like(right.lengths)
        return replace(right, log_probs=right.log_probs + self.error, lengths=lengths)

    def sync(self, policy: object) -> None:
        """Do nothing."""


def trainer_with(error: float, own_engine: bool = False, tokens: bool = True, **settings: object) -> Trainer:
    components = tiny_trainer(ppo().build(), config_of(**settings)).components
    sampler = WrongInProcess(components.models.policy)
    sampler.error = error
    return Trainer(
        replace(components, sampler=Engine(LocalSampler(components.models.policy), error, tokens) if own_engine else sampler)
    )


def test_a_run_whose_numbers_agree_goes_on_and_keeps_the_figures() -> None:
    trainer = tiny_trainer(ppo().build(), config_of())
    trainer.step(0)
    sampled, first = trainer.agreement.sampled, trainer.agreement.first_rollout
    assert sampled is not None
    assert first is not None
    assert sampled.tokens > NUM_PROMPTS
    assert first.tokens > 8
    assert max(sampled.max_error, first.max_error) < 1e-4


@pytest.mark.parametrize(
    ("error", "own_engine", "settings", "passes"),
    [
        (5e-4, False, {}, True),
        (2e-3, False, {}, False),  # fp32 in this process: exact
        (2e-3, False, BF16, True),
        (0.2, False, BF16, False),
        (0.04, True, {}, True),
        (0.06, True, {}, False),
        (float("nan"), False, {}, False),
        (float("nan"), True, {}, False),
        (2e-3, False, {"ppo__old_log_probs": "recompute"}, False),  # where the first ratio is 1 by construction
    ],
)
def test_a_difference_ends_the_run_before_anything_is_collected(
    error: float, own_engine: bool, settings: dict[str, object], passes: bool
) -> None:
    trainer = trainer_with(error, own_engine, **settings)
    before = parameters(trainer.components.models.policy.model)
    if passes:
        trainer.collect_rollout(0)
        return
    with pytest.raises(TrainingError, match=r"log-probabilities of sampling and of training differ.*a model of type 'gpt2'"):
        trainer.collect_rollout(0)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer.components.models.policy.model)))


def test_no_figure_is_no_pass() -> None:
    with pytest.raises(TrainingError, match="it sampled no token: a model of type 'gpt2'"):
        trainer_with(0.0, own_engine=True, tokens=False).collect_rollout(0)


def test_a_loop_of_ones_own_cannot_go_around_it() -> None:
    trainer = trainer_with(0.0)
    experience = trainer.make_experience(trainer.collect_rollout(0), 0)
    trainer.agreement.sampled = None
    trainer.sampler.error = 1.0  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match="differ"):
        trainer.update(experience, 0)


def test_the_first_rollout_is_compared_too() -> None:
    trainer = tiny_trainer(ppo().build(), config_of(sampling={"top_k": 4}))
    experience = trainer.make_experience(trainer.collect_rollout(0), 0)
    forgotten = replace(experience, rollout=replace(experience.rollout, support=None))
    with pytest.raises(TrainingError, match="of the first rollout"):
        trainer.update(forgotten, 0)


def test_completions_of_the_check_are_restarted_from_prefixes_of_different_lengths() -> None:
    def finish(requests: Sequence[CompletionRequest]) -> list[str]:
        raise AssertionError("the check does not call the guide")

    trainer = tiny_trainer(ppo_pp(0.5).build(), config_of(task__max_new_tokens=12), FunctionGuide(finish))
    rollout = sample_restarts(trainer.rollout_config, trainer.components.task.train)
    assert not bool(rollout.by_guide.any())
    assert len(set(rollout.switch_position.tolist()) - {0}) > 1
    assert int((rollout.switch_position == 0).sum()) == NUM_PROMPTS // 2
