"""Best of N: the completion with the highest reward of several per prompt.

It is a baseline for any policy.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlgf.algorithms.guided import PPO
from rlgf.errors import ConfigError
from rlgf.evaluation.evaluate import EvaluationContext, compute_metrics
from rlgf.randomness import Purpose
from rlgf.rewards.base import score
from rlgf.rl.rollout import RolloutConfig, collect_rollout
from rlgf.rl.tensors import Rollout
from rlgf.types import Prompt, RewardFunction

MAX_SAMPLES = 2**16  # per prompt; sample s of prompt i has the index i · MAX_SAMPLES + s
MAX_ROWS = 256  # sampled at a time; bounds memory and does not change results


def best_of(
    rollout_config: RolloutConfig, prompts: Sequence[Prompt], reward: RewardFunction, samples: int, seed: int
) -> tuple[Rollout, list[float]]:
    """Return the best of `samples` completions per prompt, and its score.

    The policy samples alone; of equal scores the first completion is kept. A completion is a
    function of (seed, prompt's index, sample): more samples do not change the earlier ones.
    """
    if not 1 <= samples <= MAX_SAMPLES:
        raise ConfigError(f"best of {samples}: choose a number from 1 to {MAX_SAMPLES:,}.")
    if rollout_config.sampling.greedy:
        raise ConfigError(
            "best-of-n needs stochastic sampling, as greedy decoding repeats one completion: set "
            "evaluation.sampling.greedy=false."
        )
    rollout_config = dataclasses.replace(rollout_config, seed=seed, token_purpose=Purpose.BEST_OF_TOKEN)
    prompts_per_batch = max(1, MAX_ROWS // samples)
    rollouts: list[Rollout] = []
    best: list[float] = []
    for start in range(0, len(prompts), prompts_per_batch):
        places = range(start, min(start + prompts_per_batch, len(prompts)))
        repeated = [prompts[place] for place in places for _ in range(samples)]
        indices = [place * MAX_SAMPLES + sample for place in places for sample in range(samples)]
        rollout = collect_rollout(rollout_config, PPO().build(), PPO().build().schedule(0, 0.0), repeated, indices, MAX_SAMPLES)
        scores = score(reward, rollout.prompts, rollout.completions)
        rows = [max(range(first, first + samples), key=lambda row: scores[row]) for first in range(0, len(scores), samples)]
        rollouts.append(select(rollout, rows))
        best += [scores[row] for row in rows]
    return concatenate(rollouts), best


def evaluate_best_of(
    rollout_config: RolloutConfig, prompts: Sequence[Prompt], context: EvaluationContext, samples: int, seed: int
) -> tuple[dict[str, float], Rollout, list[float]]:
    """Return metrics of the best completions per prompt, their rollout and their scores."""
    rollout, scores = best_of(rollout_config, prompts, context.reward, samples, seed)
    return compute_metrics(rollout, scores, context), rollout, scores


def select(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Return some rows of a rollout, without the sampled support and the counters."""
    tensors = {
        name: value[list(rows)]
        for name in (field.name for field in dataclasses.fields(rollout))
        if isinstance(value := getattr(rollout, name), Tensor)
    }
    return dataclasses.replace(
        rollout, prompts=[rollout.prompts[row] for row in rows], completions=[rollout.completions[row] for row in rows],
        support=None,
        counters={}, guide_completions=(), **tensors,
    )  # fmt: skip


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """Concatenate rollouts into one; shorter ones are padded."""
    width = max(rollout.ids.shape[1] for rollout in rollouts)

    def together(name: str) -> Tensor:
        parts: list[Tensor] = [getattr(rollout, name) for rollout in rollouts]
        return torch.cat([pad(part, (0, width - part.shape[1])) if part.ndim == 2 else part for part in parts])

    names = [field.name for field in dataclasses.fields(rollouts[0]) if isinstance(getattr(rollouts[0], field.name), Tensor)]
    return dataclasses.replace(
        rollouts[0],
        prompts=[prompt for rollout in rollouts for prompt in rollout.prompts],
        completions=[text for rollout in rollouts for text in rollout.completions],
        **{name: together(name) for name in names},
    )
