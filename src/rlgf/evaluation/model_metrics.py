"""Perplexities and KL divergences of language models."""

import math
from collections.abc import Sequence

import torch

from rlgf.algorithms import losses
from rlgf.models.forward import iter_logits, micro_batches, pad_rows, token_logits
from rlgf.models.language_model import LanguageModel
from rlgf.models.log_probs import token_log_probs
from rlgf.models.offload import on_device
from rlgf.rl.experience import ForwardConfig
from rlgf.rl.tensors import Rollout
from rlgf.types import Prompt


def perplexity(
    language_model: LanguageModel, prompts: Sequence[Prompt], max_new_tokens: int, forward_config: ForwardConfig
) -> float:
    """Compute the perplexity of all references of the prompts, given the prompts.

    It is exp(Σ negative log-likelihood / Σ tokens). A reference is truncated at `max_new_tokens`,
    as every completion is; its EOS token counts if it fits. Without references the result is nan.
    """
    rows: list[list[int]] = []
    starts: list[int] = []
    for prompt in prompts:
        before = language_model.codec.prompt(prompt) if prompt.references else []
        for reference in prompt.references:
            rows.append([*before, *language_model.codec.target(reference, language_model.eos_token_id, max_new_tokens)])
            starts.append(len(before))
    if not rows:
        return float("nan")
    columns = torch.arange(max(map(len, rows)))
    lengths = torch.tensor([len(row) for row in rows])
    selected = (columns >= torch.tensor(starts)[:, None]) & (columns < lengths[:, None])
    return token_perplexity(language_model, pad_rows(rows), torch.tensor(starts), selected, forward_config)


def token_perplexity(
    language_model: LanguageModel,
    ids: torch.Tensor,
    starts: torch.Tensor,
    selected: torch.Tensor,
    forward_config: ForwardConfig,
) -> float:
    """Compute exp of the mean negative log-likelihood of the selected tokens.

    `ids` and `selected` are [rows, width]; completions begin at `starts` [rows].
    """
    total = 0.0
    for batch, logits, _ in iter_logits(
        language_model, ids, starts, selected, forward_config.token_budget, forward_config.precision
    ):
        total -= float(token_log_probs(logits, ids[batch.token_index].to(logits.device)).double().sum())
    count = int(selected.sum())
    return math.exp(min(total / count, 700.0)) if count else float("nan")


def kl_to_reference(
    rollout: Rollout, policy: LanguageModel, reference: LanguageModel, forward_config: ForwardConfig
) -> tuple[float, float]:
    """Compute KL(π ‖ π_0) on new completions of the policy, exactly and by k1.

    The exact one is computed at every state and summed over a completion. Both are in nats,
    averaged over completions; the distributions are full and untempered.
    """
    exact, estimate = 0.0, 0.0
    starts, token_budget = rollout.prompt_lengths, forward_config.token_budget // 2
    with torch.no_grad(), on_device(policy.model), on_device(reference.model):
        for batch in micro_batches(policy.model, rollout.ids, starts, rollout.completion_mask, token_budget):
            policy_logits, _ = token_logits(policy, batch, forward_config.precision)
            reference_logits, _ = token_logits(reference, batch, forward_config.precision)
            exact += float(losses.exact_kl(policy_logits, reference_logits).double().sum())
            tokens = rollout.ids[batch.token_index].to(policy_logits.device)
            difference = losses.kl_k1(token_log_probs(policy_logits, tokens), token_log_probs(reference_logits, tokens))
            estimate += float(difference.double().sum())
    num_completions = rollout.ids.shape[0]
    return exact / num_completions, estimate / num_completions
