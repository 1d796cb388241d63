"""Learning: optimizer steps on an experience. The policy learns from its own tokens, each critic from what came after the
switch in the texts of its author. No loss asks which algorithm it serves.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlgf import ops
from rlgf.config import CriticConfig, KLConfig, PPOConfig
from rlgf.distributed import total
from rlgf.errors import RunError
from rlgf.experience import Models, Reading, beside_critics, policy_log_probs
from rlgf.forward import micro_batches, token_logits
from rlgf.kernels.concurrency import Lanes
from rlgf.models import Critic
from rlgf.offload import awake
from rlgf.randomness import Purpose, permutation, uniforms
from rlgf.schedules import learning_rate_factor
from rlgf.supervised import Example, nll_backward
from rlgf.types import Experience, Origin, Rollout

FIRST_RATIO_TOLERANCE = 1e-4


class Updater:
    """Optimizers of policy and critics, and the optimizer steps of an iteration."""

    def __init__(
        self,
        models: Models,
        reading: Reading,
        kl: KLConfig,
        critic: CriticConfig,
        targets: Sequence[Example],
        seed: int,
    ) -> None:
        self.models, self.reading, self.kl, self.critic = models, reading, kl, critic
        self.targets, self.seed = targets, seed
        self.shares_trunk = critic.kind == "trunk"
        # policy and critics learn side by side where they share nothing, the stream of dropout's draws included
        apart = critic.kind == "separate" and models.policy.device.type == "cpu" and not reading.ppo.dropout
        self.lanes = Lanes() if apart else None
        for language_model in (models.policy, models.reference):
            language_model.model.eval()  # no dropout, so that the first ratio is exactly 1
        for value in models.critics.values():
            value.eval()
        ppo = reading.ppo
        policy_parameters = models.policy.parameters()
        if self.shares_trunk:
            policy_parameters += [p for value in models.critics.values() for p in value.trained()]
        self.policy_optimizer = _adam(policy_parameters, ppo.learning_rate, ppo)
        self.critic_optimizers: dict[Origin, torch.optim.Optimizer] = {}
        if not self.shares_trunk:
            for origin, value in models.critics.items():
                self.critic_optimizers[origin] = _adam(value.trained(), critic.learning_rate, ppo)

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps of one iteration when nothing stops early."""
        ppo = self.reading.ppo
        return ppo.epochs * math.ceil(ppo.texts_per_iteration / ppo.minibatch_size)

    def update(self, experience: Experience, iteration: int) -> dict[str, float]:
        """All epochs of one iteration; returns means over its optimizer steps, and what was seen first and last."""
        with ExitStack() as stack:
            for origin, critic in self.models.critics.items():
                stack.enter_context(awake(critic, self.critic_optimizers.get(origin)))
            return self._epochs(experience, iteration)

    def rehearse(self, tokens: int, width: int, horizon: int) -> None:
        """Read and learn as an optimizer step does with its largest micro-batch, and leave nothing behind.

        `width` is that of the longest text, of which `horizon` tokens are asked about. Raises torch's out-of-memory error where
        that, with what the optimizers will remember and a tenth to spare, does not fit.
        """
        policy, precision = self.models.policy, self.reading.precision
        ids = torch.zeros((max(1, tokens // width), width), dtype=torch.int64)
        starts = torch.full((len(ids),), width - horizon)
        asked = (torch.arange(width) >= width - horizon).expand(len(ids), -1)
        optimizers = [self.policy_optimizer, *self.critic_optimizers.values()]
        trained = [p for o in optimizers for group in o.param_groups for p in group["params"] if p not in o.state]
        with ExitStack() as stack:
            for origin, critic in self.models.critics.items():
                stack.enter_context(awake(critic, self.critic_optimizers.get(origin)))
            kept = [torch.empty_like(p) for p in trained for _ in range(2)]
            for batch in micro_batches(policy.model, ids, starts, asked, tokens):
                logits, hidden = token_logits(policy, batch, precision)
                loss = ops.token_log_probs(logits, ids[batch.places].to(logits.device)).sum()
                for critic in self.models.critics.values():
                    loss = loss + critic(batch, precision, hidden if self.shares_trunk else None).sum()
                loss.backward()  # pyright: ignore[reportUnknownMemberType]
            if policy.device.type == "cuda":
                kept.append(
                    torch.empty(torch.cuda.mem_get_info(policy.device)[1] // 10, dtype=torch.uint8, device=policy.device)
                )
        for optimizer in optimizers:
            optimizer.zero_grad()

    def _epochs(self, experience: Experience, iteration: int) -> dict[str, float]:
        ppo = self.reading.ppo
        self.models.policy.model.train(ppo.dropout)
        seen: dict[str, list[float]] = {}
        steps = 0
        stopped = False
        texts = experience.rollout.ids.shape[0]
        for epoch in range(ppo.epochs):
            order = permutation(self.seed, Purpose.MINIBATCH, iteration * ppo.epochs + epoch, texts)
            for start in range(0, texts, ppo.minibatch_size):
                members = torch.from_numpy(order[start : start + ppo.minibatch_size]).sort().values
                stats = self._step(experience, members, iteration, steps)
                steps += 1
                for key, value in stats.items():
                    seen.setdefault(key, []).append(value)
                if ppo.target_kl is not None and stats["old_policy_kl"] > ppo.target_kl:
                    stopped = True
                    break
            if stopped:
                break
        self.models.policy.model.eval()
        means = {key: sum(values) / len(values) for key, values in seen.items()}
        return {**means, "optimizer_steps": steps, "stopped_early": float(stopped)}

    def _step(self, experience: Experience, members: Tensor, iteration: int, done: int) -> dict[str, float]:
        """One optimizer step of everything on the texts `members`, after `done` steps of the same iteration."""
        learns, ppo = iteration >= self.critic.warmup_iterations, self.reading.ppo
        step = iteration * self.steps_per_iteration + done
        factor = learning_rate_factor(ppo.schedule, step, ppo.iterations * self.steps_per_iteration)
        policy = partial(self._policy_gradients, experience, members, step, learns)
        critic_rate = self.critic.learning_rate * factor

        def critics() -> dict[str, float]:
            gradients = self._critic_gradients(experience, members)
            return gradients | self._descend_critics(critic_rate) if done else gradients  # nobody moves before the first check

        model, rollout = self.models.policy.model, experience.rollout
        (stats, policy_moved), valued = beside_critics(self.lanes, model, rollout, policy, critics)
        ratio_error = stats.pop("ratio_error")
        if done == 0:
            self._check_first_ratio(ratio_error)
            valued |= {"first_ratio_error": ratio_error, **self._descend_critics(critic_rate)}
        if policy_moved:
            stats["policy_gradient_norm"] = _descend(self.policy_optimizer, ppo.learning_rate * factor, ppo.max_gradient_norm)
        return {**stats, **valued, "learning_rate": ppo.learning_rate * factor}

    def _check_first_ratio(self, error: float) -> None:
        if self.reading.ppo.check_first_ratio and error > FIRST_RATIO_TOLERANCE:
            raise RunError(
                f"the first ratio is off by {error:.2g}: sampling and training disagree; set ppo.old_log_probs=recompute."
            )

    def _policy_gradients(
        self, experience: Experience, members: Tensor, step: int, learns: bool
    ) -> tuple[dict[str, float], bool]:
        """Add the gradients of surrogate, KL and likelihood losses (and of values, where the trunk is shared)."""
        ppo, rollout, policy = self.reading.ppo, experience.rollout, self.models.policy
        trained = rollout.trained(experience.credit)[members] & learns
        weights = ops.token_weights(trained, ppo.loss_aggregation, total(ops.weight_total(trained, ppo.loss_aggregation)))
        valued = _value_weights(rollout, members, ppo.loss_aggregation) if self.shares_trunk else {}
        selected = trained.clone()
        for value_weights in valued.values():
            selected |= value_weights > 0
        sums = {"policy_loss": 0.0, "clipped_share": 0.0, "old_policy_kl": 0.0, "ratio_error": 0.0, "kl_loss": 0.0}
        sums |= {"value_loss": 0.0, "value_clipped_share": 0.0} if valued else {}
        starts, budget = rollout.prompt_lengths[members], self.reading.token_budget
        for batch in micro_batches(policy.model, rollout.ids[members], starts, selected, budget):
            logits, hidden = token_logits(policy, batch, self.reading.precision)
            local, columns = batch.places
            chosen = trained[local, columns]
            loss = logits.new_zeros(())
            if bool(chosen.any()):
                chosen_logits = logits if bool(chosen.all()) else logits[chosen]  # indexing would copy them
                rows, cols = members[local[chosen]], columns[chosen]
                loss = loss + self._surrogate(experience, rows, cols, chosen_logits, weights[local, columns][chosen], sums)
            if not learns:  # a critic's warm-up leaves the trunk it shares as it is
                hidden = hidden.detach()
            for origin, value_weights in valued.items():
                here = value_weights[local, columns] > 0
                if bool(here.any()):
                    values = self.models.critics[origin](batch, self.reading.precision, hidden[here])
                    picked = value_weights[local[here], columns[here]]
                    part = self._value_loss(experience, members[local[here]], columns[here], values, picked, sums)
                    loss = loss + self.critic.value_coefficient * part
            loss.backward()  # pyright: ignore[reportUnknownMemberType]
        tokens = max(1.0, total(float(trained.sum())))
        for key in ("clipped_share", "old_policy_kl"):
            sums[key] = total(sums[key]) / tokens
        moved = bool(selected.any())
        if ppo.mle_coefficient and learns:
            batch = self._mle_batch(step)
            sums["mle_targets_cut"] = float(sum(example.cut for example in batch))
            sums["mle_loss"] = nll_backward(
                policy, batch, ppo.mle_coefficient, self.reading.precision, self.reading.token_budget
            )
            moved = True
        return sums, moved

    def _surrogate(
        self, experience: Experience, rows: Tensor, columns: Tensor, logits: Tensor, weights: Tensor,
        sums: dict[str, float],
    ) -> Tensor:  # fmt: skip
        """The policy's loss on a micro-batch of its trained tokens."""
        ppo, device = self.reading.ppo, logits.device
        only = not self.kl.loss_coefficient  # nobody else reads the logits
        log_probs = policy_log_probs(experience.rollout, rows, columns, logits, self.models.policy.end_ids, self.reading, only)
        old = experience.old_log_probs[rows, columns].to(device)
        advantages = experience.advantages[rows, columns].to(device)
        loss, ratio = ops.ppo_loss(log_probs, old, advantages, weights.to(device), ppo.clip)
        sums["policy_loss"] += float(loss.detach())
        with torch.no_grad():
            off = ratio - 1
            sums["clipped_share"] += float((off.abs() > ppo.clip).sum())
            sums["old_policy_kl"] += float((off - (log_probs - old)).sum())
            sums["ratio_error"] = max(sums["ratio_error"], float(off.abs().max()))
        if self.kl.loss_coefficient:
            full = ops.token_log_probs(logits, experience.rollout.ids[rows, columns].to(device))
            reference = experience.reference_log_probs[rows, columns].to(device)
            kl = ops.kl_loss(full, reference, ratio, weights.to(device), self.kl.loss_estimator)
            sums["kl_loss"] += float(kl.detach())
            loss = loss + self.kl.loss_coefficient * kl
        return loss

    def _critic_gradients(self, experience: Experience, members: Tensor) -> dict[str, float]:
        """Add the gradients of separate critics."""
        if self.shares_trunk:
            return {}
        sums = {"value_loss": 0.0, "value_clipped_share": 0.0}
        rollout = experience.rollout
        for origin, weights in _value_weights(rollout, members, self.reading.ppo.loss_aggregation).items():
            critic: Critic = self.models.critics[origin]
            assert critic.trunk is not None
            starts, budget = rollout.prompt_lengths[members], self.reading.token_budget
            for batch in micro_batches(critic.trunk.model, rollout.ids[members], starts, weights > 0, budget):
                values = critic(batch, self.reading.precision)
                local, columns = batch.places
                loss = self._value_loss(experience, members[local], columns, values, weights[batch.places], sums)
                loss.backward()  # pyright: ignore[reportUnknownMemberType]
        return sums

    def _descend_critics(self, learning_rate: float) -> dict[str, float]:
        """A step of each critic with an optimizer of its own; the largest norm of their gradients."""
        norms = [_descend(o, learning_rate, self.reading.ppo.max_gradient_norm) for o in self.critic_optimizers.values()]
        return {"critic_gradient_norm": max(norms)} if norms else {}

    def _value_loss(
        self,
        experience: Experience,
        rows: Tensor,
        columns: Tensor,
        values: Tensor,
        weights: Tensor,
        sums: dict[str, float],
    ) -> Tensor:
        device = values.device
        old, goal = experience.values[rows, columns].to(device), experience.returns[rows, columns].to(device)
        loss, clipped = ops.value_loss(values, old, goal, weights.to(device), self.critic.value_clip)
        sums["value_loss"] += float(loss.detach())
        sums["value_clipped_share"] += float((weights * clipped.cpu()).sum())
        return loss

    def _mle_batch(self, step: int) -> list[Example]:
        size = self.reading.ppo.mle_batch or self.reading.ppo.minibatch_size
        draws = uniforms(self.seed, Purpose.MLE, step, size)
        return [self.targets[int(draw * len(self.targets))] for draw in draws]

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint must hold of models and optimizers."""
        return {
            "policy": self.models.policy.weights(),
            "critics": {int(origin): critic.weights() for origin, critic in self.models.critics.items()},
            "policy_optimizer": self.policy_optimizer.state_dict(),
            "critic_optimizers": {int(origin): o.state_dict() for origin, o in self.critic_optimizers.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.models.policy.load_weights(state["policy"])
        self.policy_optimizer.load_state_dict(state["policy_optimizer"])
        for origin, critic in self.models.critics.items():
            critic.load_weights(state["critics"][int(origin)])
        for origin, optimizer in self.critic_optimizers.items():
            optimizer.load_state_dict(state["critic_optimizers"][int(origin)])


def _value_weights(rollout: Rollout, members: Tensor, aggregation: str) -> dict[Origin, Tensor]:
    """For each author of a rollout the weights of the states its critic learns from, [members, width]."""
    weights: dict[Origin, Tensor] = {}
    for origin in (Origin.POLICY, Origin.GUIDE):
        selected = (rollout.after_switch & (rollout.finisher == origin)[:, None])[members]
        denominator = total(ops.weight_total(selected, aggregation))
        if denominator:
            weights[origin] = ops.token_weights(selected, aggregation, denominator)
    return weights


def _adam(parameters: list[torch.nn.Parameter], learning_rate: float, ppo: PPOConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, learning_rate, eps=ppo.adam_epsilon, weight_decay=ppo.weight_decay, fused=True)


def _descend(optimizer: torch.optim.Optimizer, learning_rate: float, max_norm: float) -> float:
    """Clip, step and clear; without any gradient nothing moves. Returns the gradient's norm."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not parameters:
        return 0.0
    length = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = float(length)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # a fused step divides gradients by this as it reads them: clipping takes no pass over memory of its own
    optimizer.grad_scale = length / max_norm if norm > max_norm else None  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    optimizer.zero_grad()
    return norm
