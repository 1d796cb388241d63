"""Sampling of tokens from logits: temperature, top-k, top-p, inverse cumulative distribution."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlgf.models.log_probs import SampledSupport, logsumexp, mask_ids
from rlgf.types import SamplingParams


@dataclass(frozen=True)
class SampledTokens:
    """One sampled token for each row."""

    tokens: Tensor  # int64 [rows]
    log_probs: Tensor  # float [rows]
    full_log_probs: Tensor  # float [rows]
    support: SampledSupport | None


def sample_tokens(
    logits: Tensor, uniforms: Tensor, forbidden: Tensor, end_ids: Sequence[int], sampling: SamplingParams
) -> SampledTokens:
    """Sample a token from each row of `logits` [rows, vocabulary] (float32).

    Order, as with transformers' logits processors: forbid EOS tokens (in the rows of `forbidden`,
    bool [rows]), divide by the temperature, top-k (tokens tied with the k-th are kept), top-p.
    `uniforms` is [rows], float64 in [0, 1).
    """
    full = logsumexp(logits)
    ends = torch.tensor(end_ids, dtype=torch.int64)
    if not sampling.restricts_support and not sampling.greedy:
        return _sample_full_vocabulary(logits, full, uniforms, forbidden, ends, sampling.temperature)
    allowed = mask_ids(logits, forbidden, ends) if bool(forbidden.any()) else logits
    if sampling.greedy:
        tokens = allowed.argmax(1)
        picked = logits.gather(1, tokens[:, None]).squeeze(1)
        return SampledTokens(tokens, torch.zeros_like(picked), picked - full, None)
    scaled = allowed if sampling.temperature == 1.0 else allowed / sampling.temperature
    kept, ids = restrict_support(scaled, sampling)
    place = inverse_cdf((kept - kept.amax(1, keepdim=True)).exp(), uniforms)
    tokens = ids.gather(1, place[:, None]).squeeze(1)
    inside = kept > -torch.inf
    log_probs = kept.gather(1, place[:, None]).squeeze(1) - kept.logsumexp(1)
    picked = logits.gather(1, tokens[:, None]).squeeze(1)
    return SampledTokens(tokens, log_probs, picked - full, SampledSupport(inside.sum(1), ids[inside]))


def _sample_full_vocabulary(
    logits: Tensor, full: Tensor, uniforms: Tensor, forbidden: Tensor, end_ids: Tensor, temperature: float
) -> SampledTokens:
    """Sample from the whole vocabulary.

    The weights of forbidden tokens are set to zero, which avoids a copy of all logits.
    """
    scaled = logits if temperature == 1.0 else logits / temperature
    total = full if temperature == 1.0 else scaled.logsumexp(1)
    weights = (scaled - total[:, None]).exp_()
    if bool(forbidden.any()):
        blocked = weights[:, end_ids]
        share = (blocked.sum(1) * forbidden).clamp(max=1.0)
        # subtracting a large share loses precision: mask the EOS tokens before the softmax instead
        if bool((share > 0.5).any()):
            scaled = mask_ids(scaled, forbidden, end_ids)
            total = scaled.logsumexp(1)
            weights = (scaled - total[:, None]).exp_()
        else:
            total = total + torch.log1p(-share)
            weights[:, end_ids] = blocked.masked_fill(forbidden[:, None], 0.0)
    tokens = inverse_cdf(weights, uniforms)
    picked = logits.gather(1, tokens[:, None]).squeeze(1)
    return SampledTokens(tokens, scaled.gather(1, tokens[:, None]).squeeze(1) - total, picked - full, None)


def restrict_support(scaled: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """Return the logits kept by top-k and top-p and their token ids, ascending.

    Both are [rows, largest number kept]; removed logits are −∞.
    """
    vocabulary = scaled.shape[1]
    count = min(sampling.top_k, vocabulary) if sampling.top_k else vocabulary
    if count < vocabulary:
        values, ids = scaled.topk(count + 1, dim=1)
        # every token tied with the k-th is kept
        if bool((values[:, count - 1] == values[:, count]).any()):
            values, ids = scaled.sort(dim=1, descending=True, stable=True)
            values = values.masked_fill(values < values[:, count - 1 : count], -torch.inf)
            max_count = int((values > -torch.inf).sum(1).max())
            values, ids = values[:, :max_count], ids[:, :max_count]
        else:
            # orders equal values by token id, independent of the other rows
            ids, order = ids[:, :count].sort(1)
            values, order = values[:, :count].gather(1, order).sort(dim=1, descending=True, stable=True)
            ids = ids.gather(1, order)
    else:
        values, ids = scaled.sort(dim=1, descending=True, stable=True)
    if sampling.top_p < 1.0:
        # as in transformers: from the least likely token up, remove while the cumulative
        # probability is at most 1 − p
        tail = values.softmax(1).flip(1).cumsum(1).flip(1)
        outside = tail <= 1 - sampling.top_p
        outside[:, 0] = False
        values = values.masked_fill(outside, -torch.inf)
        max_count = int((values > -torch.inf).sum(1).max())
        values, ids = values[:, :max_count], ids[:, :max_count]
    ids, order = ids.sort(1)
    return values.gather(1, order), ids


def inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first index whose cumulative weight exceeds `uniforms` × total, [rows].

    `weights` is [rows, n] and `uniforms` [rows]; an index of weight 0 is never returned.
    """
    cumulative = weights.cumsum(1, dtype=torch.float64)
    goal = uniforms.to(cumulative.device)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, goal, right=True).squeeze(1)
    # if the goal was rounded up to the total, take the last index of positive weight
    if bool((place == weights.shape[1]).any()):
        place = torch.minimum(place, (cumulative < cumulative[:, -1:]).sum(1))
    return place
