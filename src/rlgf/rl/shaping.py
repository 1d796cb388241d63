"""Reward shaping: the steps from the task's score to the optimized reward."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from threading import Event

from rlgf.config.sections import RewardConfig
from rlgf.errors import RewardError
from rlgf.rewards.base import score
from rlgf.rewards.weighted_sum import Batch, score_components
from rlgf.rl.tensors import Rollout
from rlgf.types import Prompt, RewardFunction
from rlgf.untrusted_text import show_value


@dataclass
class RunningStats:
    """Running count, mean and sum of squared deviations (Welford's algorithm)."""

    count: float = 0.0
    mean: float = 0.0
    deviations: float = 0.0

    def add(self, value: float) -> None:
        """Add one value."""
        self.count += 1
        change = value - self.mean
        self.mean += change / self.count
        self.deviations += change * (value - self.mean)

    @property
    def scale(self) -> float:
        """Return the population standard deviation, or 1 if it is zero or undefined."""
        return (self.deviations / self.count) ** 0.5 or 1.0 if self.count > 1 else 1.0


class RewardShaper:
    """The steps from the task's score to the optimized reward; all off by default."""

    def __init__(self, config: RewardConfig, reward: RewardFunction) -> None:
        self.config, self.reward, self.running_stats = config, reward, RunningStats()
        # scores of first references, computed once; keyed by the prompt's id()
        self._baselines: dict[int, tuple[Prompt, float]] = {}

    def score(self, rollout: Rollout, weights_released: Event) -> tuple[list[float], dict[str, list[float]]]:
        """Score the completions, and the references still needed as baselines.

        `weights_released` is set as soon as no reward uses the policy's weights.

        Returns:
            The scores, [rows], and the scores of each term of a weighted sum by name.
        """
        new = self._missing_baselines(rollout.prompts)
        batches: list[Batch] = [(rollout.prompts, rollout.completions), (new, [prompt.references[0] for prompt in new])]
        try:
            scores, *baselines = score_components(self.reward, batches if new else batches[:1], weights_released.set)
        finally:
            weights_released.set()
        for values, _ in baselines:
            self._add_baselines(new, values)
        return scores

    def shape(self, scores: Sequence[float], prompts: Sequence[Prompt], ended_with_eos: Sequence[bool]) -> list[float]:
        """Compute the optimized rewards from scores, [rows].

        In this order, as configured: subtract the score of the prompt's first reference; normalize
        by the running mean and standard deviation; clip; subtract the penalty of completions
        without an EOS token.
        """
        new = self._missing_baselines(prompts)
        if new:
            self._add_baselines(new, score(self.reward, new, [prompt.references[0] for prompt in new]))
        values = list(scores)
        if self.config.subtract_reference:
            values = [value - self._baselines[id(prompt)][1] for value, prompt in zip(values, prompts)]
        if self.config.normalize:
            for value in values:
                self.running_stats.add(value)
            values = [(value - self.running_stats.mean) / self.running_stats.scale for value in values]
        if self.config.clip is not None:
            values = [min(max(value, -self.config.clip), self.config.clip) for value in values]
        penalty = self.config.missing_eos_penalty
        return [value - (0.0 if ended else penalty) for value, ended in zip(values, ended_with_eos)]

    def _missing_baselines(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts whose first reference still needs a score, each once.

        Empty unless references are subtracted.
        """
        if not self.config.subtract_reference:
            return []
        return list({id(prompt): prompt for prompt in prompts if id(prompt) not in self._baselines}.values())

    def _add_baselines(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        """Store the scores of first references, which remain for the whole run."""
        for prompt, value in zip(prompts, scores):
            if not math.isfinite(value):
                raise RewardError(
                    f"the reward of the reference {show_value(prompt.references[0])} is {value}: it must be a finite number."
                )
        # the prompt is stored as well, so that its id() stays unique
        self._baselines |= {id(prompt): (prompt, value) for prompt, value in zip(prompts, scores)}

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint: the running statistics."""
        return asdict(self.running_stats)

    def load_state(self, state: dict[str, float]) -> None:
        """Load the state of a checkpoint."""
        self.running_stats = RunningStats(**state)
