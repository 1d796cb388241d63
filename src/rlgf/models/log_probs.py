"""Log-probabilities of tokens, over the support they were sampled from."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlgf.kernels import dispatch


@dataclass(frozen=True)
class SampledSupport:
    """The tokens that could have been sampled, as ragged lists of ids.

    The i-th token has `counts[i]` ids. `counts` has the shape of the tokens; it is 0 where the
    support was not restricted. `ids` is flat, in row-major order.
    """

    counts: Tensor  # int64, [rows, width] or [tokens]
    ids: Tensor  # int64, [counts.sum()]

    def select(self, rows: Tensor, columns: Tensor) -> "SampledSupport":
        """Return the supports of the tokens at `(rows[i], columns[i])`, for [len(rows)] tokens."""
        ends = self.counts.flatten().cumsum(0).view_as(self.counts)
        counts = self.counts[rows, columns]
        starts = ends[rows, columns] - counts
        offsets = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return SampledSupport(counts, self.ids[starts.repeat_interleave(counts) + offsets])


def token_log_probs(
    logits: Tensor,
    tokens: Tensor,
    temperature: float = 1.0,
    support: SampledSupport | None = None,
    forbidden: Tensor | None = None,
    forbidden_ids: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """Compute log-probabilities of `tokens` over the support they were sampled from.

    `tokens` is [tokens], `logits` [tokens, vocabulary]; returns [tokens].

    With a `support` the softmax runs over its ids (the sampled token among them). Tokens with an
    empty support use the whole vocabulary, without `forbidden_ids` where `forbidden` [tokens] is
    true (an EOS token before `min_new_tokens`). `inplace_backward` lets the backward pass overwrite
    `logits` with the gradient; nothing else may use them then.
    """
    scaled = logits if temperature == 1.0 else logits / temperature
    if support is not None and bool((support.counts > 0).any()):
        token_logits = scaled.gather(1, tokens[:, None]).squeeze(1)
        width = int(support.counts.max())
        inside = torch.arange(width, device=logits.device) < support.counts[:, None]
        ids = torch.zeros(inside.shape, dtype=torch.int64, device=logits.device)
        ids[inside] = support.ids
        kept = scaled.gather(1, ids).masked_fill(~inside, -torch.inf)
        if bool((support.counts > 0).all()):
            return token_logits - kept.logsumexp(1)
        whole = token_log_probs(logits, tokens, temperature, None, forbidden, forbidden_ids)
        limited = token_logits - torch.where(support.counts[:, None] > 0, kept, 0.0).logsumexp(1)
        return torch.where(support.counts > 0, limited, whole)
    if forbidden is None or forbidden_ids is None or not bool(forbidden.any()):
        forbidden_ids = None
    if not (torch.is_grad_enabled() and logits.requires_grad):
        allowed = scaled if forbidden is None or forbidden_ids is None else mask_ids(scaled, forbidden, forbidden_ids)
        return allowed.gather(1, tokens[:, None]).squeeze(1) - logsumexp(allowed)
    owned = inplace_backward or scaled is not logits
    result: Tensor = _FullVocabularyLogProbs.apply(scaled, tokens, forbidden, forbidden_ids, owned)
    return result


class _FullVocabularyLogProbs(torch.autograd.Function):
    """A differentiable log-softmax at `tokens`, with one tensor of the size of the logits.

    If `owned`, the logits are overwritten instead of copied.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, forbidden: Tensor | None, forbidden_ids: Tensor | None, owned: bool
    ) -> Tensor:
        whole = logits if owned else logits.clone()
        if forbidden is not None and forbidden_ids is not None:
            whole[:, forbidden_ids] = whole[:, forbidden_ids].masked_fill(forbidden[:, None], -torch.inf)
        normalizers = logsumexp(whole)
        ctx.save_for_backward(tokens, normalizers)
        ctx.logits = whole  # not saved by autograd, which rejects overwritten tensors
        return whole.gather(1, tokens[:, None]).squeeze(1) - normalizers

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,), (tokens, normalizers), logits = gradients, ctx.saved_tensors, ctx.logits
        ctx.logits = None
        result = dispatch.log_softmax_backward(logits, normalizers, tokens, gradient)
        if result is not None:
            # so that autograd raises if another operation saved the overwritten logits
            torch.autograd.graph.increment_version(result)
            return result, None, None, None, None
        probabilities = logits.sub_(normalizers[:, None]).exp_()
        result = probabilities.mul_(-gradient[:, None])  # the gradient of log p_i is 1[i] − p
        return result.scatter_add_(1, tokens[:, None], gradient[:, None]), None, None, None, None


def logsumexp(logits: Tensor) -> Tensor:
    """Compute `logits.logsumexp(1)`, with torch some rows at a time.

    So torch's working copy stays in the processor's cache.
    """
    fast = dispatch.logsumexp(logits)
    if fast is not None:
        return fast
    return torch.cat([part.logsumexp(1) for part in logits.split(64)])


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the full, untempered softmax, in nats.

    −Σ_a p_a log p_a. Computed in chunks of rows, so that the copies stay in the cache.

    Args:
        logits: [tokens, vocabulary].

    Returns:
        [tokens].
    """
    parts: list[Tensor] = []
    for part in logits.split(64):
        log_probs = part.log_softmax(1)
        total = -(log_probs.exp() * log_probs).sum(1)
        if bool(total.isnan().any()):  # 0 · −∞ at ids without a token
            total = torch.special.entr(log_probs.exp()).sum(1)
        parts.append(total)
    return torch.cat(parts) if parts else logits.new_zeros(0)


def mask_ids(logits: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """Return `logits` [rows, vocabulary] with `ids` at −∞ where `rows` is true."""
    blocked = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    blocked[ids] = True
    return logits.masked_fill(rows[:, None] & blocked, -torch.inf)
