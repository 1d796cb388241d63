"""The one-file PPO++ of `examples/` computes what the library computes, from the same weights."""

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from helpers import config_of, reading_of, updater_of
from rlgf.algorithms.registry import ppo_pp
from rlgf.models.critic import Critic
from rlgf.models.language_model import Backbone, LanguageModel
from rlgf.models.loading import use_fast_paths
from rlgf.randomness import Purpose, permutation
from rlgf.rl.experience import Models, compute_log_probs, make_experience
from rlgf.rl.tensors import Rollout
from rlgf.types import POLICY, Prompt

TOLERANCE = 1e-6
TEXTS, EPOCHS, MINIBATCH, ITERATIONS = 20, 2, 8, 3  # the last minibatch of an epoch has 4 texts


@pytest.fixture(scope="module")
def twin() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "ppo_pp.py"
    spec = importlib.util.spec_from_file_location("ppo_pp_twin", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def as_library_rollout(written: object, old: Tensor) -> Rollout:
    """The twin's rollout in the library's words; the library reads log-probabilities of the policy's tokens only."""
    ids, origin, switch = written.ids, written.origin.to(torch.uint8), written.switch_position  # type: ignore[attr-defined]
    rows = len(ids)
    return Rollout(
        [Prompt("")] * rows, [""] * rows, ids, origin, switch, torch.full((rows,), int(POLICY), dtype=torch.uint8),
        torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool), torch.arange(rows), torch.arange(rows),
        old * (origin == POLICY), old * (origin == POLICY), None, 0,
    )  # fmt: skip


def largest_difference(one: torch.nn.Module, other: torch.nn.Module) -> float:
    pairs = list(zip(one.named_parameters(), other.named_parameters()))
    assert all(a[0] == b[0] for a, b in pairs)
    return max(float((a[1] - b[1]).detach().abs().max()) for a, b in pairs)


def test_the_twin_imports_nothing_of_the_library(twin: ModuleType) -> None:
    source = Path(twin.__file__ or "").read_text(encoding="utf-8")
    assert "rlgf" not in source
    assert len(source.splitlines()) <= 300


@pytest.mark.integration
@pytest.mark.parametrize("old_log_probs", ["sampler", "recompute"])
def test_twin_and_library_agree_on_every_number_and_every_weight(twin: ModuleType, old_log_probs: str) -> None:
    settings = twin.Settings(kl_coefficient=0.05, gamma=0.97, policy_rate=4e-4)
    policy = twin.tiny_gpt2(3).eval()
    reference = twin.tiny_gpt2(4).eval()
    critic = twin.Critic(policy)

    words = len(twin.WORDS)
    ours = Critic(Backbone(use_fast_paths(copy.deepcopy(policy.transformer))), policy.config.n_embd, 0.0)
    ours.load_state_dict({key.replace("backbone.", "model."): value for key, value in critic.state_dict().items()})
    models = Models(
        LanguageModel(use_fast_paths(copy.deepcopy(policy)), None, (twin.EOS,), 32, words),
        LanguageModel(use_fast_paths(copy.deepcopy(reference)), None, (twin.EOS,), 32, words),
        {POLICY: ours},
    )
    config = config_of(
        ppo__completions_per_iteration=TEXTS, ppo__epochs=EPOCHS, ppo__minibatch_size=MINIBATCH, ppo__gamma=0.97, seed=11,
        ppo__learning_rate=settings.policy_rate, critic__learning_rate=settings.critic_rate, runtime__token_budget=50,
        ppo__old_log_probs=old_log_probs, kl__coefficient=0.05,
    )  # fmt: skip
    updater, forward_config = updater_of(models, config), reading_of(config)
    shares = ppo_pp(settings.beta).build().schedule(0, 0.0)
    policy_optimizer = twin.optimizer_for(policy, settings.policy_rate)
    critic_optimizer = twin.optimizer_for(critic, settings.critic_rate)
    generator = torch.Generator().manual_seed(5)
    prompts = [[1, *[2 + i % 4] * (i % 3)] for i in range(TEXTS)]  # of one to three tokens, so that rows are padded

    def reward(prompt: list[int], response: list[int]) -> float:
        return sum(response[::2]) / 5 - len(response) / 7

    for iteration in range(ITERATIONS):
        written = twin.collect_rollout(policy, twin.lock_guide, reward, prompts, settings, generator)
        assert {twin.GUIDE, twin.PAD} <= set(written.origin.flatten().tolist())
        theirs = twin.make_experience(written, policy, reference, critic, settings)
        rollout = as_library_rollout(written, theirs.old_log_probs)
        rewards = written.rewards.tolist()
        measured = compute_log_probs(rollout, shares, models, forward_config)
        mine = make_experience(rollout, shares, "gae", rewards, rewards, measured, config.ppo, config.kl.coefficient)
        selected = rollout.by_policy
        for name, value, expected in (
            ("log-probabilities", mine.old_log_probs, theirs.old_log_probs),
            ("values", mine.values, theirs.values),
            ("advantages", mine.advantages, theirs.advantages),
            ("returns", mine.returns, theirs.returns),
        ):
            difference = float((value - expected)[selected].abs().max())
            assert difference < TOLERANCE, (name, iteration, difference)

        minibatches = []
        for epoch in range(EPOCHS):
            order = torch.from_numpy(permutation(11, Purpose.MINIBATCH, iteration * EPOCHS + epoch, TEXTS))
            minibatches += order.split(MINIBATCH)
        history = twin.update(theirs, policy, critic, policy_optimizer, critic_optimizer, minibatches, settings)
        stats = updater.update(mine, iteration)
        assert stats["optimizer_steps"] == len(history) == 6
        for loss in ("policy_loss", "value_loss"):
            assert stats[loss] == pytest.approx(sum(step[loss] for step in history) / len(history), abs=TOLERANCE)
        assert largest_difference(models.policy.model, policy) < TOLERANCE
        assert largest_difference(ours.get_submodule("model"), critic.backbone) < TOLERANCE
        assert largest_difference(ours.head, critic.head) < TOLERANCE
    assert stats["clip_fraction"] > 0  # the clip was reached: the comparison says something about it
