"""Best of N: several texts for each prompt, of which the one is kept that the reward likes best; a baseline for any policy."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from rlgf.algorithms import ppo
from rlgf.errors import UserError
from rlgf.evaluate import Judges, measured
from rlgf.randomness import Purpose
from rlgf.rewards import score
from rlgf.rollout import Writing, collect
from rlgf.types import Prompt, Rollout, TextFunction

MOST = 2**16  # samples for a prompt: text `s` of prompt `i` draws by the index i · MOST + s
TEXTS = 256  # written at a time, which bounds memory and changes nothing else


def best_of(
    writing: Writing, prompts: Sequence[Prompt], reward: TextFunction, samples: int, seed: int
) -> tuple[Rollout, list[float]]:
    """For each prompt the best of `samples` texts by the policy alone, and its score; of equal ones the first.

    What is drawn for a sample is a function of (seed, prompt's place, sample): more samples leave the earlier ones as they are.
    """
    if not 1 <= samples <= MOST:
        raise UserError(f"best of {samples}: choose a number from 1 to {MOST:,}.")
    if writing.decoding.greedy:
        raise UserError("best of several texts needs decoding that draws: greedy decoding writes the same text every time.")
    writing = dataclasses.replace(writing, seed=seed, token_purpose=Purpose.BEST_OF_TOKEN)
    at_once = max(1, TEXTS // samples)
    rollouts: list[Rollout] = []
    best: list[float] = []
    for start in range(0, len(prompts), at_once):
        places = range(start, min(start + at_once, len(prompts)))
        repeated = [prompts[place] for place in places for _ in range(samples)]
        indices = [place * MOST + sample for place in places for sample in range(samples)]
        rollout = collect(writing, ppo(), ppo().plan(0, 0.0), repeated, indices, MOST)
        scores = score(reward, rollout.prompts, rollout.texts)
        rows = [max(range(first, first + samples), key=lambda row: scores[row]) for first in range(0, len(scores), samples)]
        rollouts.append(select(rollout, rows))
        best += [scores[row] for row in rows]
    return joined(rollouts), best


def evaluate_best_of(
    writing: Writing, prompts: Sequence[Prompt], judges: Judges, samples: int, seed: int
) -> tuple[dict[str, float], Rollout, list[float]]:
    """Metrics of the best of several texts for each prompt, the texts, and their scores."""
    rollout, scores = best_of(writing, prompts, judges.reward, samples, seed)
    return measured(rollout, scores, judges), rollout, scores


def select(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Some of the texts of a rollout, without what the sampler knew of them."""
    tensors = {
        name: value[list(rows)]
        for name in (field.name for field in dataclasses.fields(rollout))
        if isinstance(value := getattr(rollout, name), Tensor)
    }
    return dataclasses.replace(
        rollout, prompts=[rollout.prompts[row] for row in rows], texts=[rollout.texts[row] for row in rows], support=None,
        counts={}, guide_texts=(), **tensors,
    )  # fmt: skip


def joined(rollouts: Sequence[Rollout]) -> Rollout:
    """Several rollouts as one, the shorter ones padded."""
    width = max(rollout.ids.shape[1] for rollout in rollouts)

    def together(name: str) -> Tensor:
        parts: list[Tensor] = [getattr(rollout, name) for rollout in rollouts]
        return torch.cat([pad(part, (0, width - part.shape[1])) if part.ndim == 2 else part for part in parts])

    names = [field.name for field in dataclasses.fields(rollouts[0]) if isinstance(getattr(rollouts[0], field.name), Tensor)]
    return dataclasses.replace(
        rollouts[0],
        prompts=[prompt for rollout in rollouts for prompt in rollout.prompts],
        texts=[text for rollout in rollouts for text in rollout.texts],
        **{name: together(name) for name in names},
    )
