"""The training loop itself: samplers of one's own, loops that are left and gone on with, what is logged."""

from collections.abc import Sequence
from dataclasses import replace

from helpers import config_of, tiny_trainer
from rlgf.algorithms.registry import ppo
from rlgf.generation.base import SampledCompletions, SampleRequest
from rlgf.generation.decoder import LocalSampler
from rlgf.models.language_model import LanguageModel
from rlgf.randomness import Purpose
from rlgf.trainer import Trainer
from rlgf.types import SamplingParams


class NotingSampler:
    """A sampler in this process that notes its calls."""

    def __init__(self, policy: LanguageModel) -> None:
        self.sampler, self.calls = LocalSampler(policy), list[str]()

    is_exact = True

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, seed: int, purpose: Purpose
    ) -> SampledCompletions:
        self.calls.append("sample")
        return self.sampler.sample(requests, params, seed, purpose)

    def sync(self, policy: LanguageModel) -> None:
        self.calls.append("sync")


def test_a_sampler_of_ones_own_is_synced_after_each_update_and_after_loading_a_checkpoint() -> None:
    components = tiny_trainer(ppo().build(), config_of()).components
    sampler = NotingSampler(components.models.policy)
    trainer = Trainer(replace(components, sampler=sampler))
    trainer.agreement.require(trainer.forward_config)  # samples rollins and rollouts of its own
    sampler.calls.clear()
    trainer.step(0)
    trainer.step(1)
    assert sampler.calls == ["sample", "sync", "sample", "sync"]
    trainer.load_state(1, trainer.state())
    assert sampler.calls[-1] == "sync"


def test_a_loop_that_was_left_goes_on() -> None:
    trainer = tiny_trainer(ppo().build(), config_of(ppo__iterations=3, evaluation__every=0))
    for _ in trainer.iterate():
        break
    assert trainer.iteration == 1
    assert [progress.iteration for progress in trainer.iterate()] == [2, 3]


def test_entropy_is_logged_for_trained_tokens_and_left_out_without_any() -> None:
    trainer = tiny_trainer(ppo().build(), config_of(critic__warmup_iterations=1))
    assert "entropy" not in trainer.step(0)[0]
    assert trainer.step(1)[0]["entropy"] > 0
