"""Numbers that training adapts as it goes: the KL coefficient and the scale of rewards. Their state is checkpointed."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rlgf.config import KLConfig, RewardConfig
from rlgf.rewards import score
from rlgf.tasks import TextFunction
from rlgf.types import Prompt


@dataclass
class KLController:
    """The coefficient of the KL penalty: fixed, or moved towards a target. Source: Ziegler et al. 2019, section 2.2."""

    config: KLConfig
    coefficient: float

    def update(self, kl: float, texts: int) -> None:
        """Move after `texts` texts whose mean KL was `kl` nats."""
        if self.config.controller == "adaptive":
            error = min(max(kl / self.config.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * texts / self.config.horizon


@dataclass
class Running:
    """Count, mean and sum of squared deviations, updated one by one (Welford)."""

    count: float = 0.0
    mean: float = 0.0
    deviations: float = 0.0

    def add(self, value: float) -> None:
        """Take in one more value."""
        self.count += 1
        change = value - self.mean
        self.mean += change / self.count
        self.deviations += change * (value - self.mean)

    @property
    def scale(self) -> float:
        """Standard deviation, 1 where there is none."""
        return (self.deviations / self.count) ** 0.5 or 1.0 if self.count > 1 else 1.0


class RewardShaper:
    """From the task's score to the reward that is optimised; everything off by default."""

    def __init__(self, config: RewardConfig, reward: TextFunction) -> None:
        self.config, self.reward, self.running = config, reward, Running()
        self._baselines: dict[int, tuple[Prompt, float]] = {}  # scores of references, asked for once; by the prompt's identity

    def shape(self, scores: Sequence[float], prompts: Sequence[Prompt], finished: Sequence[bool]) -> list[float]:
        """Minus the reference's score, normalised, clipped, minus the penalty for texts that were cut off; in this order."""
        new = self.unknown(prompts)
        if new:
            self.learn(new, score(self.reward, new, [prompt.references[0] for prompt in new]))
        values = list(scores)
        if self.config.minus_reference:
            values = [value - self._baselines[id(prompt)][1] for value, prompt in zip(values, prompts)]
        if self.config.normalise:
            for value in values:
                self.running.add(value)
            values = [(value - self.running.mean) / self.running.scale for value in values]
        if self.config.clip is not None:
            values = [min(max(value, -self.config.clip), self.config.clip) for value in values]
        penalty = self.config.missing_end_penalty
        return [value - (0.0 if ended else penalty) for value, ended in zip(values, finished)]

    def unknown(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts of which the score of the first reference is wanted and not known, each once."""
        if not self.config.minus_reference:
            return []
        return list({id(prompt): prompt for prompt in prompts if id(prompt) not in self._baselines}.values())

    def learn(self, prompts: Sequence[Prompt], scores: Sequence[float]) -> None:
        """Take in the scores of first references."""
        self._baselines |= {id(prompt): (prompt, value) for prompt, value in zip(prompts, scores)}  # kept: ids stay unique

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold."""
        return asdict(self.running)

    def load_state(self, state: dict[str, float]) -> None:
        """Continue from a checkpoint."""
        self.running = Running(**state)
