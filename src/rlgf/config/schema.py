"""The config of a run as frozen dataclasses.

A YAML file, a recipe and the command line all become a `Config`. Unknown keys and impossible values
raise before any work is done, with their location and the nearest valid key.
"""

import dataclasses

from rlgf.bounds import Seed
from rlgf.config.base import section
from rlgf.config.runtime import RuntimeConfig
from rlgf.config.sections import (
    AlgorithmConfig,
    CriticConfig,
    DistillConfig,
    EvaluationConfig,
    GuideConfig,
    JudgeConfig,
    KLConfig,
    ModelConfig,
    PolicyLoraConfig,
    PPOConfig,
    PreferenceConfig,
    RewardConfig,
    SupervisedConfig,
    TaskConfig,
)
from rlgf.config.validation import check_config
from rlgf.types import SamplingParams


@dataclasses.dataclass(frozen=True)
class TrainerConfig:
    """The part of a config that the training loop and its evaluations use."""

    seed: int
    task: TaskConfig
    sampling: SamplingParams
    ppo: PPOConfig
    kl: KLConfig
    critic: CriticConfig
    reward: RewardConfig
    evaluation: EvaluationConfig
    runtime: RuntimeConfig
    prefetch: int  # iterations of rollins requested ahead from a remote guide


@section
class Config:
    """The config of a whole run.

    See docs/config.md for the fields of all sections, with units and defaults.

    Raises:
        ConfigError: an unknown field, a value out of bounds, or values that do not go together.

    Example:
        >>> rlgf.Config().ppo.clip_range
        0.2
        >>> rlgf.Config(seed=-1)
        Traceback (most recent call last):
        rlgf.errors.ConfigError: Config: seed is -1, but must be at least 0.
    """

    recipe: str = "custom"
    seed: Seed = 0
    policy: str | None = None  # model folder to start from, instead of pretrain and sft
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    pretrain: SupervisedConfig = SupervisedConfig()
    sft: SupervisedConfig = SupervisedConfig()
    distill: DistillConfig = DistillConfig()
    reward: RewardConfig = RewardConfig()
    preferences: PreferenceConfig = PreferenceConfig()
    judge: JudgeConfig = JudgeConfig()
    guide: GuideConfig = GuideConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    ppo: PPOConfig = PPOConfig()
    kl: KLConfig = KLConfig()
    critic: CriticConfig = CriticConfig()
    lora: PolicyLoraConfig = PolicyLoraConfig()
    sampling: SamplingParams = SamplingParams()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @property
    def trainer(self) -> TrainerConfig:
        """Return the part that the training loop uses."""
        return TrainerConfig(
            self.seed, self.task, self.sampling, self.ppo, self.kl, self.critic, self.reward, self.evaluation,
            self.runtime, self.guide.prefetch,
        )  # fmt: skip

    def __post_init__(self) -> None:
        """Raise for values that do not go together.

        Each message names the keys, the values and the fix.
        """
        check_config(self)
