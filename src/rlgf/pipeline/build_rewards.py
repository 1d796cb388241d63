"""Construction of a run's rewards and judge."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rlgf.config.schema import Config
from rlgf.evaluation.chat_judge import chat_judge
from rlgf.evaluation.win_rate import PairJudge, RewardJudge
from rlgf.models import lora
from rlgf.models.language_model import LanguageModel
from rlgf.pipeline.reward_model_stage import preference_stage
from rlgf.pipeline.stage_cache import Report
from rlgf.pipeline.stages import reward_stage
from rlgf.rewards.build import build_reward
from rlgf.rewards.reward_model import load_reward_model
from rlgf.tasks.base import Task
from rlgf.types import RewardFunction


def shares_policy_weights(config: Config, names: Sequence[str]) -> bool:
    """Return whether a reward model may be an adapter on the policy's weights.

    The policy must then be built first.
    """
    trained = "preferences" in names and config.preferences.lora.rank > 0
    adapted = config.lora.rank > 0 or (config.policy is not None and lora.is_adapter_folder(config.policy))
    return adapted and (trained or any(lora.is_adapter_folder(name) for name in names))


def train_rewards(config: Config, stages: Path, report: Report) -> dict[str, Path]:
    """Train or reuse the reward stages and the judge's; return their folders.

    Keys are the names of the rewards, and 'judge'.
    """
    make = {"ngram": reward_stage, "preferences": preference_stage}
    made = {name: make[name](config, stages, report) for name in config.reward.names if name in make}
    if config.judge.spec == "preferences":
        made["judge"] = preference_stage(config, stages, report, "judge")
    return made


def prepare_reward(
    config: Config, task: Task, made: Mapping[str, Path], backbone: LanguageModel | None = None
) -> RewardFunction:
    """Return the task's reward; `made` has the folders of `train_rewards`."""
    return build_reward(config.reward, task, made, config.runtime.device, backbone)


def prepare_judge(
    config: Config, made: Mapping[str, Path], stages: Path, report: Report, backbone: LanguageModel | None = None
) -> PairJudge | None:
    """Return the judge of final evaluations, or None.

    It compares completions with references. `made` has the folders of `train_rewards`.
    """
    spec = config.judge.spec
    if spec is None:
        return None
    if spec.startswith("server:"):
        return chat_judge(config.judge, stages, report)
    if spec == "preferences":
        path, name = str(made["judge"]), f"a second reward model, trained on other posts ({made['judge'].name})"
    else:
        path = spec.removeprefix("model:")
        name = f"reward model {path}"
    return RewardJudge(load_reward_model(path, config.runtime.device, backbone=backbone), name)
