"""The metrics of an experience, before the update (docs/metrics.md)."""

from collections.abc import Sequence

from torch import Tensor, tensor

from rlgf.algorithms.advantages import explained_variance
from rlgf.rl.tensors import Rollout
from rlgf.types import POLICY


def experience_metrics(
    rollout: Rollout, trained: Tensor, scores: Sequence[float], rewards: Sequence[float], kl: Tensor, advantages: Tensor,
    values: Tensor, returns: Tensor,
) -> dict[str, float]:  # fmt: skip
    """Compute the metrics of an experience.

    The arguments are those of `rlgf.rl.experience.make_experience`, and its results.
    """
    by_policy, after = rollout.by_policy, rollout.after_switch
    writers = by_policy.any(1)
    alone = (rollout.rollout_by == POLICY) & (rollout.switch_position == 0)
    score, reward = tensor(list(scores)), tensor(list(rewards))
    return {
        "score": float(score.mean()),
        "score_policy_only": float(score[alone].mean()) if bool(alone.any()) else float("nan"),
        "reward": float(reward.mean()),
        "kl_k1": float(kl.sum() / max(1, int(writers.sum()))),
        "kl_k1_per_token": float(kl.sum() / max(1, int(by_policy.sum()))),
        "completion_length": float(rollout.completion_mask.sum(1).float().mean()),
        "switch_position_mean": float(rollout.switch_position.float().mean()),
        "policy_tokens": int(by_policy.sum()),
        "guide_tokens": int(rollout.by_guide.sum()),
        "trained_tokens": int(trained.sum()),
        "critic_tokens": int(after.sum()),
        "guide_completions": int(rollout.by_guide.any(1).sum()),
        "advantage_mean": float(advantages[trained].mean()) if bool(trained.any()) else 0.0,
        "advantage_std": float(advantages[trained].std(unbiased=False)) if bool(trained.any()) else 0.0,
        "value_mean": float(values[after].mean()) if bool(after.any()) else 0.0,
        "explained_variance": explained_variance(values[after], returns[after]),
    }
