"""The arithmetic: tensors in, tensors out. Nothing here knows a model, a guide or an algorithm's name.

Shapes: `[texts, width]` tensors have one entry per token, rows padded on the right; `[tokens]` tensors hold tokens already
selected. `selected` answers a question about tokens ("did the policy write it?") and is always positive.
"""

from typing import Any

import torch
from torch import Tensor

from rlgf.distributed import Moments
from rlgf.kernels import native
from rlgf.types import Support


def token_weights(selected: Tensor, aggregation: str = "token_mean", total: float | None = None) -> Tensor:
    """The weight of each selected token in a mean, zero elsewhere, [texts, width].

    'token_mean' weighs tokens alike; 'sequence_mean' weighs texts alike and the tokens within a text alike. `total` is the
    denominator (tokens or texts) counted over the whole optimizer step, all micro-batches and processes; by default that of
    `selected` alone. An empty selection gives zeros, not NaN.
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
    """The denominator of `token_weights`: how many tokens, or how many texts with a selected token."""
    return float(selected.sum() if aggregation == "token_mean" else selected.any(1).sum())


def place_at_end(values: Tensor, selected: Tensor) -> Tensor:
    """`values` [texts] at the last selected column of each row, zero elsewhere; a row without one gets nothing."""
    columns = torch.arange(selected.shape[1]) * selected
    placed = torch.zeros(selected.shape, dtype=values.dtype)
    rows = selected.any(1)
    placed[rows, columns.max(1).values[rows]] = values[rows]
    return placed


def td_errors(rewards: Tensor, values: Tensor, selected: Tensor, gamma: float) -> Tensor:
    """One-step temporal-difference errors over each row's contiguous run of selected tokens, [texts, width].

    δ_t = r_t + γ V(s_{t+1}) − V(s_t), with V = 0 after the last token (the horizon is finite, so the end is an end).
    """
    following = torch.zeros_like(values)
    following[:, :-1] = values[:, 1:] * selected[:, 1:]
    return (rewards + gamma * following - values) * selected


def gae(rewards: Tensor, values: Tensor, selected: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation over each row's contiguous run of selected tokens, [texts, width].

    A_t = Σ_{l≥0} (γλ)^l δ_{t+l}. Source: Schulman et al. 2016, equation 16.
    """
    deltas = td_errors(rewards, values, selected, gamma)
    advantages = torch.zeros_like(deltas)
    running = torch.zeros(deltas.shape[0], dtype=deltas.dtype)
    for column in reversed(range(deltas.shape[1])):
        running = deltas[:, column] + gamma * lam * running
        advantages[:, column] = running
    return advantages * selected


def moments(values: Tensor, selected: Tensor) -> Moments:
    """Count, sum and sum of squares of the selected values, in float64."""
    chosen = values[selected].double()
    return Moments(float(chosen.numel()), float(chosen.sum()), float(chosen.square().sum()))


def whiten(values: Tensor, selected: Tensor, over: Moments | None = None) -> Tensor:
    """Selected values shifted and scaled to mean 0 and (population) variance 1, zero elsewhere.

    `over` gives the sums over all processes; by default those of `values` alone.
    """
    sums = over or moments(values, selected)
    if sums.count == 0:
        return torch.zeros_like(values)
    mean = sums.total / sums.count
    variance = max(sums.squares / sums.count - mean**2, 0.0)
    return torch.where(selected, (values - mean) / (variance + 1e-8) ** 0.5, 0.0)


def ppo_loss(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, weights: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate loss, summed with `weights`, and the ratios; all `[tokens]`.

    −Σ w min(ρ A, clip(ρ, 1−ε, 1+ε) A), ρ = exp(log π − log π_old). Source: Schulman et al. 2017, equation 7.
    """
    ratio = (log_probs - old_log_probs).exp()
    surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -(weights * surrogate).sum(), ratio


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, weights: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error, the larger of clipped and unclipped, summed with `weights`; and which tokens were clipped.

    `clip` bounds how far a value may move from its old one (None: no bound). Source: PPO2 of OpenAI baselines.
    """
    error = (values - returns).square()
    if clip is None:
        return 0.5 * (weights * error).sum(), torch.zeros_like(values, dtype=torch.bool)
    bounded = old_values + (values - old_values).clamp(-clip, clip)
    bounded_error = (bounded - returns).square()
    return 0.5 * (weights * torch.maximum(error, bounded_error)).sum(), bounded_error > error


def kl_k1(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """log π − log π_0 at the drawn tokens: unbiased for KL(π ‖ π_0) under π."""
    return log_probs - reference_log_probs


def kl_loss(log_probs: Tensor, reference_log_probs: Tensor, ratio: Tensor, weights: Tensor, estimator: str) -> Tensor:
    """A KL penalty to be differentiated, summed with `weights`; all `[tokens]`.

    'k2': ½ (log π − log π_0)², whose gradient on policy is that of the KL. 'k3': exp(d) − d − 1 with d = log π_0 − log π,
    weighted by the importance ratio, so that it stays unbiased off policy. Source: Schulman, Approximating KL Divergence.
    """
    if estimator == "k2":
        return 0.5 * (weights * (log_probs - reference_log_probs).square()).sum()
    if estimator == "k3":
        difference = reference_log_probs - log_probs
        return (weights * ratio * (difference.exp() - difference - 1)).sum()
    raise ValueError(f"unknown estimator {estimator!r}")


def token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    support: Support | None = None,
    forbidden: Tensor | None = None,
    forbidden_ids: Tensor | None = None,
    consume: bool = False,
) -> Tensor:
    """Log-probabilities of `tokens` [tokens] under `logits` [tokens, vocabulary], over the support they were drawn from.

    With a `support` the softmax runs over its ids (the drawn token among them); tokens with an empty support use the whole
    vocabulary, without `forbidden_ids` where `forbidden` [tokens] says so (an end token before the minimum length).
    `consume` lets the backward pass write the gradient over `logits`, which nobody else may need then.
    """
    scaled = logits if temperature == 1.0 else logits / temperature
    if support is not None and bool((support.counts > 0).any()):
        drawn = scaled.gather(1, tokens[:, None]).squeeze(1)
        width = int(support.counts.max())
        inside = torch.arange(width, device=logits.device) < support.counts[:, None]
        ids = torch.zeros(inside.shape, dtype=torch.int64, device=logits.device)
        ids[inside] = support.ids
        kept = scaled.gather(1, ids).masked_fill(~inside, -torch.inf)
        if bool((support.counts > 0).all()):
            return drawn - kept.logsumexp(1)
        whole = token_log_probs(logits, tokens, temperature, None, forbidden, forbidden_ids)
        limited = drawn - torch.where(support.counts[:, None] > 0, kept, 0.0).logsumexp(1)
        return torch.where(support.counts > 0, limited, whole)
    if forbidden is None or forbidden_ids is None or not bool(forbidden.any()):
        forbidden_ids = None
    if not (torch.is_grad_enabled() and logits.requires_grad):
        allowed = scaled if forbidden is None or forbidden_ids is None else without_ids(scaled, forbidden, forbidden_ids)
        return allowed.gather(1, tokens[:, None]).squeeze(1) - log_normaliser(allowed)
    owned = consume or scaled is not logits
    result: Tensor = _WholeLogProbs.apply(scaled, tokens, forbidden, forbidden_ids, owned)
    return result


class _WholeLogProbs(torch.autograd.Function):
    """Log-softmax at `tokens`, to be differentiated: one tensor of the size of the logits, written in place where it may be."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, forbidden: Tensor | None, forbidden_ids: Tensor | None, owned: bool
    ) -> Tensor:
        whole = logits if owned else logits.clone()
        if forbidden is not None and forbidden_ids is not None:
            whole[:, forbidden_ids] = whole[:, forbidden_ids].masked_fill(forbidden[:, None], -torch.inf)
        normalisers = log_normaliser(whole)
        ctx.save_for_backward(tokens, normalisers)
        ctx.logits = whole  # not saved by autograd, which would refuse what was written in place
        return whole.gather(1, tokens[:, None]).squeeze(1) - normalisers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,), (tokens, normalisers), logits = gradients, ctx.saved_tensors, ctx.logits
        ctx.logits = None
        if native.takes(logits) and logits.is_contiguous():
            result = native.log_probabilities_back(logits, normalisers, tokens.contiguous(), gradient.contiguous())
            torch.autograd.graph.increment_version(result)  # who kept the logits for a gradient of theirs is to hear of it
            return result, None, None, None, None
        probabilities = logits.sub_(normalisers[:, None]).exp_()
        result = probabilities.mul_(-gradient[:, None])  # the gradient of log p_i is 1[i] − p
        return result.scatter_add_(1, tokens[:, None], gradient[:, None]), None, None, None, None


def log_normaliser(logits: Tensor) -> Tensor:
    """`logits.logsumexp(1)`; where torch computes it some rows at a time: its working copy stays in the cache."""
    if native.takes(logits) and logits.is_contiguous():
        return native.log_normalisers(logits)
    return torch.cat([part.logsumexp(1) for part in logits.split(64)])


def without_ids(logits: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """`logits` [rows, vocabulary] with `ids` at −∞ in the rows where `rows` is true."""
    blocked = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    blocked[ids] = True
    return logits.masked_fill(rows[:, None] & blocked, -torch.inf)


def exact_kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(π ‖ π_0) over the whole vocabulary at each state, [states, vocabulary] twice -> [states]."""
    log_policy = logits.float().log_softmax(1)
    log_reference = reference_logits.float().log_softmax(1)
    return (log_policy.exp() * (log_policy - log_reference)).sum(1)


def preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(r_chosen − r_rejected) of each pair of scores, [pairs] twice -> [pairs]. Source: Bradley and Terry 1952."""
    return torch.nn.functional.softplus(rejected - chosen)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns): 1 is a perfect critic, 0 one that knows the mean; 0 where undefined."""
    if returns.numel() < 2:
        return 0.0
    spread = float(returns.var())
    return 1.0 - float((returns - values).var()) / spread if spread > 1e-12 else 0.0
