"""Metrics of texts and of models that read them."""

import math
from collections.abc import Sequence

import torch

from rlgf import ops
from rlgf.experience import Reading
from rlgf.models import LanguageModel, forward, gather_tokens, padded, selected_batches
from rlgf.tokens import encode_prompt, encode_target
from rlgf.types import Prompt, Rollout


def perplexity(language_model: LanguageModel, prompts: Sequence[Prompt], budget: int, reading: Reading) -> float:
    """exp(Σ negative log-likelihood / Σ tokens) of the prompts' first references, given the prompts.

    A reference is cut at `budget` tokens, as every text is; its end token counts where it fits.
    """
    rows: list[list[int]] = []
    starts: list[int] = []
    for prompt in prompts:
        if prompt.references:
            before = encode_prompt(language_model.tokenizer, prompt)
            after = encode_target(language_model.tokenizer, prompt.references[0], language_model.end_id, budget)
            rows.append([*before, *after])
            starts.append(len(before))
    if not rows:
        return float("nan")
    columns = torch.arange(max(map(len, rows)))
    lengths = torch.tensor([len(row) for row in rows])
    selected = (columns >= torch.tensor(starts)[:, None]) & (columns < lengths[:, None])
    return token_perplexity(language_model, padded(rows), selected, reading)


def token_perplexity(language_model: LanguageModel, ids: torch.Tensor, selected: torch.Tensor, reading: Reading) -> float:
    """exp of the mean negative log-likelihood of the selected tokens of `ids` [texts, width]."""
    total = 0.0

    def visit(rows: torch.Tensor, columns: torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        nonlocal total
        total -= float(ops.token_log_probs(logits, ids[rows, columns].to(logits.device)).double().sum())

    gather_tokens(language_model, ids, selected, reading.token_budget, reading.precision, visit)
    count = int(selected.sum())
    return math.exp(min(total / count, 700.0)) if count else float("nan")


def kl_to_reference(rollout: Rollout, policy: LanguageModel, reference: LanguageModel, reading: Reading) -> tuple[float, float]:
    """KL(π ‖ π_0) of fresh texts by the policy: exact at every state and summed over a text, and its k1 estimate.

    Both in nats, averaged over texts; the distributions are the full, untempered ones.
    """
    exact, estimate = 0.0, 0.0
    with torch.no_grad():
        for rows, columns, ids, local_rows in selected_batches(rollout.ids, rollout.written, reading.token_budget // 2):
            mine, _ = forward(policy, ids, local_rows, columns, reading.precision)
            theirs, _ = forward(reference, ids, local_rows, columns, reading.precision)
            exact += float(ops.exact_kl(mine, theirs).double().sum())
            tokens = rollout.ids[rows, columns].to(mine.device)
            difference = ops.kl_k1(ops.token_log_probs(mine, tokens), ops.token_log_probs(theirs, tokens))
            estimate += float(difference.double().sum())
    texts = rollout.ids.shape[0]
    return exact / texts, estimate / texts
