"""Rewards as functions of prompts and completions, with checked results."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from rlgf.errors import ConfigError, RewardError, TrainingError
from rlgf.types import Prompt, RewardFunction


def score_full_text(judge: RewardFunction) -> RewardFunction:
    """Return a reward that scores each prompt joined with its completion."""

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[float]:
        return judge(prompts, [prompt.text + text for prompt, text in zip(prompts, texts)])

    reward.judge = judge  # pyright: ignore[reportFunctionMemberAccess]
    return reward


def continuation_only(reward: RewardFunction) -> RewardFunction | None:
    """Return the reward inside `score_full_text`, which scores completions alone, or None."""
    return getattr(reward, "judge", None)


def score(reward: RewardFunction, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    """Call a reward and check that it returns one finite number for each completion.

    Every failure raises `TrainingError`.
    """
    try:
        returned: Any = reward(prompts, texts)
        values: list[Any] = list(returned.tolist() if hasattr(returned, "tolist") else returned)
    except TrainingError:
        raise
    except Exception as error:
        raise RewardError(
            f"the reward failed on {len(texts)} completions ({type(error).__name__}: {error}): fix it and run again "
            "(with --accept-changes if its source changed)."
        ) from error
    if len(values) != len(texts):
        raise RewardError(
            f"the reward returned {len(values)} numbers for {len(texts)} completions: it must return one for each."
        )
    for value, text in zip(values, texts):
        if type(value) is bool or not isinstance(value, Real) or not math.isfinite(value):
            raise RewardError(f"the reward of the completion {text[:60]!r} is {value!r}: it must be a finite number.")
    return [float(value) for value in values]


def probe_reward(reward: RewardFunction, prompts: Sequence[Prompt]) -> None:
    """Call a reward on a few texts before training; raise `ConfigError` if it fails."""
    texts = [prompt.references[0] if prompt.references else "a text" for prompt in prompts]
    try:
        score(reward, [*prompts, prompts[0]], [*texts, ""])
    except TrainingError as error:
        raise ConfigError(f"probe: {error}") from error.__cause__
