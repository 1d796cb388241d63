"""The config of a run as frozen dataclasses.

A YAML file, a recipe and the command line all become a `Config`. Unknown keys and impossible values
raise before any work is done, with their location and the nearest valid key.
"""

from pydantic.dataclasses import dataclass

from rlgf.config.sections import (
    STRICT,
    AlgorithmConfig,
    CriticConfig,
    DistillConfig,
    EvaluationConfig,
    GuideConfig,
    JudgeConfig,
    KLConfig,
    LoraConfig,
    ModelConfig,
    PPOConfig,
    PreferenceConfig,
    RewardConfig,
    RuntimeConfig,
    SupervisedConfig,
    TaskConfig,
)
from rlgf.config.validation import check_numbers
from rlgf.types import SamplingParams


@dataclass(frozen=True, config=STRICT)
class Config:
    """The config of a whole run."""

    recipe: str = "custom"
    seed: int = 0
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
    lora: LoraConfig = LoraConfig()
    sampling: SamplingParams = SamplingParams()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    def __post_init__(self) -> None:
        """Raise for numbers that cannot be trained with.

        Each message names the key, the value and the fix.
        """
        check_numbers(self)
