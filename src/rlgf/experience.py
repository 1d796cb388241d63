"""Appraising: what a rollout is worth, token by token, measured before the first update.

Rules (algorithms.md, sections 2 and 3): the reward sits on the last written token; whoever finished a text has the critic
that values it; V^π is fitted to reward and KL penalty, V^g to the task's reward alone, the penalty of a token then going to
that token's advantage.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlgf import ops, packing
from rlgf.algorithms import Share
from rlgf.config import PPOConfig
from rlgf.distributed import total_moments
from rlgf.forward import MicroBatch, is_encoder_decoder, micro_batches, token_logits, trunk_states
from rlgf.kernels.concurrency import Lanes
from rlgf.models import Critic, LanguageModel
from rlgf.offload import awake
from rlgf.types import GUIDE, POLICY, Decoding, Experience, Origin, Rollout

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Models:
    """Everything that reads tokens during training."""

    policy: LanguageModel
    reference: LanguageModel
    critics: Mapping[Origin, Critic]  # V^π under POLICY, V^g under GUIDE, as far as the algorithm needs them


@dataclass(frozen=True)
class Reading:
    """How tokens are read: settings that every forward pass shares."""

    decoding: Decoding
    ppo: PPOConfig
    token_budget: int
    precision: str = "fp32"


def policy_log_probs(
    rollout: Rollout,
    rows: Tensor,
    columns: Tensor,
    logits: Tensor,
    end_ids: Sequence[int],
    reading: Reading,
    consume: bool = False,
) -> Tensor:
    """Log-probabilities of the tokens at `(rows, columns)` as the PPO ratio needs them, [tokens].

    `consume` as in `ops.token_log_probs`.
    """
    tokens = rollout.ids[rows, columns].to(logits.device)
    if reading.ppo.ratio_support == "full":
        return ops.token_log_probs(logits, tokens, consume=consume)
    support = rollout.support.select(rows, columns) if rollout.support is not None else None
    if support is not None:
        support = type(support)(support.counts.to(logits.device), support.ids.to(logits.device))
    forbidden = (rollout.response_position[rows, columns] < rollout.minimum).to(logits.device)
    ends = torch.tensor(list(end_ids), device=logits.device)
    return ops.token_log_probs(logits, tokens, reading.decoding.temperature, support, forbidden, ends, consume)


class Sweep:
    """Reads a rollout with several models, without a gradient; texts are laid out once for all asked for the same tokens."""

    def __init__(self, rollout: Rollout, reading: Reading) -> None:
        self.rollout, self.reading = rollout, reading
        self.laid: list[tuple[tuple[bool, bool], Tensor, list[MicroBatch]]] = []

    def batches(self, model: Any, selected: Tensor) -> list[MicroBatch]:
        """Micro-batches of the selected tokens as `model` reads them."""
        kind = (packing.is_enabled(model), is_encoder_decoder(model))
        for known, tokens, batches in self.laid:
            if known == kind and torch.equal(tokens, selected):
                return batches
        rollout = self.rollout
        made = list(micro_batches(model, rollout.ids, rollout.prompt_lengths, selected, self.reading.token_budget))
        self.laid.append((kind, selected, made))
        return made

    def read(self, model: LanguageModel, selected: Tensor) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """Each micro-batch with the logits and states before its tokens."""
        with awake(model.model):
            for batch in self.batches(model.model, selected):
                with torch.no_grad():
                    logits, states = token_logits(model, batch, self.reading.precision)
                yield batch, logits, states

    def full_log_probs(self, selected: Tensor, model: LanguageModel) -> Tensor:
        """Full, untempered log-probabilities of the selected tokens under a model, zero elsewhere, [texts, width]."""
        values = torch.zeros(self.rollout.ids.shape)
        for batch, logits, _ in self.read(model, selected):
            values[batch.places] = self._full(batch, logits)
        return values

    def recompute(self, policy: LanguageModel) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Log-probabilities of the policy's tokens by a full forward: over the sampled support, and full; and its states."""
        sampled, full = torch.zeros(self.rollout.ids.shape), torch.zeros(self.rollout.ids.shape)
        seen: list[Tensor] = []
        for batch, logits, states in self.read(policy, self.rollout.by_policy):
            own = policy_log_probs(self.rollout, *batch.places, logits, policy.end_ids, self.reading)
            sampled[batch.places], full[batch.places] = own.cpu(), self._full(batch, logits)
            seen.append(states)
        return sampled, full, seen

    def values(self, selected: Tensor, critic: Critic, policy: LanguageModel, seen: Sequence[Tensor]) -> Tensor:
        """Values of the states before the selected tokens, zero elsewhere, [texts, width].

        A critic on the policy's trunk takes the policy's states where those before these very tokens were `seen`.
        """
        values = torch.zeros(self.rollout.ids.shape)
        trunk = policy.trunk() if critic.trunk is None else critic.trunk
        known = bool(seen) and torch.equal(selected, self.rollout.by_policy)
        with torch.no_grad(), awake(critic):
            for place, batch in enumerate(self.batches(trunk.model, selected)):
                hidden = None
                if critic.trunk is None:
                    hidden = seen[place] if known else trunk_states(trunk, batch, self.reading.precision)
                values[batch.places] = critic(batch, self.reading.precision, hidden).cpu()
        return values

    def _full(self, batch: MicroBatch, logits: Tensor) -> Tensor:
        return ops.token_log_probs(logits, self.rollout.ids[batch.places].to(logits.device)).cpu()


@dataclass(frozen=True)
class Measured:
    """What models say of a rollout, whatever it was worth: shapes as in `Experience`."""

    old_log_probs: Tensor
    reference_log_probs: Tensor
    kl: Tensor
    values: Mapping[Origin, Tensor]  # by each critic, of the texts it finished or has a weight on


def measure(
    rollout: Rollout, shares: Sequence[Share], models: Models, reading: Reading, lanes: Lanes | None = None
) -> Measured:
    """Read a rollout with policy (where asked for), reference and critics; needs no reward, so it may run beside scoring.

    With `lanes` reference and critics read at the same time, where neither has to wait long for the other.
    """
    sweep, seen = Sweep(rollout, reading), list[Tensor]()
    old, full = rollout.log_probs, rollout.full_log_probs
    if reading.ppo.old_log_probs == "recompute":
        old, full, seen = sweep.recompute(models.policy)
    if reading.ppo.ratio_support == "full":
        old = full

    def by_critics() -> dict[Origin, Tensor]:
        values: dict[Origin, Tensor] = {}
        for origin, critic in models.critics.items():
            concerned = (rollout.finisher == origin) | (_row_weights(rollout, shares, origin) != 0)
            if bool(concerned.any()):
                selected = rollout.written & concerned[:, None]
                values[origin] = sweep.values(selected, critic, models.policy, seen)
        return values

    by_reference = partial(sweep.full_log_probs, rollout.by_policy, models.reference)
    reference, values = beside_critics(lanes, models.reference.model, rollout, by_reference, by_critics)
    return Measured(old, reference, ops.kl_k1(full, reference) * rollout.by_policy, values)


def beside_critics(
    lanes: Lanes | None, model: Any, rollout: Rollout, task: Callable[[], S], critics: Callable[[], T]
) -> tuple[S, T]:
    """What a language model's task and that of the critics return, done at the same time where they take about as long."""
    return lanes.run(task, critics) if lanes and _read_alike(model, rollout) else (task(), critics())


def _read_alike(model: Any, rollout: Rollout) -> bool:
    """Whether a language model takes about as long as a critic, which has no head: that may be most of the work."""
    head = sum(parameter.numel() for parameter in model.get_output_embeddings().parameters())
    body = sum(parameter.numel() for parameter in model.parameters()) - head
    return 3 * head * int(rollout.by_policy.sum()) <= 2 * body * int(rollout.lengths.sum())


def appraise(
    rollout: Rollout,
    shares: Sequence[Share],
    credit: str,
    scores: Sequence[float],
    rewards: Sequence[float],
    measured: Measured,
    ppo: PPOConfig,
    kl_coefficient: float,
) -> Experience:
    """What a rollout is worth: advantages and value targets from what was measured of it.

    `scores` are the task's, `rewards` what is optimised (shaped). Shapes as in `Experience`.
    """
    kl, penalty = measured.kl, -kl_coefficient * measured.kl
    terminal = ops.place_at_end(torch.tensor(list(rewards)), rollout.written)
    advantages, returns, values = (torch.zeros(rollout.ids.shape) for _ in range(3))
    for origin, estimate in measured.values.items():
        own = (rollout.finisher == origin)[:, None]
        reward = terminal + penalty if origin == POLICY else terminal
        one_step = ops.td_errors(reward, estimate, rollout.written, ppo.gamma)
        sampled = ops.gae(reward, estimate, rollout.written, ppo.gamma, ppo.lam)
        credited = torch.where(own, credited_advantage(rollout, origin, credit, one_step, sampled), one_step)
        if origin == GUIDE:
            credited = credited + penalty
        advantages += _row_weights(rollout, shares, origin)[:, None] * credited
        values += own * estimate
        returns += own * rollout.after_switch * (sampled + estimate)

    trained = rollout.trained(credit)
    advantages = advantages * trained
    stats = _stats(rollout, trained, scores, rewards, kl, advantages, values, returns)
    if ppo.whiten_advantages:
        advantages = ops.whiten(advantages, trained, total_moments(ops.moments(advantages, trained)))
    return Experience(
        rollout,
        credit,
        torch.tensor(list(scores)),
        measured.old_log_probs,
        measured.reference_log_probs,
        kl,
        values * rollout.written,
        returns,
        advantages,
        stats,
    )


def credited_advantage(rollout: Rollout, finisher: Origin, credit: str, one_step: Tensor, sampled: Tensor) -> Tensor:
    """Which estimate each token of a text gets from the critic of its finisher.

    Where the policy finished, GAE. Where the guide did: 'gae' the same; 'td' GAE at the last token before the switch, from
    which the guide really went on, and the one-step error before it; 'switch' trains that last token alone.
    """
    if finisher == POLICY or credit != "td":
        return sampled
    at_switch = rollout.response_position == rollout.switch[:, None] - 1
    return torch.where(at_switch, sampled, one_step)


def _row_weights(rollout: Rollout, shares: Sequence[Share], origin: Origin) -> Tensor:
    """The weight of A^π or A^g on each text, [texts]."""
    by_phase = {share.phase: share.policy_weight if origin == POLICY else share.guide_weight for share in shares}
    return torch.tensor([by_phase[phase] for phase in rollout.phase.tolist()])


def _stats(
    rollout: Rollout, trained: Tensor, scores: Sequence[float], rewards: Sequence[float], kl: Tensor, advantages: Tensor,
    values: Tensor, returns: Tensor,
) -> dict[str, float]:  # fmt: skip
    by_policy, after = rollout.by_policy, rollout.after_switch
    writers = by_policy.any(1)
    alone = (rollout.finisher == POLICY) & (rollout.switch == 0)
    score, reward = torch.tensor(list(scores)), torch.tensor(list(rewards))
    return {
        "score": float(score.mean()),
        "score_policy_alone": float(score[alone].mean()) if bool(alone.any()) else float("nan"),
        "reward": float(reward.mean()),
        "kl_k1": float(kl.sum() / max(1, int(writers.sum()))),
        "kl_k1_per_token": float(kl.sum() / max(1, int(by_policy.sum()))),
        "response_length": float(rollout.written.sum(1).float().mean()),
        "switch_mean": float(rollout.switch.float().mean()),
        "policy_tokens": int(by_policy.sum()),
        "guide_tokens": int(rollout.by_guide.sum()),
        "trained_tokens": int(trained.sum()),
        "critic_tokens": int(after.sum()),
        "guide_texts": int(rollout.by_guide.any(1).sum()),
        "advantage_mean": float(advantages[trained].mean()) if bool(trained.any()) else 0.0,
        "advantage_std": float(advantages[trained].std(unbiased=False)) if bool(trained.any()) else 0.0,
        "value_mean": float(values[after].mean()) if bool(after.any()) else 0.0,
        "explained_variance": ops.explained_variance(values[after], returns[after]),
    }
