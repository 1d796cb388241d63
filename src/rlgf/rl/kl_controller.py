"""The coefficient of the KL penalty during training."""

from dataclasses import dataclass

from rlgf.config.sections import KLConfig


@dataclass
class KLController:
    """The coefficient of the KL penalty: fixed, or adapted to a target KL.

    Adaptive: c ← c (1 + clip(KL / target − 1, ±0.2) · rows / horizon).

    Source: Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", section 2.2.
    """

    config: KLConfig
    coefficient: float

    def update(self, kl: float, num_completions: int) -> None:
        """Update the coefficient after `num_completions` rows with a mean KL of `kl` nats."""
        if self.config.controller == "adaptive":
            error = min(max(kl / self.config.target - 1, -0.2), 0.2)
            self.coefficient *= 1 + error * num_completions / self.config.horizon
