"""Construction of a run's rewards and judge."""

from collections.abc import Mapping
from pathlib import Path

from rlgf.config.specs import JudgeKind
from rlgf.evaluation.chat_judge import chat_judge
from rlgf.evaluation.win_rate import PairJudge, RewardJudge
from rlgf.models.language_model import LanguageModel
from rlgf.pipeline.resolve import JudgePlan, RewardPlan
from rlgf.pipeline.reward_model_stage import preference_stage
from rlgf.pipeline.stage_cache import StageCache
from rlgf.pipeline.stages import reward_stage
from rlgf.rewards.build import build_reward
from rlgf.rewards.reward_model import load_reward_model
from rlgf.rewards.signatures import bind_columns
from rlgf.tasks.base import Task
from rlgf.types import RewardFunction


def train_rewards(plan: RewardPlan, judge: JudgePlan | None, cache: StageCache) -> dict[str, Path]:
    """Train or reuse the stages of the reward and of the judge; return their folders.

    Keys are the names of the rewards, and 'judge'.
    """
    folders: dict[str, Path] = {}
    for name in plan.config.names:
        if name == "ngram":
            folders[name] = reward_stage(plan, cache)
        elif name == "preferences":
            folders[name] = preference_stage(plan.preferences, cache)
    if judge is not None and judge.uses_preferences:
        folders["judge"] = preference_stage(judge.preferences, cache, "judge")
    return folders


def prepare_reward(
    plan: RewardPlan, task: Task, folders: Mapping[str, Path], backbone: LanguageModel | None = None
) -> RewardFunction:
    """Return the task's reward; `folders` are those of `train_rewards`."""
    if plan.passed is not None:
        return bind_columns(plan.passed)
    return build_reward(plan.config, task, folders, plan.device, backbone)


def prepare_judge(
    plan: JudgePlan, folders: Mapping[str, Path], cache: StageCache, backbone: LanguageModel | None = None
) -> PairJudge | None:
    """Return the judge of final evaluations, or None.

    It compares completions with references. `folders` are those of `train_rewards`.
    """
    if plan.spec is None:
        return None
    if plan.spec.kind == JudgeKind.SERVER:
        return chat_judge(plan.config, cache.folder, cache.report)
    path, name = plan.spec.name, f"reward model {plan.spec.name}"
    if plan.spec.kind == JudgeKind.PREFERENCES:
        path, name = str(folders["judge"]), f"a second reward model, trained on other posts ({folders['judge'].name})"
    return RewardJudge(load_reward_model(path, plan.device, backbone=backbone), name)
