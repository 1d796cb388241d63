"""Agreement of the sampler with the trainer, which is checked before the first update.

Both give every token of the policy a log-probability: the sampler token by token from a cache, the
trainer in one forward pass. If they differ, PPO's ratio is that of two other models. No setting
turns the check off.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rlgf.algorithms.base import Algorithm, PhaseWeight, constant_schedule
from rlgf.algorithms.switch_position import Phase
from rlgf.errors import TrainingError
from rlgf.models.language_model import LanguageModel
from rlgf.rl.experience import ForwardConfig, RolloutScorer
from rlgf.rl.rollout import RolloutConfig, collect_rollout
from rlgf.rl.tensors import Rollout
from rlgf.types import GUIDE, POLICY, Prompt

MAX_ERROR = 1e-3  # nats: the largest difference in fp32, with the sampler of this process
MAX_MEAN_ERROR = 0.05  # nats: the mean difference in bf16, in 4 bits or with another engine
NUM_PROMPTS = 8  # prompts that are completed for the check
MAX_NEW_TOKENS = 32  # tokens of each of these completions
MAX_ROWS = 32  # completions of the first rollout that are compared
NUM_CANDIDATES = 256  # training prompts that the prompts are chosen from

_RESTARTS = Algorithm(
    "restarts", "restarts", (Phase(rollin=None, rollout=POLICY), Phase(rollin=POLICY, rollout=POLICY, beta=1.0)),
    constant_schedule(PhaseWeight(0, 0.5, 1.0, 0.0), PhaseWeight(1, 0.5, 1.0, 0.0)), "gae",
    "the policy continues its own prefixes in half of the rows",
)  # fmt: skip


@dataclass(frozen=True)
class Agreement:
    """The differences of the log-probabilities of sampling from those of training, in nats."""

    tokens: int
    max_error: float
    mean_error: float


def measure_agreement(rollout: Rollout, policy: LanguageModel, forward_config: ForwardConfig) -> Agreement:
    """Compute the log-probabilities of the policy's tokens again, and compare them.

    Compared are those that PPO's ratio uses and those of the full softmax; a token counts with the
    larger difference, and with infinity if one of them is not a number.
    """
    by_policy = rollout.by_policy
    used, full, _ = RolloutScorer(rollout, forward_config).recompute(policy)
    sampled = rollout.full_log_probs if forward_config.ppo.ratio_support == "full" else rollout.log_probs
    pairs = ((sampled, used), (rollout.full_log_probs, full))
    errors = torch.stack([(before - after)[by_policy].double().abs() for before, after in pairs]).amax(0)
    errors = errors.nan_to_num(nan=math.inf)
    tokens = errors.numel()
    return Agreement(tokens, float(errors.max()) if tokens else math.nan, float(errors.mean()) if tokens else math.nan)


def sample_restarts(rollout_config: RolloutConfig, prompts: Sequence[Prompt]) -> Rollout:
    """Complete prompts of different lengths; half of the completions are restarted from a prefix.

    The prompts are the shortest, the longest and some between them.
    """
    candidates = list(prompts[:NUM_CANDIDATES])
    lengths = [len(ids) for ids in rollout_config.policy.codec.prompts(candidates)]
    order = sorted(range(len(candidates)), key=lambda place: lengths[place])
    last = len(order) - 1
    chosen = [order[round(step * last / (NUM_PROMPTS - 1))] for step in range(NUM_PROMPTS)]
    bounded = replace(
        rollout_config,
        guide=None,
        max_new_tokens=min(MAX_NEW_TOKENS, rollout_config.max_new_tokens),
        min_new_tokens=min(MAX_NEW_TOKENS, rollout_config.min_new_tokens),
    )
    rows = [candidates[place] for place in (*chosen[::2], *chosen[1::2])]  # both halves have all lengths
    return collect_rollout(bounded, _RESTARTS, _RESTARTS.schedule(0, 0.0), rows, range(NUM_PROMPTS))


class AgreementCheck:
    """The check of a run, on completions of its own and of the first rollout."""

    def __init__(self, rollout_config: RolloutConfig, prompts: Sequence[Prompt]) -> None:
        self.rollout_config, self.prompts = rollout_config, prompts
        self.sampled: Agreement | None = None
        self.first_rollout: Agreement | None = None

    def require(self, forward_config: ForwardConfig, rollout: Rollout | None = None) -> None:
        """Raise `TrainingError` unless sampler and trainer agree; each part is checked once.

        Args:
            forward_config: precision and the other settings of the trainer's forward pass.
            rollout: the rollout of the first update; None before there is one.
        """
        if self.sampled is None:
            completions = sample_restarts(self.rollout_config, self.prompts)
            agreement = measure_agreement(completions, self.rollout_config.policy, forward_config)
            self._raise_unless_close(agreement, forward_config, "")
            self.sampled = agreement
        if rollout is not None and self.first_rollout is None:
            agreement = measure_agreement(_longest_and_shortest(rollout), self.rollout_config.policy, forward_config)
            if agreement.tokens:  # the guide may have generated all of them
                self._raise_unless_close(agreement, forward_config, " of the first rollout")
            self.first_rollout = agreement

    def _raise_unless_close(self, agreement: Agreement, forward_config: ForwardConfig, which: str) -> None:
        exact = self.rollout_config.sampler.is_exact and forward_config.precision == "fp32"
        error, bound = (agreement.max_error, MAX_ERROR) if exact else (agreement.mean_error, MAX_MEAN_ERROR)
        if error <= bound:  # nan is no pass
            return
        kind = getattr(self.rollout_config.policy.model.config, "model_type", "unknown")
        differ = (
            f"differ by {'up to' if exact else 'on average'} {error:.2g} nats in {agreement.tokens} tokens{which}, which is "
            f"above {bound:g}"
            if agreement.tokens
            else "cannot be compared, because it sampled no token"
        )
        raise TrainingError(
            f"the log-probabilities of sampling and of training {differ}: a model of type '{kind}' cannot be trained with "
            "this version or sampler; choose another model (docs/models.md)."
        )


def _longest_and_shortest(rollout: Rollout) -> Rollout:
    """Keep the policy's tokens in the longest and the shortest `MAX_ROWS` rows only.

    Tokens of the other rows count as the guide's, so they are not compared.
    """
    order, half = rollout.lengths.argsort(stable=True), MAX_ROWS // 2
    kept = torch.zeros(len(order), dtype=torch.bool)
    kept[torch.cat([order[:half], order[half:][-half:]])] = True
    return replace(rollout, origin=rollout.origin.masked_fill(rollout.by_policy & ~kept[:, None], int(GUIDE)))
