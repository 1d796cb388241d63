"""Optimizer steps: the tokens that are trained, and every option of the algorithms."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rlgf.rl.update
from helpers import (
    StubCritic,
    config_of,
    descends_by_its_gradient,
    experience_of,
    farthest,
    lookup_critic,
    lookup_policy,
    measure,
    parameters,
    plain_config,
    rollout_of,
    tiny_model,
    tiny_trainer,
    uniform_policy,
    updater_of,
    with_fast,
)
from rlgf.algorithms import registry
from rlgf.algorithms.base import Algorithm
from rlgf.config.schema import Config
from rlgf.errors import ConfigError, TrainingError
from rlgf.models.forward import iter_logits
from rlgf.rl.experience import Models, RolloutScorer
from rlgf.rl.tensors import Experience, Rollout
from rlgf.supervised.examples import Example
from rlgf.trainer import Trainer
from rlgf.types import GUIDE, POLICY, Origin, SamplingParams

EMPTY: Sequence[Example] = ()


def step(models: Models, config: Config, experience: Experience, iteration: int = 0, targets: Sequence[Example] = EMPTY) -> Any:
    """One iteration at gradient descent with rate 1; returns its metrics."""
    return descends_by_its_gradient(updater_of(models, config, targets)).update(experience, iteration)


# --- who is trained on what -------------------------------------------------------------------------------------------

FAMILY: dict[str, Algorithm] = {"ppo": registry.ppo().build(), "ppo_pp": registry.ppo_pp(0.7).build()}
for _credit in ("gae", "td", "switch"):
    FAMILY[f"aggrevated {_credit}"] = registry.aggrevated(0.7, _credit).build()
    FAMILY[f"d2lols {_credit}"] = registry.d2lols(0.7, 0.7, 1, _credit).build()
    for _mix in ("advantage", "iteration"):
        FAMILY[f"lols {_mix} {_credit}"] = registry.lols(0.7, 0.7, 0.5, _mix, _credit).build()


def moved_rows(before: Tensor, after: Tensor) -> set[int]:
    return set((before != after).any(1).nonzero().squeeze(1).tolist())


def tokens_before(selected: Tensor) -> set[int]:
    """Return the ids of the tokens before the selected ones, if every token's id is its position."""
    return set((selected.flatten().nonzero().squeeze(1) - 1).tolist())


def written_by(trainer: Trainer, iteration: int) -> Rollout:
    """A rollout with a guide that writes `superb`, every token then given an id of its own."""
    rollout = trainer.collect_rollout(iteration)
    for ids, by_guide in zip(rollout.ids, rollout.by_guide):
        words = trainer.components.models.policy.tokenizer.convert_ids_to_tokens(ids[by_guide].tolist())
        assert set(words) <= {"superb", "<end>"}
    return replace(rollout, ids=torch.arange(rollout.ids.numel()).view(rollout.ids.shape))


@pytest.mark.parametrize("name", with_fast(FAMILY, "ppo", "ppo_pp", "aggrevated switch", "d2lols gae", "lols advantage td"))
def test_gradients_reach_the_trained_tokens_and_no_other(name: str) -> None:
    algorithm = FAMILY[name]
    trainer = tiny_trainer(algorithm, config_of(task__max_new_tokens=5))
    for iteration, kl_loss in ((0, 0.0), (1, 0.5)):
        rollout = written_by(trainer, iteration)
        size = rollout.ids.numel()
        rewards = torch.rand(8, generator=torch.Generator().manual_seed(iteration)).tolist()
        config = plain_config(kl__loss_coefficient=kl_loss)
        moved: list[list[set[int]]] = []
        for nonsense in (False, True):
            critics = {origin: lookup_critic(size) for origin in algorithm.critics}
            models = Models(lookup_policy(size), lookup_policy(size, seed=1), critics)
            shares = trainer.phase_weights(iteration)
            experience = measure(rollout, shares, rewards, models, config, algorithm.credit)
            if nonsense:  # whatever was measured of other tokens than the policy's is not even read
                mine, after = rollout.by_policy, rollout.after_switch
                experience = replace(
                    experience,
                    old_log_probs=experience.old_log_probs.masked_fill(~mine, torch.nan),
                    reference_log_probs=experience.reference_log_probs.masked_fill(~mine, torch.nan),
                    advantages=experience.advantages.masked_fill(~rollout.trained_tokens(algorithm.credit), torch.nan),
                    values=experience.values.masked_fill(~after, torch.nan),
                    returns=experience.returns.masked_fill(~after, torch.nan),
                )
            embeddings = [models.policy.model.embedding, *(critic.backbone.model.embedding for critic in critics.values())]
            before = [embedding.weight.detach().clone() for embedding in embeddings]
            step(models, config, experience, iteration)
            after_step = [embedding.weight.detach() for embedding in embeddings]
            assert all(bool(weight.isfinite().all()) for weight in after_step)
            moved.append([moved_rows(old, new) for old, new in zip(before, after_step)])
        assert moved[0] == moved[1]
        policy_moved, *critics_moved = moved[0]
        assert policy_moved == tokens_before(rollout.trained_tokens(algorithm.credit))
        assert policy_moved <= tokens_before(rollout.by_policy)
        for origin, critic_moved in zip(algorithm.critics, critics_moved):
            finished_by = (rollout.rollout_by == origin)[:, None]
            assert critic_moved == tokens_before(rollout.after_switch & finished_by)


@pytest.mark.parametrize("authors", [["xGG", "xGGG"], ["xxG"]])
def test_a_batch_by_the_guide_alone_leaves_the_policy_as_it_is_and_teaches_its_critic(authors: list[str]) -> None:
    rollout = rollout_of(authors)
    size = rollout.ids.numel()
    config = config_of(ppo__old_log_probs="recompute", kl__loss_coefficient=1.0, ppo__weight_decay=0.1, ppo__minibatch_size=1)
    models = Models(lookup_policy(size), lookup_policy(size, 1), {GUIDE: lookup_critic(size)})
    updater = updater_of(models, config)
    before, value_before = parameters(models.policy.model), parameters(models.critics[GUIDE])
    shares = registry.aggrevated(0.5).build().schedule(0, 0.0)
    experience = measure(rollout, shares, [1.0] * len(authors), models, config)
    stats = updater.update(experience, 0)
    assert all(math.isfinite(value) for value in stats.values())
    assert stats["policy_loss"] == stats["kl_loss"] == stats["first_ratio_error"] == 0
    assert farthest(before, parameters(models.policy.model)) == 0
    assert farthest(value_before, parameters(models.critics[GUIDE])) > 0
    assert not updater.policy_optimizer.state


def test_a_text_by_the_guide_does_not_let_the_policys_momentum_move_it() -> None:
    mine, others = rollout_of(["xPPP"]), rollout_of(["xGGG"])
    models = Models(lookup_policy(4), lookup_policy(4, 1), {GUIDE: lookup_critic(4), POLICY: lookup_critic(4)})
    config = config_of(ppo__old_log_probs="recompute", ppo__whiten_advantages=False)
    updater = updater_of(models, config)
    updater.update(measure(mine, registry.ppo().build().schedule(0, 0.0), [1.0], models, config), 0)
    before = parameters(models.policy.model)
    updater.update(measure(others, registry.aggrevated(0.5).build().schedule(1, 0.0), [1.0], models, config), 1)
    assert farthest(before, parameters(models.policy.model)) == 0


def test_texts_that_the_policy_wrote_to_the_end_for_the_guide_teach_no_critic() -> None:
    rollout = rollout_of(["xPP", "xPPP"], "GG")
    size = rollout.ids.numel()
    config = config_of(ppo__old_log_probs="recompute")
    models = Models(lookup_policy(size), lookup_policy(size, 1), {GUIDE: lookup_critic(size)})
    before, value_before = parameters(models.policy.model), parameters(models.critics[GUIDE])
    experience = measure(rollout, registry.aggrevated(1.0).build().schedule(0, 0.0), [1.0, 0.0], models, config)
    stats = updater_of(models, config).update(experience, 0)
    assert all(math.isfinite(value) for value in stats.values())
    assert farthest(before, parameters(models.policy.model)) > 0
    assert farthest(value_before, parameters(models.critics[GUIDE])) == 0


def test_order_of_rows_padding_and_micro_batches_do_not_change_losses_and_gradients() -> None:
    trainer = tiny_trainer(registry.lols(0.7, 0.7, 0.5).build(), config_of())
    rollout, shares = trainer.collect_rollout(0), trainer.phase_weights(0)
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])

    def widen(values: Tensor) -> Tensor:
        return nn.functional.pad(values, (0, 3))[order]

    moved = replace(
        rollout, ids=widen(rollout.ids), origin=widen(rollout.origin), log_probs=widen(rollout.log_probs),
        full_log_probs=widen(rollout.full_log_probs), switch_position=rollout.switch_position[order],
        rollout_by=rollout.rollout_by[order],
        phase=rollout.phase[order],
    )  # fmt: skip
    results: list[tuple[dict[str, float], list[Tensor]]] = []
    for texts, scores, budget in ((rollout, rewards, 10**6), (rollout, rewards, 1), (moved, rewards[order], 40)):
        models = tiny_trainer(registry.lols(0.7, 0.7, 0.5).build(), config_of()).components.models
        config = plain_config(runtime__token_budget=budget, kl__loss_coefficient=0.1)
        modules = [models.policy.model, *models.critics.values()]
        stats = step(models, config, measure(texts, shares, scores.tolist(), models, config))
        results.append((stats, [parameter for module in modules for parameter in parameters(module)]))
    (expected, weights), *others = results
    for stats, found in others:
        assert farthest(weights, found) < 1e-5
        for name in ("policy_loss", "value_loss", "kl_loss", "policy_grad_norm", "critic_grad_norm"):
            assert stats[name] == pytest.approx(expected[name], abs=1e-5), name


# --- identities of the family -----------------------------------------------------------------------------------------


def metrics_and_weights(algorithm: Algorithm, iterations: int = 2) -> tuple[list[dict[str, Any]], list[Tensor]]:
    trainer = tiny_trainer(algorithm, config_of())
    rows = [trainer.step(iteration)[0] for iteration in range(iterations)]
    kept = [{k: v for k, v in row.items() if "second" not in k} for row in rows]
    return kept, parameters(trainer.components.models.policy.model)


@pytest.mark.parametrize(
    "members",
    [
        (registry.ppo().build(), registry.ppo_pp(0.0).build()),
        (registry.ppo_pp(0.5).build(), registry.lols(0.5, 0.8, 1.0, "iteration").build(), registry.d2lols(0.5, 0.8, 0).build()),
        (
            registry.aggrevated(0.8, "td").build(),
            registry.lols(0.5, 0.8, 0.0, "iteration", "td").build(),
            registry.d2lols(0.5, 0.8, 100, "td").build(),
        ),
    ],
    ids=["the guide never begins", "only PPO++", "only AggreVaTeD"],
)
def test_algorithms_that_are_the_same_give_the_same_bits(members: Sequence[Algorithm]) -> None:
    (expected, expected_weights), *others = [metrics_and_weights(member) for member in members]
    for found, weights in others:
        assert [repr(row) for row in found] == [repr(row) for row in expected]
        assert all(torch.equal(a, b) for a, b in zip(weights, expected_weights))


def test_mixing_advantages_with_all_weight_on_one_still_trains_the_texts_that_the_guide_finishes() -> None:
    trainer = tiny_trainer(registry.lols(0.5, 0.8, 1.0, "advantage").build(), config_of())
    experience = trainer.make_experience(trainer.collect_rollout(0), 0)
    finished_by_guide = (experience.rollout.rollout_by == GUIDE)[:, None]
    assert bool((experience.advantages * finished_by_guide).any())


# --- the first ratio --------------------------------------------------------------------------------------------------

DECODINGS = {
    "full softmax": SamplingParams(),
    "tempered": SamplingParams(temperature=0.6),
    "top-k": SamplingParams(top_k=4),
    "top-p": SamplingParams(top_p=0.7),
    "all of it": SamplingParams(temperature=1.5, top_k=7, top_p=0.8),
}


@pytest.mark.parametrize("source", with_fast(["sampler", "recompute"], "sampler"))
@pytest.mark.parametrize(
    ("name", "support"), [*((name, "sampled") for name in DECODINGS), ("top-k", "full"), ("all of it", "full")]
)
def test_the_first_ratio_is_one_however_texts_were_sampled(name: str, support: str, source: str) -> None:
    sampling = DECODINGS[name]
    values = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    config = config_of(
        sampling=values, ppo__old_log_probs=source, ppo__ratio_support=support, ppo__check_first_ratio=True,
        task__min_new_tokens=2, ppo__minibatch_size=8, ppo__epochs=1,
    )  # fmt: skip
    metrics, _ = tiny_trainer(registry.ppo_pp(0.5).build(), config).step(0)
    assert metrics["first_ratio_error"] < 1e-4


def test_without_the_stored_support_the_first_ratio_would_be_wrong() -> None:
    config = config_of(sampling={"top_k": 4}, ppo__check_first_ratio=True)
    trainer = tiny_trainer(registry.ppo().build(), config)
    experience = trainer.make_experience(trainer.collect_rollout(0), 0)
    forgotten = replace(experience, rollout=replace(experience.rollout, support=None))
    with pytest.raises(TrainingError, match="first ratio"):
        trainer.updater.update(forgotten, 0)


def test_entropy_is_that_of_the_full_softmax_at_the_trained_tokens() -> None:
    trainer = tiny_trainer(
        registry.ppo_pp(0.5).build(), config_of(sampling__top_k=3, sampling__temperature=0.5, ppo__minibatch_size=8)
    )
    policy, rollout = trainer.components.models.policy, trainer.collect_rollout(0)
    ids, starts = rollout.ids, rollout.prompt_lengths
    expected = [
        torch.distributions.Categorical(logits=logits).entropy()
        for _, logits, _ in iter_logits(policy, ids, starts, rollout.by_policy, 1000, "fp32")
    ]
    stats = trainer.update(trainer.make_experience(rollout, 0), 0)
    assert stats["entropy"] == pytest.approx(float(torch.cat(expected).mean()), abs=1e-5)


def test_a_trainer_without_the_critic_that_its_algorithm_needs_is_refused() -> None:
    trainer = tiny_trainer(registry.d2lols(0.5, 0.5, 1).build(), config_of())
    models = trainer.components.models
    lacking = replace(trainer.components, models=replace(models, critics={POLICY: models.critics[POLICY]}))
    with pytest.raises(ConfigError, match="D2LOLS needs a critic for rollouts by the guide"):
        Trainer(lacking)


def test_dropout_is_off_unless_it_is_asked_for() -> None:
    for dropout in (False, True):
        policy = tiny_model(dropout=0.5)
        metrics, _ = tiny_trainer(registry.ppo().build(), config_of(ppo__dropout=dropout), policy=policy).step(0)
        assert (metrics["first_ratio_error"] > 1e-2) == dropout
        assert not policy.model.training  # texts are never written with dropout


def test_the_check_of_the_first_ratio_stops_a_run_and_is_off_by_default() -> None:
    config = config_of(ppo__dropout=True, ppo__check_first_ratio=True)
    with pytest.raises(TrainingError, match="recompute"):
        tiny_trainer(registry.ppo().build(), config, policy=tiny_model(dropout=0.5)).step(0)
    assert not Config().ppo.check_first_ratio


# --- losses, by hand --------------------------------------------------------------------------------------------------


def by_hand(rollout: Rollout, advantages: Sequence[Sequence[float]], **measured: Tensor) -> tuple[Models, Experience]:
    """A uniform policy and critic, ratios of 1, and the given advantages at the response tokens."""
    size = rollout.ids.numel()
    values = torch.zeros(rollout.ids.shape)
    for i, row in enumerate(advantages):
        values[i, 1 : 1 + len(row)] = torch.tensor(row)
    models = Models(uniform_policy(size), uniform_policy(size), {POLICY: StubCritic(torch.full(rollout.ids.shape, 0.5))})
    uniform = torch.full(rollout.ids.shape, -math.log(size))
    return models, experience_of(rollout, **{"advantages": values, "old_log_probs": uniform, **measured})


@pytest.mark.parametrize(
    ("aggregation", "policy_loss", "value_loss"),
    [("token_mean", -(4 + 1 + 2 + 6) / 4, 0.125), ("sequence_mean", -(4 + (1 + 2 + 6) / 3) / 2, 0.125)],
)
def test_losses_are_means_over_tokens_or_over_texts(aggregation: str, policy_loss: float, value_loss: float) -> None:
    models, experience = by_hand(rollout_of(["xP", "xPPP"]), [[4], [1, 2, 6]])
    stats = step(models, plain_config(ppo__loss_aggregation=aggregation, critic__value_clip=None), experience)
    assert stats["policy_loss"] == pytest.approx(policy_loss)
    assert stats["value_loss"] == pytest.approx(value_loss)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_values_are_averaged_as_the_policys_loss_is(aggregation: str) -> None:
    rollout = rollout_of(["xP", "xGPPP"])
    models, experience = by_hand(rollout, [], returns=torch.tensor([[0, 1.5, 0, 0, 0], [0, 0, 0.5, 0.5, 2.5]]))
    config = plain_config(ppo__loss_aggregation=aggregation, critic__value_clip=None)
    expected = {"token_mean": 0.5 * (1 + 4) / 4, "sequence_mean": 0.5 * (1 + 4 / 3) / 2}[aggregation]
    assert step(models, config, experience)["value_loss"] == pytest.approx(expected)


def test_a_mean_counts_its_tokens_over_the_whole_optimizer_step() -> None:
    rollout = rollout_of(["xP", "xPPP", "xGP"])
    for budget in (1, 10**6):
        models, experience = by_hand(rollout, [[4], [1, 2, 6], [0, 2]])
        stats = step(models, plain_config(runtime__token_budget=budget), experience)
        assert stats["policy_loss"] == pytest.approx(-15 / 5)


@pytest.mark.parametrize(("clip", "loss", "share"), [(0.2, 0.32, 1.0), (None, 0.125, 0.0), (0.7, 0.125, 0.0)])
def test_the_value_loss_is_the_larger_of_clipped_and_unclipped(clip: float | None, loss: float, share: float) -> None:
    # the critic says .5, said 0 before, and should say 1: clipped to .2 the error is .8
    models, experience = by_hand(rollout_of(["xPP"]), [], returns=torch.ones(1, 3))
    stats = step(models, plain_config(critic__value_clip=clip), experience)
    assert stats["value_loss"] == pytest.approx(loss)
    assert stats["value_clip_fraction"] == pytest.approx(share)


def test_the_value_loss_is_a_mean_over_the_steps_that_had_states_to_fit() -> None:
    # a row that the policy wrote to its end for the guide has none, and is a step of its own here
    config = plain_config(ppo__minibatch_size=1, critic__value_clip=0.2)
    models, experience = by_hand(rollout_of(["xP", "xPP"], "GP"), [], returns=torch.ones(2, 3))
    stats = step(models, config, experience)
    assert stats["optimizer_steps"] == 2
    assert stats["value_loss"] == pytest.approx(0.32)
    assert stats["value_clip_fraction"] == pytest.approx(1)
    models, experience = by_hand(rollout_of(["xP", "xPP"], "GG"), [])
    assert not {"value_loss", "value_clip_fraction"} & step(models, config, experience).keys()


def test_the_value_loss_is_the_same_mean_for_every_kind_of_critic() -> None:
    found: list[dict[str, float]] = []
    for kind in ("separate", "value_head"):
        still = {"ppo__learning_rate": 0.0, "critic__learning_rate": 0.0, "ppo__minibatch_size": 1, "ppo__epochs": 1}
        trainer = tiny_trainer(registry.aggrevated(1.0).build(), config_of(critic__kind=kind, **still))
        rollout = trainer.collect_rollout(0)
        assert 0 < int(rollout.after_switch.any(1).sum()) < len(rollout.ids)
        found.append(trainer.update(trainer.make_experience(rollout, 0), 0))
    for key in ("value_loss", "value_clip_fraction"):
        assert found[0][key] == pytest.approx(found[1][key], abs=1e-5), key


@pytest.mark.parametrize(
    ("advantage", "old_shift", "loss"),
    [
        (1.0, 0.5, -1.2),
        (-1.0, 0.5, math.exp(0.5)),
        (1.0, -0.5, -math.exp(-0.5)),
        (-1.0, -0.5, 0.8),
        (2.0, 0.1, -2 * math.exp(0.1)),
    ],
)
def test_the_surrogate_is_clipped_on_the_side_that_would_gain(advantage: float, old_shift: float, loss: float) -> None:
    models, experience = by_hand(rollout_of(["xP"]), [[advantage]])
    shifted = replace(experience, old_log_probs=experience.old_log_probs - old_shift)
    assert step(models, plain_config(), shifted)["policy_loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize(("estimator", "expected"), [("k2", 0.5 * 0.3**2), ("k3", math.exp(-0.3) + 0.3 - 1)])
def test_the_kl_loss_by_hand(estimator: str, expected: float) -> None:
    models, experience = by_hand(rollout_of(["xPP", "xGP"]), [])
    farther = replace(experience, reference_log_probs=experience.old_log_probs - 0.3)
    config = plain_config(kl__loss_coefficient=2.0, kl__loss_estimator=estimator)
    assert step(models, config, farther)["kl_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_kl_loss_pulls_the_policy_to_its_reference(estimator: str) -> None:
    rollout = rollout_of(["xPPPPP", "xGPPPP"])
    policy, reference = lookup_policy(12), lookup_policy(12, 1)
    with torch.no_grad():
        reference.model.embedding.weight.copy_(policy.model.embedding.weight + 0.1)
    models = Models(policy, reference, {POLICY: lookup_critic(12)})
    config = plain_config(
        kl__loss_coefficient=0.05, kl__loss_estimator=estimator, kl__coefficient=0.0, ppo__whiten_advantages=False,
        critic__learning_rate=0.0,
    )  # fmt: skip

    def distance() -> float:
        experience = measure(rollout, registry.ppo().build().schedule(0, 0.0), [0.0, 0.0], models, config)
        return float(experience.kl.square().sum())

    before = distance()
    for iteration in range(5):
        experience = measure(rollout, registry.ppo().build().schedule(0, 0.0), [0.0, 0.0], models, config)
        step(models, config, replace(experience, advantages=torch.zeros(rollout.ids.shape)), iteration)
    assert distance() < before


# --- optimizers -------------------------------------------------------------------------------------------------------


def test_adam_has_its_own_epsilon_for_every_model() -> None:
    updater = tiny_trainer(registry.lols(0.5, 0.5, 0.5).build(), config_of()).updater
    optimizers = [updater.policy_optimizer, *updater.critic_optimizers.values()]
    assert len(optimizers) == 3
    assert {group["eps"] for optimizer in optimizers for group in optimizer.param_groups} == {1e-5}
    trainer = tiny_trainer(registry.ppo().build(), config_of(ppo__adam_epsilon=1e6))
    before = parameters(trainer.components.models.policy.model)
    trainer.step(0)
    assert farthest(before, parameters(trainer.components.models.policy.model)) < 1e-6


def test_policy_and_critic_have_learning_rates_of_their_own_and_a_common_schedule() -> None:
    config = config_of(
        ppo__schedule="linear", ppo__iterations=2, ppo__learning_rate=1e-2, critic__learning_rate=4e-3, ppo__minibatch_size=8,
        ppo__epochs=2,
    )  # fmt: skip
    trainer = tiny_trainer(registry.ppo().build(), config)
    for iteration, last in ((0, 0.75), (1, 0.25)):  # four steps in all, the factors 1, .75, .5, .25
        metrics, _ = trainer.step(iteration)
        assert metrics["learning_rate"] == pytest.approx(1e-2 * (last + 0.125))
        assert trainer.updater.policy_optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * last)
        assert trainer.updater.critic_optimizers[POLICY].param_groups[0]["lr"] == pytest.approx(4e-3 * last)


def test_a_constant_schedule_is_constant() -> None:
    trainer = tiny_trainer(registry.ppo().build(), config_of())
    assert [trainer.step(iteration)[0]["learning_rate"] for iteration in range(2)] == [pytest.approx(1e-2)] * 2


def test_gradients_are_clipped_for_each_model_by_itself() -> None:
    config = plain_config(ppo__max_grad_norm=1e-2, ppo__completions_per_iteration=8)
    trainer = tiny_trainer(registry.ppo().build(), config)
    models = trainer.components.models
    descends_by_its_gradient(trainer.updater)
    modules = [models.policy.model, models.critics[POLICY]]
    before = [parameters(module) for module in modules]
    metrics, _ = trainer.step(0)
    for old, module in zip(before, modules):
        length = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(old, parameters(module))))
        assert length == pytest.approx(1e-2, rel=1e-2)
    assert min(metrics["policy_grad_norm"], metrics["critic_grad_norm"]) > 2e-2  # as they were before


@pytest.mark.integration
def test_epochs_stop_early_once_the_policy_has_moved_too_far() -> None:
    for target, stops in ((None, False), (1e-6, True), (1e6, False)):
        metrics, _ = tiny_trainer(registry.ppo().build(), config_of(ppo__target_kl=target, ppo__epochs=3)).step(0)
        assert metrics["stopped_early"] == float(stops)
        assert (metrics["optimizer_steps"] == 6) != stops


def test_an_early_stop_shifts_no_later_draw_and_no_schedule() -> None:
    config = config_of(ppo__target_kl=1e-6, ppo__schedule="linear", ppo__iterations=2, ppo__epochs=1, ppo__minibatch_size=2)
    trainer = tiny_trainer(registry.ppo().build(), config)
    assert trainer.step(0)[0]["optimizer_steps"] < 4
    trainer.updater.forward_config = replace(trainer.updater.forward_config, ppo=replace(config.ppo, target_kl=None))
    trainer.step(1)
    assert trainer.updater.policy_optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 8)


# --- critics ----------------------------------------------------------------------------------------------------------


def test_a_head_on_the_policys_trunk_has_one_optimizer_with_it() -> None:
    trainer = tiny_trainer(registry.ppo_pp(0.5).build(), config_of(critic__kind="value_head"))
    critic = trainer.components.models.critics[POLICY]
    assert critic.backbone is None
    assert not trainer.updater.critic_optimizers
    before = parameters(critic)
    metrics, _ = trainer.step(0)
    assert metrics["first_ratio_error"] < 1e-4
    assert metrics["value_loss"] > 0
    assert farthest(before, parameters(critic)) > 0


def trunk_changes(config: Config, critic_weight: float = 0.3) -> tuple[list[Tensor], list[Tensor], dict[str, float]]:
    """Return the changes of policy and head by a step with zero advantages, and its metrics."""
    trainer = tiny_trainer(registry.ppo().build(), config)
    models = trainer.components.models
    nn.init.constant_(models.critics[POLICY].head.weight, critic_weight)
    rollout = trainer.collect_rollout(0)
    experience = measure(rollout, trainer.phase_weights(0), [3.0] * 8, models, config)
    modules = [models.policy.model, models.critics[POLICY]]
    before = [parameters(module) for module in modules]
    stats = step(models, config, replace(experience, advantages=torch.zeros(rollout.ids.shape)))
    return *([a - b for a, b in zip(old, parameters(module))] for old, module in zip(before, modules)), stats  # type: ignore


def test_the_value_coefficient_scales_what_values_do_to_a_shared_trunk() -> None:
    once = trunk_changes(plain_config(critic__kind="value_head", critic__value_coefficient=0.01))
    twice = trunk_changes(plain_config(critic__kind="value_head", critic__value_coefficient=0.02))
    for one, two in zip(once[:2], twice[:2]):
        assert max(float(change.abs().max()) for change in one) > 1e-4
        assert farthest([2 * change for change in one], two) < 1e-5


def test_a_shared_trunk_has_the_values_and_the_value_loss_of_a_separate_one() -> None:
    separate, shared = (plain_config(critic__kind=kind) for kind in ("separate", "value_head"))
    assert trunk_changes(separate)[2]["value_loss"] == pytest.approx(trunk_changes(shared)[2]["value_loss"], abs=1e-5)
    assert farthest(trunk_changes(separate)[0], [torch.zeros(())] * 99) == 0


def test_during_warm_up_only_the_critic_learns() -> None:
    trainer = tiny_trainer(registry.ppo().build(), config_of(critic__warmup_iterations=1, ppo__mle_coefficient=1.0))
    models = trainer.components.models
    policy, critic = parameters(models.policy.model), parameters(models.critics[POLICY])
    trainer.step(0)
    assert farthest(policy, parameters(models.policy.model)) == 0
    assert farthest(critic, parameters(models.critics[POLICY])) > 0
    trainer.step(1)
    assert farthest(policy, parameters(models.policy.model)) > 0


def test_during_warm_up_a_shared_trunk_stays_as_it_is() -> None:
    trainer = tiny_trainer(registry.ppo().build(), config_of(critic__warmup_iterations=1, critic__kind="value_head"))
    models = trainer.components.models
    nn.init.constant_(models.critics[POLICY].head.weight, 0.3)
    policy, critic = parameters(models.policy.model), parameters(models.critics[POLICY])
    trainer.step(0)
    assert farthest(critic, parameters(models.critics[POLICY])) > 0
    assert farthest(policy, parameters(models.policy.model)) == 0  # or the policy would have moved before it learns


@pytest.mark.parametrize("warm", [True, False])
def test_v_pi_may_start_as_a_copy_of_v_g_where_the_policy_first_finishes(warm: bool) -> None:
    trainer = tiny_trainer(registry.d2lols(0.5, 0.8, 1).build(), config_of(critic__warm_start_from_guide=warm))
    critics = trainer.components.models.critics
    initial = parameters(critics[POLICY])
    trainer.step(0)
    guide = parameters(critics[GUIDE])
    assert farthest(initial, parameters(critics[POLICY])) == 0
    assert farthest(initial, guide) > 0
    trainer.make_experience(trainer.collect_rollout(1), 1)
    assert farthest(guide if warm else initial, parameters(critics[POLICY])) == 0
    trainer.step(1)
    learned = parameters(critics[POLICY])
    trainer.make_experience(trainer.collect_rollout(2), 2)  # not copied again
    assert farthest(learned, parameters(critics[POLICY])) == 0
    assert farthest(guide, parameters(critics[GUIDE])) == 0


# --- maximum likelihood -----------------------------------------------------------------------------------------------


def drawn_targets(monkeypatch: pytest.MonkeyPatch, authors: str, algorithm: Algorithm, **values: Any) -> list[list[int]]:
    """The batches of the MLE term over two iterations of texts with these authors; targets are known by their first id."""
    batches: list[list[int]] = []

    def note(model: Any, batch: Sequence[Example], *rest: Any) -> float:
        batches.append([example.ids[0] for example in batch])
        return 0.0

    config = config_of(ppo__old_log_probs="recompute", **values)
    rollout = rollout_of([authors] * 8)
    size = rollout.ids.numel()
    models = Models(lookup_policy(size), lookup_policy(size, 1), {o: lookup_critic(size) for o in algorithm.critics})
    updater = updater_of(models, config, [Example([i, 0], 1) for i in range(30)])
    with monkeypatch.context() as patch:
        patch.setattr(rlgf.rl.update, "nll_backward", note)
        for iteration in range(2):
            experience = measure(rollout, algorithm.schedule(iteration, 0.0), [1.0] * 8, models, config)
            updater.update(experience, iteration)
    return batches


def test_targets_are_drawn_for_each_step_whatever_the_rollouts_are(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = drawn_targets(monkeypatch, "xPPP", registry.ppo().build(), ppo__mle_coefficient=0.5, ppo__mle_batch=5)
    other = drawn_targets(monkeypatch, "xGG", registry.aggrevated(0.8).build(), ppo__mle_coefficient=0.5, ppo__mle_batch=5)
    assert batches == other
    assert [len(batch) for batch in batches] == [5] * 8  # two iterations of two epochs of two minibatches
    assert len({str(batch) for batch in batches}) == 8
    default = drawn_targets(monkeypatch, "xPPP", registry.ppo().build(), ppo__mle_coefficient=0.5)
    assert {len(batch) for batch in default} == {4}  # the minibatch size
    assert drawn_targets(monkeypatch, "xPPP", registry.ppo().build()) == []


def test_the_likelihood_term_is_the_token_mean_times_its_coefficient() -> None:
    rollout = rollout_of(["xGG"])
    targets = [Example([1, 2, 0], 1), Example([2, 1, 1, 2, 0], 2)]
    changes: list[list[Tensor]] = []
    for coefficient in (0.1, 0.2):
        models = Models(lookup_policy(3), lookup_policy(3, 1), {GUIDE: lookup_critic(3)})
        before = parameters(models.policy.model)
        config = plain_config(ppo__mle_coefficient=coefficient, ppo__mle_batch=6)
        experience = measure(rollout, registry.aggrevated(0.5).build().schedule(0, 0.0), [1.0], models, config)
        updater = updater_of(models, config, targets)
        batch = updater._mle_batch(0)
        log_probs = models.policy.model(torch.arange(3)).logits.log_softmax(-1).detach()
        terms = [-float(log_probs[a, b]) for e in batch for a, b in list(zip(e.ids, e.ids[1:]))[e.start - 1 :]]
        stats = descends_by_its_gradient(updater).update(experience, 0)
        assert stats["mle_loss"] == pytest.approx(sum(terms) / len(terms), rel=1e-5)
        changes.append([a - b for a, b in zip(before, parameters(models.policy.model))])
    assert farthest([2 * change for change in changes[0]], changes[1]) < 1e-5
    assert farthest(changes[0], [torch.zeros(())] * 9) > 1e-3


def test_likelihood_raises_the_probability_of_the_targets() -> None:
    trainer = tiny_trainer(
        registry.ppo().build(), config_of(ppo__mle_coefficient=1.0, ppo__mle_batch=8, ppo__learning_rate=3e-3)
    )
    losses = [trainer.step(iteration)[0]["mle_loss"] for iteration in range(3)]
    assert losses[2] < losses[0]


# --- defaults ---------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_specification() -> None:
    ppo, kl, critic = Config().ppo, Config().kl, Config().critic
    assert (ppo.dropout, ppo.check_first_ratio, ppo.old_log_probs, ppo.ratio_support) == (False, False, "sampler", "sampled")
    assert (ppo.whiten_advantages, ppo.loss_aggregation, ppo.target_kl) == (True, "token_mean", None)
    assert (ppo.adam_epsilon, ppo.max_grad_norm, ppo.schedule, ppo.mle_coefficient) == (1e-5, 1.0, "constant", 0.0)
    assert (kl.controller, kl.loss_coefficient) == ("fixed", 0.0)
    assert (critic.kind, critic.value_clip, critic.warmup_iterations) == ("separate", 0.2, 0)


def test_an_adaptive_coefficient_follows_the_kl_of_every_iteration() -> None:
    config = config_of(kl__controller="adaptive", kl__target=1e-6, kl__horizon=80, ppo__learning_rate=0.0)
    trainer = tiny_trainer(registry.ppo().build(), config)
    found = [trainer.step(iteration)[0]["kl_coefficient"] for iteration in range(3)]
    # far above the target the error is .2, and 8 of 80 texts are a tenth of the horizon
    assert found == pytest.approx([0.05, 0.05 * 1.02, 0.05 * 1.02**2])


def test_recomputed_log_probabilities_follow_the_policy() -> None:
    trainer = tiny_trainer(registry.ppo().build(), config_of())
    rollout = trainer.collect_rollout(0)
    before, _, _ = RolloutScorer(rollout, trainer.forward_config).recompute(trainer.components.models.policy)
    trainer.step(0)
    after, _, _ = RolloutScorer(rollout, trainer.forward_config).recompute(trainer.components.models.policy)
    assert not torch.allclose(before, after, atol=1e-3)
    assert Origin(int(rollout.rollout_by[0])) is POLICY


def test_dropout_depends_on_seed_and_iteration_alone() -> None:
    """A resumed process has another state of torch's generator, which checkpoints do not hold."""
    ends = list[list[Tensor]]()
    for before in (1, 2):
        trainer = tiny_trainer(registry.ppo().build(), config_of(ppo__dropout=True), policy=tiny_model(dropout=0.3))
        for iteration in range(2):
            torch.manual_seed(before)
            trainer.step(iteration)
        ends.append(parameters(trainer.components.models.policy.model))
    assert all(torch.equal(one, other) for one, other in zip(*ends))
