"""Optimizer steps on an experience.

The policy trains on the tokens it generated; the critic of an origin trains on the states after the
switch in the rows with that rollout origin. The losses do not depend on the algorithm.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlgf.algorithms import losses
from rlgf.algorithms.schedules import learning_rate_factor
from rlgf.config.sections import CriticConfig, KLConfig
from rlgf.distributed import all_reduce_sum
from rlgf.errors import TrainingError
from rlgf.models.critic import Critic
from rlgf.models.forward import micro_batches, token_logits
from rlgf.models.log_probs import entropy, token_log_probs
from rlgf.models.memory import TrainedModels, run_within_memory
from rlgf.models.offload import on_device
from rlgf.randomness import Purpose, permutation, uniforms
from rlgf.rl.experience import ForwardConfig, Models, policy_log_probs, run_with_critics
from rlgf.rl.guards import Guard
from rlgf.rl.optimizers import gradient_norm, new_adam, step_optimizer
from rlgf.rl.tensors import Experience, Rollout
from rlgf.supervised.examples import Example
from rlgf.supervised.loop import nll_backward
from rlgf.types import Origin

FIRST_RATIO_TOLERANCE = 1e-4
GUARDED = (  # metrics of an optimizer step that must be finite before it is done
    "policy_loss", "value_loss", "kl_loss", "mle_loss", "approx_kl", "policy_grad_norm", "critic_grad_norm",
)  # fmt: skip


class Updater:
    """The optimizers of policy and critics, and the optimizer steps of an iteration."""

    def __init__(
        self,
        models: Models,
        forward_config: ForwardConfig,
        kl: KLConfig,
        critic: CriticConfig,
        targets: Sequence[Example],
        seed: int,
        guard: Guard,
    ) -> None:
        self.guard = guard
        self.models, self.forward_config, self.kl, self.critic = models, forward_config, kl, critic
        self.targets, self.seed = targets, seed
        self.shares_backbone = critic.kind == "value_head"
        # policy and critics share nothing then, not even dropout's generator
        self.independent_critics = critic.kind == "separate" and not forward_config.ppo.dropout
        for language_model in (models.policy, models.reference):
            language_model.model.eval()  # no dropout, so that the first ratio is exactly 1
        for value in models.critics.values():
            value.eval()
        ppo = forward_config.ppo
        policy_parameters = models.policy.trainable_parameters()
        if self.shares_backbone:
            policy_parameters += [p for value in models.critics.values() for p in value.trainable_parameters()]
        self.policy_optimizer = new_adam(policy_parameters, ppo.learning_rate, ppo)
        self.critic_optimizers: dict[Origin, torch.optim.Optimizer] = {}
        if not self.shares_backbone:
            for origin, value in models.critics.items():
                self.critic_optimizers[origin] = new_adam(value.trainable_parameters(), critic.learning_rate, ppo)

    @property
    def steps_per_iteration(self) -> int:
        """Return the optimizer steps of an iteration without early stopping."""
        ppo = self.forward_config.ppo
        return ppo.epochs * math.ceil(ppo.completions_per_iteration / ppo.minibatch_size)

    def update(self, experience: Experience, iteration: int) -> dict[str, float]:
        """Run all epochs of an iteration; the models are updated in place.

        Returns:
            Metrics (docs/metrics.md): means over the optimizer steps that report them, and the
            number of steps.

        Raises:
            NonFiniteError: a loss or a gradient norm is not finite; earlier steps were done.
        """
        if not experience.is_finite:
            return {"optimizer_steps": 0, "steps_skipped": float(self.steps_per_iteration), "stopped_early": 0.0}
        with ExitStack() as stack:
            for origin, critic in self.models.critics.items():
                stack.enter_context(on_device(critic, self.critic_optimizers.get(origin)))
            return self._epochs(experience, iteration)

    @property
    def trained_models(self) -> TrainedModels:
        """Return the models with their optimizers, for the search of a micro-batch size."""
        return TrainedModels(
            self.models.policy, self.models.critics, self.policy_optimizer, self.critic_optimizers,
            self.forward_config.precision,
        )  # fmt: skip

    def _epochs(self, experience: Experience, iteration: int) -> dict[str, float]:
        """Run the optimizer steps of all epochs until done or stopped by `ppo.target_kl`."""
        ppo = self.forward_config.ppo
        self.models.policy.model.train(ppo.dropout)
        if ppo.dropout:  # a function of seed and iteration: no generator's state is saved
            torch.manual_seed(int(uniforms(self.seed, Purpose.DROPOUT, iteration, 1)[0] * 2**53))
        step_metrics: dict[str, list[float]] = {}
        steps = 0
        stopped, skipped = False, 0
        num_rows = experience.rollout.ids.shape[0]
        for epoch in range(ppo.epochs):
            order = permutation(self.seed, Purpose.MINIBATCH, iteration * ppo.epochs + epoch, num_rows)
            for start in range(0, num_rows, ppo.minibatch_size):
                rows = torch.from_numpy(order[start : start + ppo.minibatch_size]).sort().values
                stats = self._step_within_memory(experience, rows, iteration, steps)
                steps += 1
                skipped += int(stats.pop("skipped"))
                for key, value in stats.items():
                    step_metrics.setdefault(key, []).append(value)
                if ppo.target_kl is not None and stats.get("approx_kl", 0.0) > ppo.target_kl:
                    stopped = True
                    break
            if stopped:
                break
        self.models.policy.model.eval()
        means = {key: sum(values) / len(values) for key, values in step_metrics.items()}
        return {
            **means, "optimizer_steps": steps - skipped, "steps_skipped": float(skipped), "stopped_early": float(stopped),
        }  # fmt: skip

    def _step_within_memory(self, experience: Experience, rows: Tensor, iteration: int, done: int) -> dict[str, float]:
        """Run an optimizer step, with smaller micro-batches if a device's memory is too small."""

        def attempt(token_budget: int) -> dict[str, float]:
            self.forward_config = replace(self.forward_config, token_budget=token_budget)
            self._clear_gradients()
            return self._step(experience, rows, iteration, done)

        return run_within_memory(attempt, self.forward_config.token_budget, experience.rollout.ids.shape[1])[0]

    def _clear_gradients(self) -> None:
        for optimizer in (self.policy_optimizer, *self.critic_optimizers.values()):
            optimizer.zero_grad()

    def _step(self, experience: Experience, rows: Tensor, iteration: int, done: int) -> dict[str, float]:
        """Run one optimizer step of policy and critics on a minibatch; return its metrics.

        Args:
            experience: the experience of the iteration.
            rows: int64 [rows], the rows of the minibatch.
            iteration: the 0-based iteration.
            done: the number of steps done in this iteration.
        """
        policy_enabled, ppo = iteration >= self.critic.warmup_iterations, self.forward_config.ppo
        step = iteration * self.steps_per_iteration + done
        factor = learning_rate_factor(ppo.schedule, step, ppo.iterations * self.steps_per_iteration)

        def critics() -> tuple[dict[str, float], list[Tensor | None]]:
            stats = self._critic_gradients(experience, rows)
            return stats, [gradient_norm(optimizer) for optimizer in self.critic_optimizers.values()]

        policy = partial(self._policy_gradients, experience, rows, step, policy_enabled)
        run = partial(run_with_critics, self.models.policy, experience.rollout, concurrently=self.independent_critics)
        (stats, policy_moves), (valued, critic_norms) = run(policy, critics)
        stats |= valued
        policy_norm = gradient_norm(self.policy_optimizer) if policy_moves else None  # complete only now
        ratio_error = stats.pop("ratio_error")
        if policy_norm is not None:
            stats["policy_grad_norm"] = float(policy_norm)
        if critic_norms:
            stats["critic_grad_norm"] = max(0.0 if norm is None else float(norm) for norm in critic_norms)
        guarded = {name.replace("_", " "): stats[name] for name in GUARDED if name in stats}
        if not self.guard.check_step(guarded, experience, rows, iteration):
            self._clear_gradients()
            return {**{name: value for name, value in stats.items() if math.isfinite(value)}, "skipped": 1.0}
        if done == 0:
            self._check_first_ratio(ratio_error)
            stats["first_ratio_error"] = ratio_error

        def move_policy() -> None:
            if policy_norm is not None:
                step_optimizer(self.policy_optimizer, policy_norm, ppo.learning_rate * factor, ppo.max_grad_norm)

        def move_critics() -> None:
            for optimizer, norm in zip(self.critic_optimizers.values(), critic_norms):
                if norm is not None:
                    step_optimizer(optimizer, norm, self.critic.learning_rate * factor, ppo.max_grad_norm)

        run(move_policy, move_critics)
        return {**stats, "learning_rate": ppo.learning_rate * factor, "skipped": 0.0}

    def _check_first_ratio(self, error: float) -> None:
        """Raise TrainingError if the first PPO ratio of an iteration differs from 1."""
        if self.forward_config.ppo.check_first_ratio and error > FIRST_RATIO_TOLERANCE:
            raise TrainingError(
                f"the first ratio is off by {error:.2g}: sampling and training disagree; set ppo.old_log_probs=recompute."
            )

    def _policy_gradients(
        self, experience: Experience, rows: Tensor, step: int, policy_enabled: bool
    ) -> tuple[dict[str, float], bool]:
        """Accumulate the gradients of surrogate, KL and MLE losses.

        Also those of the value losses if the critics share the policy's backbone.

        Returns:
            The metrics, and whether the policy has gradients to step with.
        """
        ppo, rollout, policy = self.forward_config.ppo, experience.rollout, self.models.policy
        trained = experience.trained[rows] & policy_enabled
        weights = self._token_weights(trained)
        valued = self._value_weights(rollout, rows) if self.shares_backbone else {}
        selected = trained.clone()
        for value_weights in valued.values():
            selected |= value_weights > 0
        sums = {"policy_loss": 0.0, "clip_fraction": 0.0, "approx_kl": 0.0, "ratio_error": 0.0, "kl_loss": 0.0}
        sums |= _value_metrics(valued)
        if step % self.steps_per_iteration < self.steps_per_iteration // ppo.epochs:
            sums["entropy"] = 0.0  # in the first epoch only: a pass over the vocabulary
        starts, budget = rollout.prompt_lengths[rows], self.forward_config.token_budget
        for batch in micro_batches(policy.model, rollout.ids[rows], starts, selected, budget):
            logits, hidden = token_logits(policy, batch, self.forward_config.precision)
            local, columns = batch.token_index
            chosen = trained[local, columns]
            loss = logits.new_zeros(())
            if bool(chosen.any()):
                chosen_logits = logits if bool(chosen.all()) else logits[chosen]  # indexing copies
                token_rows, token_columns = rows[local[chosen]], columns[chosen]
                loss = loss + self._surrogate(
                    experience, token_rows, token_columns, chosen_logits, weights[local, columns][chosen], sums
                )
            if not policy_enabled:  # critic warm-up: no gradient into the shared backbone
                hidden = hidden.detach()
            for origin, value_weights in valued.items():
                here = value_weights[local, columns] > 0
                if bool(here.any()):
                    values = self.models.critics[origin](batch, self.forward_config.precision, hidden[here])
                    picked = value_weights[local[here], columns[here]]
                    part = self._value_loss(experience, rows[local[here]], columns[here], values, picked, sums)
                    loss = loss + self.critic.value_coefficient * part
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
        tokens = max(1.0, all_reduce_sum(float(trained.sum())))
        if not bool(trained.any()):
            sums.pop("entropy", None)  # undefined without tokens, as in a critic warm-up
        for key in {"clip_fraction", "approx_kl", "entropy"} & sums.keys():
            sums[key] = all_reduce_sum(sums[key]) / tokens
        moved = bool(selected.any())
        if ppo.mle_coefficient and policy_enabled:
            batch = self._mle_batch(step)
            sums["mle_targets_truncated"] = float(sum(example.truncated for example in batch))
            sums["mle_loss"] = nll_backward(
                policy, batch, ppo.mle_coefficient, self.forward_config.precision, self.forward_config.token_budget
            )
            moved = True
        return sums, moved

    def _surrogate(
        self, experience: Experience, rows: Tensor, columns: Tensor, logits: Tensor, weights: Tensor,
        sums: dict[str, float],
    ) -> Tensor:  # fmt: skip
        """Compute the policy's loss on trained tokens of a micro-batch; add to the metrics.

        Args:
            experience: the experience of the iteration.
            rows: int64 [tokens], the rows of the tokens.
            columns: int64 [tokens], the columns of the tokens.
            logits: [tokens, vocabulary].
            weights: [tokens], from `losses.token_weights`.
            sums: the metrics, updated in place.
        """
        ppo, device = self.forward_config.ppo, logits.device
        if "entropy" in sums:  # before the logits are overwritten
            sums["entropy"] += float(entropy(logits.detach()).sum())
        only = not self.kl.loss_coefficient and not ppo.entropy_coefficient  # no other use of the logits
        log_probs = policy_log_probs(
            experience.rollout, rows, columns, logits, self.models.policy.eos_token_ids, self.forward_config, only
        )
        old = experience.old_log_probs[rows, columns].to(device)
        advantages = experience.advantages[rows, columns].to(device)
        weights = weights.to(device)
        ratio = losses.importance_ratio(log_probs - old, rows.to(device), ppo.ratio_level)
        high = ppo.clip_range if ppo.clip_range_high is None else ppo.clip_range_high
        if ppo.surrogate == "cispo":
            loss = losses.cispo_loss(log_probs, advantages, weights, ratio, high)
        else:
            loss, _ = losses.ppo_loss(log_probs, old, advantages, weights, ppo.clip_range, high, ppo.dual_clip, ratio)
        sums["policy_loss"] += float(loss.detach())
        token_ratio = ratio if ppo.ratio_level == "token" else (log_probs - old).exp()
        with torch.no_grad():
            off, token_off = ratio - 1, token_ratio - 1
            below = torch.zeros_like(off, dtype=torch.bool) if ppo.surrogate == "cispo" else off < -ppo.clip_range
            sums["clip_fraction"] += float((below | (off > high)).sum())
            sums["approx_kl"] += float((token_off - (log_probs - old)).sum())
            sums["ratio_error"] = max(sums["ratio_error"], float(token_off.abs().max()))
        if ppo.entropy_coefficient:
            loss = loss - ppo.entropy_coefficient * (weights * entropy(logits)).sum()
        if self.kl.loss_coefficient:
            full = token_log_probs(logits, experience.rollout.ids[rows, columns].to(device))
            reference = experience.reference_log_probs[rows, columns].to(device)
            kl = losses.kl_loss(full, reference, token_ratio, weights, self.kl.loss_estimator)
            sums["kl_loss"] += float(kl.detach())
            loss = loss + self.kl.loss_coefficient * kl
        return loss

    def _critic_gradients(self, experience: Experience, rows: Tensor) -> dict[str, float]:
        """Accumulate the gradients of separate critics; return the metrics."""
        if self.shares_backbone:
            return {}
        rollout = experience.rollout
        valued = self._value_weights(rollout, rows)
        sums = _value_metrics(valued)
        for origin, weights in valued.items():
            critic: Critic = self.models.critics[origin]
            assert critic.backbone is not None
            starts, budget = rollout.prompt_lengths[rows], self.forward_config.token_budget
            for batch in micro_batches(critic.backbone.model, rollout.ids[rows], starts, weights > 0, budget):
                values = critic(batch, self.forward_config.precision)
                local, columns = batch.token_index
                loss = self._value_loss(experience, rows[local], columns, values, weights[batch.token_index], sums)
                loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return sums

    def _value_loss(
        self,
        experience: Experience,
        rows: Tensor,
        columns: Tensor,
        values: Tensor,
        weights: Tensor,
        sums: dict[str, float],
    ) -> Tensor:
        """Compute the value loss at the tokens `(rows, columns)`; add to the metrics."""
        device = values.device
        old, goal = experience.values[rows, columns].to(device), experience.returns[rows, columns].to(device)
        loss, clipped = losses.value_loss(values, old, goal, weights.to(device), self.critic.value_clip)
        sums["value_loss"] += float(loss.detach())
        sums["value_clip_fraction"] += float((weights * clipped.to(weights.device)).sum())
        return loss

    def _token_weights(self, selected: Tensor) -> Tensor:
        """Compute the weights of selected tokens of a minibatch, over all processes."""
        aggregation, longest = self.forward_config.ppo.loss_aggregation, self.forward_config.max_new_tokens
        total = all_reduce_sum(losses.weight_total(selected, aggregation, longest))
        return losses.token_weights(selected, aggregation, total)

    def _value_weights(self, rollout: Rollout, rows: Tensor) -> dict[Origin, Tensor]:
        """Compute the weights of the states that each critic trains on.

        Returns:
            [rows, width] by rollout origin; origins without states on any process are missing.
        """
        found: dict[Origin, Tensor] = {}
        for origin in self.models.critics:
            selected = (rollout.after_switch & (rollout.rollout_by == origin)[:, None])[rows]
            if all_reduce_sum(float(selected.sum())):
                found[origin] = self._token_weights(selected)
        return found

    def _mle_batch(self, step: int) -> list[Example]:
        """Sample the examples of the MLE loss at an optimizer step."""
        size = self.forward_config.ppo.mle_batch or self.forward_config.ppo.minibatch_size
        draws = uniforms(self.seed, Purpose.MLE, step, size)
        return [self.targets[int(draw * len(self.targets))] for draw in draws]

    def state(self) -> dict[str, Any]:
        """Return the state of models and optimizers for a checkpoint."""
        return {
            "policy": self.models.policy.trainable_state(),
            "critics": {int(origin): critic.trainable_state() for origin, critic in self.models.critics.items()},
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic_optimizers": {int(origin): o.state_dict() for origin, o in self.critic_optimizers.items()},
            "skipped_in_a_row": self.guard.skipped_in_a_row,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        self.models.policy.load_trainable_state(state["policy"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        self.guard.skipped_in_a_row = state["skipped_in_a_row"]
        for origin, critic in self.models.critics.items():
            critic.load_trainable_state(state["critics"][int(origin)])
        for origin, optimizer in self.critic_optimizers.items():
            optimizer.load_state_dict(state["critic_optimizers"][int(origin)])


def _value_metrics(weights: dict[Origin, Tensor]) -> dict[str, float]:
    """Return the critics' metrics at zero, or no metrics if no states are trained."""
    return {"value_loss": 0.0, "value_clip_fraction": 0.0} if weights else {}
