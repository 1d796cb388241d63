"""Losses and advantages of TRL's GRPO and RLOO equal ours (TRL 1.16: make test-peers)."""

import copy
import types
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import config_of, reading_of, tiny_parts, updater_of
from rlgf.algorithms import losses
from rlgf.algorithms.advantages import group_advantages
from rlgf.algorithms.baselines import GroupAdvantage, GroupBaseline
from rlgf.algorithms.registry import grpo
from rlgf.config.schema import Config
from rlgf.rl.experience import compute_log_probs, make_experience
from rlgf.rl.tensors import Experience, Rollout
from rlgf.types import POLICY, Origin, Prompt

pytestmark = pytest.mark.peers
ROWS, WIDTH, GROUP = 8, 6, 4
TOLERANCE = 1e-5


def noise(seed: int) -> Tensor:
    return 0.3 * torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def completion_mask() -> Tensor:
    lengths = torch.tensor([6, 3, 1, 5, 2, 6, 4, 3])
    return torch.arange(WIDTH) < lengths[:, None]


class Accelerator:
    """One process, for TRL's metrics."""

    num_processes, sync_gradients = 1, True

    def gather(self, value: Tensor) -> Tensor:
        """Return the value."""
        return value

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        """Return the value."""
        return value


def trl_loss(kind: str, log_probs: Tensor, inputs: Mapping[str, Tensor], **settings: Any) -> Tensor:
    """Compute TRL's loss of per-token log-probabilities, by the method of its trainer."""
    import trl.trainer.grpo_trainer as grpo_module
    import trl.trainer.rloo_trainer as rloo_module

    method = rloo_module.RLOOTrainer._compute_loss if kind == "rloo" else grpo_module.GRPOTrainer._compute_loss
    arguments = types.SimpleNamespace(
        use_bias_correction_kl=True, delta=settings.get("delta"), steps_per_generation=1, entropy_target=None,
    )  # fmt: skip
    trainer = types.SimpleNamespace(
        args=arguments, accelerator=Accelerator(), model=types.SimpleNamespace(training=True), aux_loss_enabled=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, _entropy_bonus_enabled=False,
        importance_sampling_level=settings.get("level", "token"), beta=settings.get("beta", 0.0), loss_type=kind,
        epsilon_low=settings.get("low", 0.2), epsilon_high=settings.get("high", 0.2), max_completion_length=WIDTH,
        current_gradient_accumulation_steps=1, _metrics={"train": defaultdict(list)}, use_adaptive_entropy=False,
        _get_per_token_logps_and_entropies=lambda *a, **o: (log_probs, torch.zeros_like(log_probs), None),
    )  # fmt: skip
    return method(trainer, None, dict(inputs))


# kind of TRL; its settings; ours in the section ppo
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("grpo", {}, {"loss_aggregation": "sequence_mean"}),
    ("grpo", {"beta": 0.07}, {"loss_aggregation": "sequence_mean"}),
    ("grpo", {"low": 0.1, "high": 0.3}, {"loss_aggregation": "sequence_mean", "clip_range": 0.1, "clip_range_high": 0.3}),
    ("grpo", {"delta": 1.5}, {"loss_aggregation": "sequence_mean", "dual_clip": 1.5}),
    ("grpo", {"level": "sequence", "low": 3e-2, "high": 4e-2},
     {"loss_aggregation": "sequence_mean", "ratio_level": "sequence", "clip_range": 3e-2, "clip_range_high": 4e-2}),
    ("bnpo", {}, {"loss_aggregation": "token_mean"}),
    ("dapo", {"high": 0.28}, {"loss_aggregation": "token_mean", "clip_range_high": 0.28}),
    ("dr_grpo", {}, {"loss_aggregation": "constant"}),
    ("cispo", {"high": 1.3}, {"loss_aggregation": "token_mean", "surrogate": "cispo", "clip_range_high": 0.3}),
    ("rloo", {}, {"loss_aggregation": "sequence_mean", "ratio_level": "sequence_sum"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "settings", "ppo"), CASES)
def test_a_loss_and_its_gradient_are_those_of_trl(kind: str, settings: dict[str, Any], ppo: dict[str, Any]) -> None:
    selected, old, reference = completion_mask(), noise(2) - 2, noise(3) - 2
    advantages = torch.randn(ROWS, generator=torch.Generator().manual_seed(4))
    theirs, ours = ((noise(1) - 2).requires_grad_() for _ in range(2))
    inputs = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.int64), "prompt_mask": torch.ones(ROWS, 1, dtype=torch.int64),
        "completion_ids": torch.zeros(ROWS, WIDTH, dtype=torch.int64), "completion_mask": selected.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": reference,
        "num_items_in_batch": selected.sum(), "old_logps": (old * selected).sum(1),
    }  # fmt: skip
    expected = trl_loss(kind, theirs, inputs, **settings)
    expected.backward()
    found = our_loss(config_of(**{f"ppo__{name}": value for name, value in ppo.items()}), settings.get("beta", 0.0))(
        ours, old, reference, advantages, selected
    )
    found.backward()
    assert float(found) == pytest.approx(float(expected), abs=TOLERANCE)
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad * selected, rtol=0, atol=TOLERANCE)


def our_loss(config: Config, beta: float) -> Any:
    """Return the library's loss of an optimizer step, as a function of log-probabilities."""

    def loss(log_probs: Tensor, old: Tensor, reference: Tensor, advantages: Tensor, selected: Tensor) -> Tensor:
        parts = tiny_parts(grpo().build(), config_of(ppo__samples_per_prompt=GROUP))
        updater = updater_of(parts.models, config)
        updater.forward_config = replace(updater.forward_config, max_new_tokens=WIDTH)
        updater.kl = replace(updater.kl, loss_coefficient=beta, loss_estimator="k3")
        rows, columns = selected.nonzero(as_tuple=True)
        ids = torch.zeros(ROWS, WIDTH, dtype=torch.int64)
        origin = torch.where(selected, int(POLICY), int(Origin.PAD)).to(torch.uint8)
        rollout = Rollout(
            [Prompt("")] * ROWS, [""] * ROWS, ids, origin, torch.zeros(ROWS, dtype=torch.int64),
            torch.full((ROWS,), int(POLICY), dtype=torch.uint8), torch.zeros(ROWS, dtype=torch.int64),
            torch.ones(ROWS, dtype=torch.bool), torch.arange(ROWS), torch.arange(ROWS) // GROUP, old, old, None, 0,
        )  # fmt: skip
        zeros = torch.zeros(ROWS, WIDTH)
        experience = Experience(
            rollout, selected, torch.zeros(ROWS), old, reference, zeros, zeros, zeros, advantages[:, None] * selected
        )
        # logits whose softmax gives token 0 these log-probabilities: log p and log(1 − p)
        given = log_probs[rows, columns]
        logits = torch.stack([given, torch.log1p(-given.exp())], 1)
        weights = updater._token_weights(selected)[rows, columns]  # pyright: ignore[reportPrivateUsage]
        sums = dict.fromkeys(("policy_loss", "clip_fraction", "approx_kl", "ratio_error", "kl_loss"), 0.0)
        return updater._surrogate(experience, rows, columns, logits, weights, sums)  # pyright: ignore[reportPrivateUsage]

    return loss


@pytest.mark.parametrize(
    ("advantage", "scale"), [("group_normalized", "group"), ("group_mean", "none")]
)  # of TRL: scale_rewards
def test_a_whole_iteration_of_grpo_has_the_gradient_of_trl(advantage: str, scale: str, tmp_path: Any) -> None:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    config = config_of(
        ppo__samples_per_prompt=GROUP, ppo__loss_aggregation="sequence_mean", ppo__minibatch_size=ROWS, ppo__epochs=1,
        kl__coefficient=0.0, algorithm__name="grpo", algorithm__options__grpo__normalize=advantage == "group_normalized",
        runtime__token_budget=64,
    )  # fmt: skip
    parts = tiny_parts(config.algorithm.build(), config)
    policy = parts.models.policy
    captured: dict[str, Any] = {}

    def reward(completion_ids: Any, **columns: Any) -> list[float]:
        return [sum(map(int, ids)) % 7 / 3 for ids in completion_ids]

    class Capturing(GRPOTrainer):
        """TRL's trainer, which keeps what it trains on and the gradient."""

        def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
            captured["inputs"] = {key: value.clone() for key, value in inputs.items() if isinstance(value, Tensor)}
            return super()._compute_loss(model, inputs)

        def training_step(self, model: Any, *arguments: Any) -> Tensor:
            loss = super().training_step(model, *arguments)
            captured["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            return loss

    arguments = GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=ROWS, num_generations=GROUP, beta=0.0,
        max_completion_length=WIDTH, learning_rate=1e-9, loss_type="grpo", scale_rewards=scale, use_cpu=True, bf16=False,
        report_to=[], save_strategy="no", seed=1, gradient_checkpointing=False, temperature=1.0, max_grad_norm=1e9,
        disable_dropout=True, shuffle_dataset=False,
    )  # fmt: skip
    dataset = Dataset.from_dict({"prompt": list(dict.fromkeys(prompt.text for prompt in parts.task.train))})
    tokenizer = policy.tokenizer
    trainer = Capturing(
        model=copy.deepcopy(policy.model), reward_funcs=reward, args=arguments, train_dataset=dataset,
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    inputs = captured["inputs"]  # in an order of their own

    def tokens(part: str) -> list[list[int]]:
        return [ids[mask.bool()].tolist() for ids, mask in zip(inputs[f"{part}_ids"], inputs[f"{part}_mask"])]

    prompts, completions = tokens("prompt"), tokens("completion")
    groups = [prompts.index(prompt) for prompt in prompts]
    assert sorted(map(groups.count, groups)) == [GROUP] * ROWS
    rewards = torch.tensor(reward(completions))
    rows = [prompt + completion for prompt, completion in zip(prompts, completions)]
    starts = inputs["prompt_mask"].sum(1)
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    lengths = torch.tensor(list(map(len, rows)))
    columns = torch.arange(width)
    by_policy = (columns >= starts[:, None]) & (columns < lengths[:, None])
    origin = torch.where(by_policy, int(POLICY), int(Origin.PROMPT)) * (columns < lengths[:, None])
    zeros = torch.zeros(ids.shape)
    rollout = Rollout(
        [Prompt("")] * ROWS, [""] * ROWS, ids, origin.to(torch.uint8), torch.zeros(ROWS, dtype=torch.int64),
        torch.full((ROWS,), int(POLICY), dtype=torch.uint8), torch.zeros(ROWS, dtype=torch.int64),
        torch.ones(ROWS, dtype=torch.bool), torch.arange(ROWS), torch.tensor(groups), zeros, zeros, None, 0,
    )  # fmt: skip
    algorithm = config.algorithm.build()
    recompute = replace(reading_of(config), ppo=replace(config.ppo, old_log_probs="recompute"))
    shares = algorithm.schedule(0, 0.5)
    log_probs = compute_log_probs(rollout, shares, parts.models, recompute)
    experience = make_experience(
        rollout, shares, "gae", rewards.tolist(), rewards.tolist(), log_probs, config.ppo, 0.0, algorithm.baseline
    )
    torch.testing.assert_close(experience.advantages[by_policy], inputs["advantages"].repeat_interleave(by_policy.sum(1)))
    updater = updater_of(parts.models, config)
    updater._policy_gradients(experience, torch.arange(ROWS), 0, True)  # pyright: ignore[reportPrivateUsage]
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert found.keys() == captured["gradients"].keys()
    largest = max(float(value.abs().max()) for value in captured["gradients"].values())
    assert largest > 1e-3
    for name, value in captured["gradients"].items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=TOLERANCE * max(1.0, largest), msg=name)


@pytest.mark.parametrize("advantage", ["leave_one_out", "group_normalized", "group_mean"])
def test_advantages_are_those_of_the_formulas_in_trl(advantage: GroupAdvantage) -> None:
    rewards = torch.randn(3 * GROUP, generator=torch.Generator().manual_seed(0))
    grouped = rewards.view(-1, GROUP)
    expected = {
        "leave_one_out": grouped - (grouped.sum(1, keepdim=True) - grouped) / (GROUP - 1),
        "group_normalized": (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4),
        "group_mean": grouped - grouped.mean(1, keepdim=True),
    }[advantage]
    found, _ = group_advantages(rewards, torch.arange(3 * GROUP) // GROUP, GroupBaseline(advantage, epsilon=1e-4))
    torch.testing.assert_close(found, expected.flatten(), rtol=0, atol=TOLERANCE)
    assert losses.weight_total(completion_mask(), "token_mean") == 30
