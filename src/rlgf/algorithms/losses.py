"""Losses and divergences (PPO, values, KL, preferences), as functions of tensors."""

import torch
from torch import Tensor


def token_weights(
    selected: Tensor, aggregation: str = "token_mean", total: float | None = None, max_new_tokens: int = 1
) -> Tensor:
    """Compute the weight of each selected token in the mean of a loss.

    Args:
        selected: bool [rows, width].
        aggregation: 'token_mean': equal weight for all tokens; 'sequence_mean': equal weight for
            all rows, and for all tokens of a row; 'constant': 1 / (rows · max_new_tokens) for each
            token, so that long completions count more (Dr. GRPO).
        total: the denominator (see `weight_total`) of the whole optimizer step, over all
            micro-batches and processes; default: that of `selected` alone.
        max_new_tokens: the largest length of a completion, for 'constant'.

    Returns:
        [rows, width], zero outside the selection. An empty selection gives zeros, not NaN.
    """
    chosen = selected.float()
    if aggregation in ("token_mean", "constant"):
        per_token = chosen
    elif aggregation == "sequence_mean":
        per_token = chosen / chosen.sum(1, keepdim=True).clamp(min=1)
    else:
        raise ValueError(f"unknown aggregation {aggregation!r}")
    return per_token / max(weight_total(selected, aggregation, max_new_tokens) if total is None else total, 1)


def weight_total(selected: Tensor, aggregation: str, max_new_tokens: int = 1) -> float:
    """Count the denominator of `token_weights`.

    'token_mean': the selected tokens; 'sequence_mean': the rows with a selected token; 'constant':
    all rows times `max_new_tokens`, or 0 without a selected token.
    """
    if aggregation == "constant":
        return float(len(selected) * max_new_tokens * bool(selected.any()))
    return float(selected.sum() if aggregation == "token_mean" else selected.any(1).sum())


def importance_ratio(log_ratio: Tensor, rows: Tensor, level: str) -> Tensor:
    """Compute the importance ratio of each token, or of its whole completion.

    Args:
        log_ratio: log π − log π_old, [tokens].
        rows: int64 [tokens], the row of each token; all trained tokens of a row are present.
        level: 'token': exp(log ratio); 'sequence': exp of its mean over the row (GSPO);
            'sequence_sum': exp of its sum over the row (RLOO of TRL).

    Returns:
        ρ, [tokens].

    Source: Zheng et al. 2025 (arXiv:2507.18071), equation 7, for 'sequence'.
    """
    if level == "token":
        return log_ratio.exp()
    if level not in ("sequence", "sequence_sum"):
        raise ValueError(f"unknown level {level!r}")
    _, members = rows.unique(return_inverse=True)
    count = int(members.max()) + 1 if len(members) else 0
    summed = log_ratio.new_zeros(count).index_add(0, members, log_ratio)
    if level == "sequence":
        summed = summed / torch.bincount(members, minlength=count)
    return summed.exp()[members]


def ppo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    clip_range: float,
    clip_range_high: float | None = None,
    dual_clip: float | None = None,
    ratio: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute PPO's clipped surrogate loss.

    L = −Σ w s, with s = min(ρ A, clip(ρ, 1−ε, 1+ε_high) A) and ρ = exp(log π − log π_old). With a
    dual clip c, s is at least c A where A < 0.

    Args:
        log_probs: log π, [tokens].
        old_log_probs: log π_old, [tokens].
        advantages: A, [tokens].
        weights: w, [tokens], from `token_weights`.
        clip_range: ε.
        clip_range_high: ε_high; None: ε.
        dual_clip: c, above 1; None: none.
        ratio: ρ, [tokens], from `importance_ratio`; None: that of each token.

    Returns:
        The loss L, a scalar, and the ratios ρ, [tokens].

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7; Yu et al.
    2025 (arXiv:2503.14476) for ε_high; Ye et al. 2020 (arXiv:1912.09729) for c.
    """
    ratio = (log_probs - old_log_probs).exp() if ratio is None else ratio
    high = clip_range if clip_range_high is None else clip_range_high
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_range, 1 + high) * advantages)
    if dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.maximum(surrogate, dual_clip * advantages), surrogate)
    return -(weights * surrogate).sum(), ratio


def cispo_loss(log_probs: Tensor, advantages: Tensor, weights: Tensor, ratio: Tensor, clip_range_high: float) -> Tensor:
    """Compute CISPO's loss: a policy gradient with clipped, constant importance weights.

    L = −Σ w sg(min(ρ, 1+ε_high)) A log π, where sg has no gradient: all tokens keep theirs.

    Args:
        log_probs: log π, [tokens].
        advantages: A, [tokens].
        weights: w, [tokens], from `token_weights`.
        ratio: ρ, [tokens], from `importance_ratio`.
        clip_range_high: ε_high.

    Source: MiniMax 2025 (arXiv:2506.13585), equations 4 and 5.
    """
    return -(weights * ratio.detach().clamp(max=1 + clip_range_high) * advantages * log_probs).sum()


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

    KL = Σ_v π(v) (log π(v) − log π_0(v)), where 0 log 0 = 0.

    Args:
        logits: of π, [states, vocabulary]; −∞ for ids that no token has.
        reference_logits: of π_0, [states, vocabulary].

    Returns:
        [states].
    """
    log_policy = logits.float().log_softmax(1)
    log_reference = reference_logits.float().log_softmax(1)
    probability = log_policy.exp()
    return (probability * (log_policy - log_reference)).masked_fill(probability == 0, 0.0).sum(1)


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
