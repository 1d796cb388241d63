"""Experience: log-probabilities, values and advantages of small examples, by hand."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import (
    StubCritic,
    config_of,
    known_word,
    measure,
    parameters,
    reading_of,
    rollout_of,
    tiny_model,
    tiny_parts,
    tiny_trainer,
    uniform_policy,
    with_fast,
)
from rlgf.algorithms.base import PhaseWeight
from rlgf.algorithms.registry import aggrevated, d2lols, grpo, guided_grpo, lols, ppo, ppo_pp
from rlgf.guides.local import FunctionGuide
from rlgf.rl import experience
from rlgf.rl.experience import Models, RolloutScorer
from rlgf.rl.tensors import Experience, Rollout
from rlgf.trainer import Trainer
from rlgf.types import GUIDE, POLICY, SamplingParams

OWN_POLICY = (PhaseWeight(0, 1.0, 1.0, 0.0),)
OWN_GUIDE = (PhaseWeight(0, 1.0, 0.0, 1.0),)


def table(rollout: Rollout, *rows: Sequence[float]) -> Tensor:
    """Numbers for the response tokens of each row, zero at prompt and padding, in the shape of the rollout."""
    values = torch.zeros(rollout.ids.shape)
    for i, row in enumerate(rows):
        start = int(rollout.prompt_lengths[i])
        values[i, start : start + len(row)] = torch.tensor(row)
    return values


def responses(rollout: Rollout, values: Tensor) -> list[list[float]]:
    """The numbers of the response tokens of each row, rounded; everything else must be zero."""
    assert not bool(values[~rollout.completion_mask].any())
    return [[round(x, 5) for x in row[mask].tolist()] for row, mask in zip(values, rollout.completion_mask)]


def appraised(
    rollout: Rollout, rewards: Sequence[float], shares: Sequence[PhaseWeight] = OWN_POLICY, policy_values: Tensor | None = None,
    guide_values: Tensor | None = None, kl: Tensor | None = None, credit: str = "gae", **settings: Any,
) -> Experience:  # fmt: skip
    """An experience with critics that say what they are told to, and a KL of each policy token as given."""
    size = rollout.ids.numel()
    zeros = torch.zeros(rollout.ids.shape)
    given = (zeros if kl is None else kl) - math.log(size)  # the reference gives every token probability 1 / size
    critics = {
        POLICY: StubCritic(zeros if policy_values is None else policy_values),
        GUIDE: StubCritic(zeros if guide_values is None else guide_values),
    }
    models = Models(uniform_policy(size), uniform_policy(size), critics)
    values = {"ppo__whiten_advantages": False, "ppo__gae_lambda": 0.5, "ppo__gamma": 1.0, "kl__coefficient": 0.1, **settings}
    written = replace(rollout, log_probs=given, full_log_probs=given)
    return measure(written, shares, rewards, models, config_of(**values), credit)


def test_the_reward_sits_on_the_last_written_token_whoever_wrote_it() -> None:
    rollout = rollout_of(["xxPPP--", "xGGP---", "xxxP---", "xPPPPPP"])
    # with lambda 0 and values of 0, a return is the reward of its own token
    found = appraised(rollout, [1.0, 2.0, 3.0, 4.0], ppo__gae_lambda=0.0)
    assert responses(rollout, found.returns) == [[0, 0, 1], [0, 0, 2], [3], [0, 0, 0, 0, 0, 4]]
    rollout = rollout_of(["xPGG-", "xGG--"])
    found = appraised(rollout, [1.0, 2.0], OWN_GUIDE, ppo__gae_lambda=0.0)
    assert responses(rollout, found.returns) == [[0, 0, 1], [0, 2]]


def test_padding_that_looks_like_the_end_token_changes_nothing() -> None:
    ids = torch.tensor([[3, 5, 6, 0, 0, 0], [3, 0, 7, 8, 0, 0]])  # 0 is the end token, a word in mid-text, and the padding
    rollout = rollout_of(["xPPP--", "xGPPP-"], ids=ids)
    other = replace(rollout, ids=torch.where(rollout.origin == 0, 9, ids))
    found, expected = appraised(rollout, [1.0, 2.0], ppo__gae_lambda=1.0), appraised(other, [1.0, 2.0], ppo__gae_lambda=1.0)
    assert responses(rollout, found.returns) == [[1, 1, 1], [0, 2, 2, 2]]
    assert torch.equal(found.advantages, expected.advantages)
    assert found.stats == pytest.approx(expected.stats, nan_ok=True)


def test_values_and_targets_belong_to_the_critic_of_whoever_finished_and_start_at_the_switch() -> None:
    rollout = rollout_of(["xGPP", "xPGG", "xPPP"], "PGG", phases=[0, 1, 1])
    shares = (PhaseWeight(0, 0.5, 1.0, 0.0), PhaseWeight(1, 0.5, 0.0, 1.0))
    policy_values = table(rollout, [0.5, 0.5, 0.5], [9, 9, 9], [9, 9, 9])
    guide_values = table(rollout, [9, 9, 9], [0.25, 0.25, 0.25], [0.25, 0.25, 0.25])
    found = appraised(rollout, [1.0, 1.0, 1.0], shares, policy_values, guide_values, ppo__gae_lambda=1.0)
    assert responses(rollout, found.values) == [[0.5, 0.5, 0.5], [0.25, 0.25, 0.25], [0.25, 0.25, 0.25]]
    assert responses(rollout, found.returns) == [[0, 1, 1], [0, 1, 1], [0, 0, 0]]
    assert found.stats["critic_tokens"] == 4


def test_generalised_advantages_of_a_text_by_hand() -> None:
    rollout = rollout_of(["xGPPP"])
    found = appraised(rollout, [1.0], policy_values=table(rollout, [0.7, 0.1, 0.2, 0.4]))
    # deltas .1, .2, .6; lambda .5
    assert responses(rollout, found.advantages) == [[0, 0.35, 0.5, 0.6]]
    assert responses(rollout, found.returns) == [[0, 0.45, 0.7, 1.0]]


def test_gamma_discounts_what_follows() -> None:
    rollout = rollout_of(["xPP"])
    found = appraised(rollout, [1.0], policy_values=table(rollout, [0.2, 0.4]), ppo__gamma=0.5, ppo__gae_lambda=1.0)
    # deltas .5 * .4 - .2 = 0 and 1 - .4 = .6; gamma lambda = .5
    assert responses(rollout, found.advantages) == [[0.3, 0.6]]


@pytest.mark.parametrize(
    ("credit", "expected"), [("gae", [0.25, 0.3, 0, 0]), ("td", [0.1, 0.3, 0, 0]), ("switch", [0, 0.3, 0, 0])]
)
def test_credit_decides_what_the_policys_tokens_before_the_guide_are_given(credit: str, expected: list[float]) -> None:
    rollout = rollout_of(["xPPGG"])
    values = table(rollout, [0.1, 0.2, 0.3, 0.4])  # deltas .1, .1, .1, .6; so A = .25, .3, .4, .6
    found = appraised(rollout, [1.0], OWN_GUIDE, guide_values=values, credit=credit)
    assert responses(rollout, found.advantages) == [expected]
    assert responses(rollout, found.returns) == [[0, 0, 0.7, 1.0]]


@pytest.mark.parametrize("credit", ["gae", "td", "switch"])
def test_a_text_that_the_policy_wrote_to_the_end_is_compared_with_the_guides_value(credit: str) -> None:
    rollout = rollout_of(["xPP"], "G")
    found = appraised(rollout, [1.0], OWN_GUIDE, guide_values=table(rollout, [0.25, 0.75]), credit=credit)
    assert responses(rollout, found.advantages)[0][1] == 0.25  # R - V^g
    first = {"gae": 0.5 + 0.5 * 0.25, "td": 0.5, "switch": 0.0}[credit]
    assert responses(rollout, found.advantages)[0][0] == first
    assert found.stats["critic_tokens"] == 0


@pytest.mark.parametrize("credit", ["gae", "td", "switch"])
def test_credit_does_not_concern_texts_that_the_policy_finished(credit: str) -> None:
    rollout = rollout_of(["xGPPP"])
    found = appraised(rollout, [1.0], policy_values=table(rollout, [0.7, 0.1, 0.2, 0.4]), credit=credit)
    assert responses(rollout, found.advantages) == [[0, 0.35, 0.5, 0.6]]


def test_where_the_policy_finishes_the_kl_penalty_is_part_of_the_reward() -> None:
    rollout = rollout_of(["xGPP"])
    kl = table(rollout, [50, 2, -1])  # what stands at the guide's token is nobody's
    found = appraised(rollout, [1.0], kl=kl, ppo__gae_lambda=0.0)
    assert responses(rollout, found.returns) == [[0, -0.2, 1.1]]
    found = appraised(rollout, [1.0], kl=kl, ppo__gae_lambda=1.0)
    assert responses(rollout, found.advantages) == [[0, 0.9, 1.1]]
    assert responses(rollout, found.kl) == [[0, 2, -1]]
    assert found.stats["kl_k1"] == pytest.approx(1)


@pytest.mark.parametrize("credit", ["gae", "td"])
def test_where_the_guide_finishes_the_kl_penalty_goes_to_its_own_token_and_to_no_value(credit: str) -> None:
    rollout = rollout_of(["xPPGG", "xPP"], "GG")
    kl = table(rollout, [2, 3, 50, 50], [1, 4])
    without = appraised(rollout, [1.0, 2.0], OWN_GUIDE, credit=credit)
    found = appraised(rollout, [1.0, 2.0], OWN_GUIDE, kl=kl, credit=credit)
    change = responses(rollout, found.advantages - without.advantages)
    assert change == [[-0.2, -0.3, 0, 0], [-0.1, -0.4]]
    assert torch.equal(found.returns, without.returns)
    assert torch.equal(found.values, without.values)


def test_the_penalty_is_added_before_whitening() -> None:
    rollout = rollout_of(["xPPGG", "xPPP"], "GG")
    kl = table(rollout, [2, 3, 0, 0], [1, 4, 9])
    raw = appraised(rollout, [1.0, 2.0], OWN_GUIDE, kl=kl).advantages[rollout.by_policy]
    white = appraised(rollout, [1.0, 2.0], OWN_GUIDE, kl=kl, ppo__whiten_advantages=True).advantages[rollout.by_policy]
    assert torch.allclose(white, (raw - raw.mean()) / raw.std(correction=0), atol=1e-5)


def test_lols_mixes_the_sampled_advantage_of_one_critic_with_one_step_of_the_other() -> None:
    rollout = rollout_of(["xGPP", "xPPG"], phases=[0, 1])
    policy_values = table(rollout, [0.9, 0.1, 0.3], [0.2, 0.4, 0.5])
    guide_values = table(rollout, [0.8, 0.4, 0.5], [0.1, 0.3, 0.6])
    shares = lols(0.5, 0.5, mixing_weight=0.25).build().schedule(0, 0.0)
    found = appraised(rollout, [1.0, 2.0], shares, policy_values, guide_values)
    # first text, V^pi: deltas .2, .7 so A = .55, .7; V^g, one step: .1, .5
    first = [0.25 * 0.55 + 0.75 * 0.1, 0.25 * 0.7 + 0.75 * 0.5]
    # second text, V^g: deltas .2, .3, 1.4 so A = .7, 1.0 (of the last two: .3 + .5 * 1.4); V^pi, one step: .2, .1
    second = [0.25 * 0.2 + 0.75 * 0.7, 0.25 * 0.1 + 0.75 * 1.0]
    expected = [[0, *[round(x, 5) for x in first]], [*[round(x, 5) for x in second], 0]]
    assert responses(rollout, found.advantages) == expected
    assert responses(rollout, found.returns) == [[0, 0.65, 1.0], [0, 0, 2.0]]  # mixing concerns no critic


def test_lols_counts_the_kl_penalty_of_a_token_once_in_each_advantage() -> None:
    rollout = rollout_of(["xGPP", "xPPG"], phases=[0, 1])
    kl = table(rollout, [0, 1, 2], [3, 4, 0])
    shares = lols(0.5, 0.5, mixing_weight=0.25).build().schedule(0, 0.0)
    without = appraised(rollout, [1.0, 2.0], shares)
    found = appraised(rollout, [1.0, 2.0], shares, kl=kl)
    change = responses(rollout, found.advantages - without.advantages)
    # first text: A^pi carries the second token's penalty back by lambda .5; A^g does not
    assert change == [[0, round(-0.1 - 0.25 * 0.1, 5), -0.2], [-0.3, -0.4, 0]]


def test_lols_whitens_once_over_the_texts_of_both_phases() -> None:
    rollout = rollout_of(["xGPP", "xPPG"], phases=[0, 1])
    shares = lols(0.5, 0.5, mixing_weight=0.25).build().schedule(0, 0.0)
    found = appraised(rollout, [1.0, 7.0], shares, ppo__whiten_advantages=True)
    both = found.advantages[rollout.by_policy]
    assert float(both.mean()) == pytest.approx(0, abs=1e-6)
    assert float(both.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert abs(float(found.advantages[0].sum())) > 0.5


@pytest.mark.parametrize("credit", ["gae", "td", "switch"])
def test_whitened_advantages_have_mean_zero_and_variance_one_over_the_trained_tokens(credit: str) -> None:
    rollout = rollout_of(["xPPGG", "xPPPG", "xPPGG"])
    found = appraised(
        rollout, [1.0, -1.0, 0.3], OWN_GUIDE, guide_values=torch.rand(3, 5), credit=credit, ppo__whiten_advantages=True
    )
    trained = rollout.trained_tokens(credit)
    assert float(found.advantages[trained].mean()) == pytest.approx(0, abs=1e-6)
    assert float(found.advantages[trained].std(correction=0)) == pytest.approx(1, abs=1e-4)
    assert not bool(found.advantages[~trained].any())


@pytest.mark.parametrize(("authors", "finishers"), [(["xGG", "xGGG"], "GG"), (["xPP", "xPPP"], "PP"), (["xPP", "xP"], "GG")])
@pytest.mark.parametrize("whiten", [True, False])
def test_texts_by_one_author_alone_are_no_special_case(authors: list[str], finishers: str, whiten: bool) -> None:
    rollout = rollout_of(authors, finishers)
    shares = OWN_GUIDE if "G" in finishers else OWN_POLICY
    for credit in ("gae", "td", "switch"):
        found = appraised(rollout, [1.0, 2.0], shares, credit=credit, ppo__whiten_advantages=whiten)
        for values in (found.advantages, found.returns, found.values, found.kl, found.old_log_probs):
            assert bool(values.isfinite().all())
        assert all(math.isfinite(value) for key, value in found.stats.items() if key != "score_policy_only")


DECODINGS = {
    "full softmax": SamplingParams(),
    "tempered": SamplingParams(temperature=0.6),
    "top-k": SamplingParams(top_k=4),
    "top-p": SamplingParams(top_p=0.7),
    "all of it": SamplingParams(temperature=1.5, top_k=7, top_p=0.8),
}


@pytest.mark.parametrize("sampling", DECODINGS.values(), ids=DECODINGS.keys())
def test_what_the_sampler_said_is_what_a_full_forward_says(sampling: SamplingParams) -> None:
    config = config_of(task__min_new_tokens=2, sampling={f: getattr(sampling, f) for f in ("temperature", "top_k", "top_p")})
    trainer = tiny_trainer(ppo_pp(0.5).build(), config)
    rollout = trainer.collect_rollout(0)
    assert int(rollout.by_policy.sum()) > 8
    sampled, full, _ = RolloutScorer(rollout, reading_of(config)).recompute(trainer.components.models.policy)
    assert torch.allclose(sampled, rollout.log_probs, atol=1e-5)
    assert torch.allclose(full, rollout.full_log_probs, atol=1e-5)
    if sampling.restricts_support or sampling.temperature != 1:
        assert not torch.allclose(sampled, full, atol=0.05)


def test_old_log_probabilities_come_from_the_sampler_or_from_a_full_forward() -> None:
    trainer = tiny_trainer(ppo().build(), config_of())
    rollout = trainer.collect_rollout(0)
    marked = replace(rollout, log_probs=rollout.log_probs - 1, full_log_probs=rollout.full_log_probs - 2)
    for source, support, expected in (
        ("sampler", "sampled", marked.log_probs),
        ("sampler", "full", marked.full_log_probs),
        ("recompute", "sampled", rollout.log_probs),
        ("recompute", "full", rollout.full_log_probs),
    ):
        config = config_of(ppo__old_log_probs=source, ppo__ratio_support=support)
        found = measure(marked, trainer.phase_weights(0), [0.0] * 8, trainer.components.models, config)
        assert torch.allclose(found.old_log_probs[rollout.by_policy], expected[rollout.by_policy], atol=1e-5), source


def test_the_penalty_compares_full_distributions_whatever_the_decoding() -> None:
    config = config_of(sampling={"temperature": 0.5, "top_k": 3})
    trainer = tiny_trainer(ppo().build(), config)
    rollout = trainer.collect_rollout(0)
    models = replace(trainer.components.models, reference=trainer.components.models.policy.frozen_copy())
    found = measure(rollout, trainer.phase_weights(0), [0.0] * 8, models, config)
    assert float(found.kl.abs().max()) < 1e-5
    assert float(found.old_log_probs.sum() - rollout.full_log_probs.sum()) > 1


ALGORITHMS = {
    "ppo_pp": ppo_pp(0.7).build(),
    "aggrevated": aggrevated(0.7, "td").build(),
    "lols": lols(0.7, 0.7, 0.5).build(),
    "d2lols": d2lols(0.7, 0.7, 1).build(),
}


@pytest.mark.parametrize("name", with_fast(ALGORITHMS, "aggrevated"))
def test_order_of_rows_padding_and_micro_batches_change_nothing(name: str) -> None:
    algorithm = ALGORITHMS[name]
    trainer = tiny_trainer(algorithm, config_of(), FunctionGuide(known_word))
    rollout, rewards = trainer.collect_rollout(0), torch.rand(8).tolist()
    models = trainer.components.models
    for critic in models.critics.values():
        torch.nn.init.normal_(critic.head.weight, std=0.1)
    config = config_of(ppo__old_log_probs="recompute")
    expected = measure(rollout, trainer.phase_weights(0), rewards, models, config, algorithm.credit)
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])

    def widen(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values, (0, 3))[order]

    moved = replace(
        rollout, ids=widen(rollout.ids), origin=widen(rollout.origin), log_probs=widen(rollout.log_probs),
        full_log_probs=widen(rollout.full_log_probs), switch_position=rollout.switch_position[order],
        rollout_by=rollout.rollout_by[order],
        phase=rollout.phase[order], ended_with_eos=rollout.ended_with_eos[order], index=rollout.index[order],
    )  # fmt: skip
    for budget in (1, 10**6):
        config = config_of(ppo__old_log_probs="recompute", runtime__token_budget=budget)
        found = measure(moved, trainer.phase_weights(0), [rewards[i] for i in order.tolist()], models, config, algorithm.credit)
        for name in ("old_log_probs", "reference_log_probs", "kl", "values", "returns", "advantages"):
            assert torch.allclose(getattr(found, name), widen(getattr(expected, name)), atol=1e-5), (name, budget)


def test_a_model_that_is_handed_over_in_training_mode_writes_and_is_read_without_dropout() -> None:
    policy = tiny_model(dropout=0.5)
    policy.model.train()
    trainer = tiny_trainer(ppo().build(), config_of(), policy=policy)
    rollout = trainer.collect_rollout(0)
    found = measure(
        rollout, trainer.phase_weights(0), [0.0] * 8, trainer.components.models, config_of(ppo__old_log_probs="recompute")
    )
    policy.model.eval()
    expected, _, _ = RolloutScorer(rollout, reading_of(config_of())).recompute(policy)
    assert torch.allclose(found.old_log_probs, expected, atol=1e-5)


def test_a_head_on_the_policys_trunk_takes_the_states_that_were_read_for_the_log_probabilities(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values: list[Tensor] = []
    reads: list[int] = []
    for old in ("sampler", "recompute"):
        trainer = tiny_trainer(ppo().build(), config_of(critic__kind="value_head", ppo__old_log_probs=old))
        critic = trainer.components.models.critics[POLICY]
        torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(0))
        rollout = trainer.collect_rollout(0)
        reads.append(0)
        model = trainer.components.models.policy.model
        with monkeypatch.context() as patch:
            forward = model.base_model.forward

            def counted(*arguments: Any, forward: Any = forward, **options: Any) -> Any:
                reads[-1] += 1
                return forward(*arguments, **options)

            patch.setattr(model.base_model, "forward", counted)
            found = experience.compute_log_probs(
                rollout, trainer.phase_weights(0), trainer.components.models, trainer.forward_config
            )
        values.append(found.values[POLICY])
    assert float(values[0].abs().max()) > 0.1
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-6)
    assert reads[0] == reads[1] > 0  # once for both, not once for each


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_with_a_group_every_trained_token_has_the_advantage_of_its_completion(kl: float) -> None:
    config = config_of(kl__coefficient=kl, ppo__samples_per_prompt=4)
    trainer = tiny_trainer(guided_grpo(0.5).build(), config)
    rollout = trainer.collect_rollout(0)
    found = trainer.make_experience(rollout, 0)
    rewards = found.score - kl * found.kl.sum(1)
    by_hand = torch.cat([(part - part.mean()) / (part.std() + 1e-4) for part in rewards.split(4)])
    torch.testing.assert_close(found.advantages, by_hand[:, None] * rollout.by_policy, rtol=0, atol=1e-5)
    assert torch.equal(found.trained, rollout.by_policy)
    assert not bool(found.values.any() or found.returns.any())
    assert found.stats["zero_variance_groups"] == 0
    moved = trainer.update(found, 0)
    assert moved["policy_grad_norm"] > 0
    assert "value_loss" not in moved


def test_groups_without_variance_are_counted_and_leave_the_policy_alone() -> None:
    config = config_of(kl__coefficient=0.0, ppo__samples_per_prompt=4)
    parts = tiny_parts(grpo().build(), config)
    trainer = Trainer(replace(parts, reward=lambda prompts, texts: [0.25] * len(texts)))
    before = parameters(trainer.components.models.policy.model)
    before = [value.clone() for value in before]
    experience = trainer.make_experience(trainer.collect_rollout(0), 0)
    assert experience.stats["zero_variance_groups"] == 1
    assert trainer.update(experience, 0)["policy_grad_norm"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, parameters(trainer.components.models.policy.model)))


def test_truncated_completions_are_not_trained_where_that_is_asked_for() -> None:
    trainer = tiny_trainer(ppo().build(), config_of(ppo__mask_truncated=True))
    rollout = trainer.collect_rollout(0)
    rollout = replace(rollout, ended_with_eos=torch.arange(8) % 2 == 0)
    found = trainer.make_experience(rollout, 0)
    assert bool(found.trained[::2].any())
    assert not bool(found.trained[1::2].any())
    assert not bool(found.advantages[1::2].any())
