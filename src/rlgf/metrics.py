"""Metrics of texts and of models that read them."""

import math
from collections.abc import Sequence

import torch

from rlgf import ops
from rlgf.experience import Reading
from rlgf.forward import micro_batches, padded, read_tokens, token_logits
from rlgf.models import LanguageModel
from rlgf.offload import awake
from rlgf.types import Prompt, Rollout


def perplexity(language_model: LanguageModel, prompts: Sequence[Prompt], budget: int, reading: Reading) -> float:
    """exp(Σ negative log-likelihood / Σ tokens) of the prompts' references, all of them, given the prompts.

    A reference is cut at `budget` tokens, as every text is; its end token counts where it fits.
    """
    rows: list[list[int]] = []
    starts: list[int] = []
    for prompt in prompts:
        before = language_model.codec.prompt(prompt) if prompt.references else []
        for reference in prompt.references:
            rows.append([*before, *language_model.codec.target(reference, language_model.end_id, budget)])
            starts.append(len(before))
    if not rows:
        return float("nan")
    columns = torch.arange(max(map(len, rows)))
    lengths = torch.tensor([len(row) for row in rows])
    selected = (columns >= torch.tensor(starts)[:, None]) & (columns < lengths[:, None])
    return token_perplexity(language_model, padded(rows), torch.tensor(starts), selected, reading)


def token_perplexity(
    language_model: LanguageModel, ids: torch.Tensor, starts: torch.Tensor, selected: torch.Tensor, reading: Reading
) -> float:
    """exp of the mean negative log-likelihood of the selected tokens of `ids` [texts, width]; responses begin at `starts`."""
    total = 0.0
    for batch, logits, _ in read_tokens(language_model, ids, starts, selected, reading.token_budget, reading.precision):
        total -= float(ops.token_log_probs(logits, ids[batch.places].to(logits.device)).double().sum())
    count = int(selected.sum())
    return math.exp(min(total / count, 700.0)) if count else float("nan")


def kl_to_reference(rollout: Rollout, policy: LanguageModel, reference: LanguageModel, reading: Reading) -> tuple[float, float]:
    """KL(π ‖ π_0) of fresh texts by the policy: exact at every state and summed over a text, and its k1 estimate.

    Both in nats, averaged over texts; the distributions are the full, untempered ones.
    """
    exact, estimate = 0.0, 0.0
    starts, budget = rollout.prompt_lengths, reading.token_budget // 2
    with torch.no_grad(), awake(policy.model), awake(reference.model):
        for batch in micro_batches(policy.model, rollout.ids, starts, rollout.written, budget):
            mine, _ = token_logits(policy, batch, reading.precision)
            theirs, _ = token_logits(reference, batch, reading.precision)
            exact += float(ops.exact_kl(mine, theirs).double().sum())
            tokens = rollout.ids[batch.places].to(mine.device)
            difference = ops.kl_k1(ops.token_log_probs(mine, tokens), ops.token_log_probs(theirs, tokens))
            estimate += float(difference.double().sum())
    texts = rollout.ids.shape[0]
    return exact / texts, estimate / texts
