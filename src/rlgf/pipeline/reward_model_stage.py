"""The stage of a reward model trained on preference pairs.

It is the reward itself, or a second one that judges, trained on other posts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rlgf.config.base import to_dict
from rlgf.config.sections import TaskConfig
from rlgf.data.checksums import content_identity
from rlgf.data.preferences import Pairs, split_for_role
from rlgf.errors import ConfigError
from rlgf.evaluation.intervals import interval_in, show_interval
from rlgf.models import lora
from rlgf.models.loading import has_encoder, load_tokenizer
from rlgf.pipeline.resolve import SEPARATE_SEED, PreferencePlan
from rlgf.pipeline.stage_cache import StageCache
from rlgf.pipeline.stages import prepare_tokenizer, starting_model, task_source
from rlgf.rewards.reward_model import RewardModel, is_reward_model
from rlgf.runs.steps import StepStore
from rlgf.supervised.reward_modeling import new_reward_model, train_reward_model
from rlgf.tasks import prompts

Role = Literal["reward", "judge"]


def check_preferences(plan: PreferencePlan) -> None:
    """Raise if no reward model can be trained from the settings.

    Called before any data is loaded.
    """
    training = plan.config.training
    if plan.config.data is None and plan.task.definition.preference_pairs is None:
        raise ConfigError(
            f"task '{plan.task.name}' has no preference pairs: give preferences.data with a file, folder or Hub name."
        )
    start = plan.config.path
    if start is not None and lora.is_adapter_folder(start):
        raise ConfigError(
            f"preferences.path '{start}' holds adapters, and a reward model starts from a whole model: give their base model."
        )
    if not training.is_enabled:
        raise ConfigError("preferences.training.steps and preferences.training.epochs are 0: set one of them.")


def preference_pairs(plan: PreferencePlan, tokenizer: Any, role: Role) -> Pairs:
    """Return the training and held-out pairs of the reward or the judge.

    If both are trained here, they have different training posts and the same held-out pairs.
    """
    check_preferences(plan)
    min_words, data, task = plan.config.min_words, plan.config.data, plan.task.config
    if data is not None:
        # prompts are built as the task's, but the pairs' dataset has other subsets and splits
        own = task.options if task.name == "prompts" else {}
        options = {name: value for name, value in own.items() if name != "subset" and not name.endswith("_split")}
        pairs = prompts.preference_pairs(TaskConfig("prompts", data, options=options), tokenizer, min_words)
    else:
        load = plan.task.definition.preference_pairs
        assert load is not None
        pairs = load(task, tokenizer, min_words)
    return split_for_role(pairs, 2 if plan.for_judge else 1, int(role == "judge"))


def preference_stage(plan: PreferencePlan, cache: StageCache, role: Role = "reward", at: Path | None = None) -> Path:
    """Train or reuse a reward model and return its folder.

    It is evaluated on held-out pairs; its metrics are in its stage.json.
    """
    settings = plan.config
    check_preferences(plan)
    start = settings.path or starting_model(plan.policy, cache)
    if lora.is_adapter_folder(start):  # start from the base weights of the SFT adapter
        start = lora.base_of(start)
    seed = plan.seed + (SEPARATE_SEED if role == "judge" else 0)
    inputs: Mapping[str, Any] = {
        "start": cache.identity(start),
        "preferences": to_dict(settings), "pairs": content_identity(settings.data), "task": task_source(plan.task.config),
        "role": role if plan.for_judge else "alone", "seed": seed,
        **({"in_4bit": True} if plan.in_4bit else {}),
    }  # fmt: skip

    def build(folder: Path) -> dict[str, float]:
        reward = new_reward_model(start, settings, seed, plan.machine.device, plan.in_4bit)
        pairs = drop_too_long(reward, preference_pairs(plan, reward.tokenizer, role))
        if settings.training.max_examples:
            pairs = Pairs(pairs.train[: settings.training.max_examples], pairs.test, pairs.dropped)
        for reason, count in pairs.dropped.items():
            cache.report(f"{role}: {count:,} {reason}, dropped")
        with StepStore(folder, cache.report) as store:
            metrics = train_reward_model(reward, pairs, settings, seed, plan.machine.micro_batch_tokens, cache.report, store)
            reward.save(folder)
        accuracy = metrics["accuracy"]
        shown = show_interval(interval_in("accuracy", metrics), ".2f")
        if accuracy - 2 * metrics["accuracy_standard_error"] < 0.5:
            cache.report(
                f"warning: {role}: an accuracy of {accuracy:.2f}{shown} on held-out pairs may be chance: give more pairs, "
                "or train "
                "longer (preferences.training.epochs, preferences.training.learning_rate)."
            )
        return metrics | {f"dropped: {reason}": count for reason, count in pairs.dropped.items()}

    return cache.build(role, inputs, build, at)


def drop_too_long(reward: RewardModel, pairs: Pairs) -> Pairs:
    """Return the pairs whose responses fit the reward model's context.

    The others are dropped and counted. Raises `ConfigError` if no training or held-out pairs
    remain.
    """
    train, test = ([pair for pair in part if reward.can_encode(pair)] for part in (pairs.train, pairs.test))
    left_out = len(pairs.train) + len(pairs.test) - len(train) - len(test)
    if not left_out:
        return pairs
    reason = f"pairs with a response of more tokens than the reward model's context ({reward.max_length})"
    if not (train and test):
        raise ConfigError(
            f"{left_out:,} {reason} leave none to train or evaluate on: start from a model with a longer context."
        )
    return Pairs(train, test, {**pairs.dropped, reason: left_out})


def load_pairs(plan: PreferencePlan, cache: StageCache) -> Pairs:
    """Return the training pairs, loaded before any model is built.

    Raises `ConfigError` if the pairs or the starting model cannot be used.
    """
    tokenizer_plan = plan.policy.tokenizer
    path = plan.config.path or tokenizer_plan.path
    if has_encoder(path) and not is_reward_model(path) if path else tokenizer_plan.architecture == "t5":
        raise ConfigError(
            f"the reward model would start from {path or 'the policy'}, an encoder–decoder, and it scores prompt and "
            "completion as one sequence: give preferences.path with a causal model."
        )
    tokenizer = load_tokenizer(path) if path else prepare_tokenizer(tokenizer_plan, cache)[0]
    return preference_pairs(plan, tokenizer, "reward")
