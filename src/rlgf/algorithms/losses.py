"""Losses and divergences (PPO, values, KL, preferences), as functions of tensors."""

import torch
from torch import Tensor


def token_weights(selected: Tensor, aggregation: str = "token_mean", total: float | None = None) -> Tensor:
    """Compute the weight of each selected token in the mean of a loss.

    Args:
        selected: bool [rows, width].
        aggregation: 'token_mean': equal weight for all tokens; 'sequence_mean': equal weight for
            all rows, and for all tokens of a row.
        total: the denominator (tokens or rows) of the whole optimizer step, over all micro-batches
            and processes; default: that of `selected` alone.

    Returns:
        [rows, width], zero outside the selection. An empty selection gives zeros, not NaN.
    """
    chosen = selected.float()
    if aggregation == "token_mean":
        per_token = chosen
    elif aggregation == "sequence_mean":
        per_token = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
    else:
        raise ValueError(f"unknown aggregation {aggregation!r}")
    return per_token / max(weight_total(selected, aggregation) if total is None else total, 1)


def weight_total(selected: Tensor, aggregation: str) -> float:
    """Count the denominator of `token_weights`.

    'token_mean': the selected tokens; 'sequence_mean': the rows with a selected token.
    """
    return float(selected.sum() if aggregation == "token_mean" else selected.any(1).sum())


def ppo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, clip_range: float
) -> tuple[Tensor, Tensor]:
    """Compute PPO's clipped surrogate loss.

    L = −Σ w min(ρ A, clip(ρ, 1−ε, 1+ε) A), with ρ = exp(log π − log π_old).

    Args:
        log_probs: log π, [tokens].
        old_log_probs: log π_old, [tokens].
        advantages: A, [tokens].
        weights: w, [tokens], from `token_weights`.
        clip_range: ε.

    Returns:
        The loss L, a scalar, and the ratios ρ, [tokens].

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7.
    """
    ratio = (log_probs - old_log_probs).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + clip_range) * advantages)
    return -(weights * surrogate).sum(), ratio


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip_range: float | None
) -> tuple[Tensor, Tensor]:
    """Compute the clipped value loss.

    L = ½ Σ w max((V − R)², (V_clip − R)²), with V_clip = V_old + clip(V − V_old, −ε, ε).

    Args:
        values: V, [tokens].
        old_values: V_old, [tokens].
        returns: R, [tokens].
        weights: w, [tokens], from `token_weights`.
        clip_range: ε, the largest change of a value; None: no clipping.

    Returns:
        The loss L, a scalar, and bool [tokens]: where the clipped error is the larger one.

    Source: PPO2 of OpenAI Baselines.
    """
    error = (values - returns).square()
    if clip_range is None:
        return 0.5 * (weights * error).sum(), torch.zeros_like(values, dtype=torch.bool)
    bounded = old_values + (values - old_values).clamp(-clip_range, clip_range)
    bounded_error = (bounded - returns).square()
    return 0.5 * (weights * torch.maximum(error, bounded_error)).sum(), bounded_error > error


def kl_k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Compute the k1 estimate of KL(π ‖ π_0) at the sampled tokens.

    log π − log π_0, [tokens]; unbiased if the tokens were sampled from π.

    Source: Schulman 2020, "Approximating KL Divergence".
    """
    return log_probs - reference_log_probs


def kl_loss(log_probs: Tensor, reference_log_probs: Tensor, ratio: Tensor, weights: Tensor, estimator: str) -> Tensor:
    """Compute a differentiable estimate of KL(π ‖ π_0) to penalize.

    'k2': Σ w ½ (log π − log π_0)²; on policy its gradient is an unbiased estimate of the KL's.
    'k3': Σ w ρ (exp(d) − d − 1), with d = log π_0 − log π; the importance ratio ρ keeps it unbiased
    off policy.

    Args:
        log_probs: log π, [tokens].
        reference_log_probs: log π_0, [tokens].
        ratio: ρ, [tokens], from `ppo_loss`; used by 'k3' only.
        weights: w, [tokens], from `token_weights`.
        estimator: 'k2' or 'k3'.

    Returns:
        The penalty, a scalar.

    Source: Schulman 2020, "Approximating KL Divergence".
    """
    if estimator == "k2":
        return 0.5 * (weights * (log_probs - reference_log_probs).square()).sum()
    if estimator == "k3":
        difference = reference_log_probs - log_probs
        return (weights * ratio * (difference.exp() - difference - 1)).sum()
    raise ValueError(f"unknown estimator {estimator!r}")


def exact_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Compute KL(π ‖ π_0) over the whole vocabulary at each state.

    KL = Σ_v π(v) (log π(v) − log π_0(v)).

    Args:
        logits: of π, [states, vocabulary].
        reference_logits: of π_0, [states, vocabulary].

    Returns:
        [states].
    """
    log_policy = logits.float().log_softmax(1)
    log_reference = reference_logits.float().log_softmax(1)
    return (log_policy.exp() * (log_policy - log_reference)).sum(1)


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Compute the Bradley–Terry loss of each preference pair.

    −log σ(r_chosen − r_rejected).

    Args:
        chosen: r_chosen, the scores of the preferred completions, [pairs].
        rejected: r_rejected, the scores of the rejected completions, [pairs].

    Returns:
        [pairs].

    Source: Bradley and Terry 1952, "Rank Analysis of Incomplete Block Designs".
    """
    return torch.nn.functional.softplus(rejected - chosen)
