"""The stage of a reward model trained on preference pairs.

It is the reward itself, or a second one that judges, trained on other posts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rlgf.config.flatten import to_dict
from rlgf.config.schema import Config
from rlgf.config.sections import TaskConfig
from rlgf.data.preferences import Pairs, split_for_role
from rlgf.errors import ConfigError
from rlgf.models import lora
from rlgf.models.loading import has_encoder, load_tokenizer
from rlgf.pipeline.stage_cache import Report, build_at, build_stage, source_fingerprint
from rlgf.pipeline.stages import sft_stage, task_source, tokenizer_for
from rlgf.rewards.reward_model import RewardModel, is_reward_model
from rlgf.supervised.reward_modeling import new_reward_model, train_reward_model
from rlgf.tasks import prompts
from rlgf.tasks.registry import task_definition

Role = Literal["reward", "judge"]


def check_preferences(config: Config) -> None:
    """Raise if no reward model can be trained from the settings.

    Called before any data is loaded.
    """
    training = config.preferences.training
    if config.preferences.data is None and task_definition(config.task).preference_pairs is None:
        raise ConfigError(
            f"task '{config.task.name}' has no preference pairs: give preferences.data with a file, folder or Hub name."
        )
    start = config.preferences.path
    if start is not None and lora.is_adapter_folder(start):
        raise ConfigError(
            f"preferences.path '{start}' holds adapters, and a reward model starts from a whole model: give the one below them."
        )
    if not (training.steps or training.epochs):
        raise ConfigError("preferences.training.steps and preferences.training.epochs are 0: set one of them.")


def preference_pairs(config: Config, tokenizer: Any, role: Role) -> Pairs:
    """Return the training and held-out pairs of the reward or the judge.

    If both are trained here, they have different training posts and the same held-out pairs.
    """
    check_preferences(config)
    least, data = config.preferences.min_words, config.preferences.data
    if data is not None:
        # prompts are built as the task's, but the pairs' dataset has other subsets and splits
        own = config.task.options if config.task.name == "prompts" else {}
        options = {name: value for name, value in own.items() if name != "subset" and not name.endswith("_split")}
        pairs = prompts.preference_pairs(TaskConfig("prompts", data, options=options), tokenizer, least)
    else:
        read = task_definition(config.task).preference_pairs
        assert read is not None
        pairs = read(config.task, tokenizer, least)
    return split_for_role(pairs, 2 if config.judge.spec == "preferences" else 1, int(role == "judge"))


def preference_stage(config: Config, stages: Path, report: Report, role: Role = "reward", at: Path | None = None) -> Path:
    """Train or reuse a reward model and return its folder.

    It is evaluated on held-out pairs; its metrics are in its stage.json.
    """
    settings = config.preferences
    check_preferences(config)
    start = settings.path or str(sft_stage(config, stages, report))
    if lora.is_adapter_folder(start):  # start from the base weights of the SFT adapter
        start = lora.base_of(start)
    seed = (config.seed if settings.training.seed is None else settings.training.seed) + (1_000_003 if role == "judge" else 0)
    in_4bit = config.lora.load_in_4bit and settings.lora.rank > 0
    ingredients: Mapping[str, Any] = {
        "start": Path(start).name if Path(start).parent == stages else source_fingerprint(start),
        "preferences": to_dict(settings), "pairs": source_fingerprint(settings.data), "task": task_source(config.task),
        "role": role if config.judge.spec == "preferences" else "alone", "seed": seed,
        **({"in_4bit": True} if in_4bit else {}),
    }  # fmt: skip

    def build(folder: Path) -> dict[str, float]:
        reward = new_reward_model(start, settings, seed, config.runtime.device, in_4bit)
        pairs = drop_too_long(reward, preference_pairs(config, reward.tokenizer, role))
        if settings.training.max_examples:
            pairs = Pairs(pairs.train[: settings.training.max_examples], pairs.test, pairs.dropped)
        for reason, count in pairs.dropped.items():
            report(f"{role}: {count:,} {reason}, left out")
        measured = train_reward_model(reward, pairs, settings, seed, config.runtime.micro_batch_tokens, report)
        reward.save(folder)
        accuracy = measured["accuracy"]
        if accuracy - 2 * measured["accuracy_standard_error"] < 0.5:
            report(
                f"warning: {role}: an accuracy of {accuracy:.2f} on held-out pairs may be chance: give more pairs, or train "
                "longer (preferences.training.epochs, preferences.training.learning_rate)."
            )
        return measured | {f"left out: {reason}": count for reason, count in pairs.dropped.items()}

    name = "judge" if role == "judge" else "reward"
    if at:
        return build_at(at, name, ingredients, build, report)
    return build_stage(stages, name, ingredients, build, report)


def drop_too_long(reward: RewardModel, pairs: Pairs) -> Pairs:
    """Return the pairs whose responses fit the reward model's context.

    The others are dropped and counted. Raises `ConfigError` if no training or held-out pairs
    remain.
    """
    train, test = ([pair for pair in part if reward.can_encode(pair)] for part in (pairs.train, pairs.test))
    left_out = len(pairs.train) + len(pairs.test) - len(train) - len(test)
    if not left_out:
        return pairs
    reason = f"pairs with a response of more tokens than the reward model reads ({reward.max_length})"
    if not (train and test):
        raise ConfigError(f"{left_out:,} {reason} leave none to train on or to measure on: start from a model that reads more.")
    return Pairs(train, test, {**pairs.dropped, reason: left_out})


def load_pairs(config: Config, stages: Path, report: Report) -> Pairs:
    """Return the training pairs, loaded before any model is built.

    Raises `ConfigError` if the pairs or the starting model cannot be used.
    """
    path = config.preferences.path or config.policy or config.model.path
    reads_twice = has_encoder(path) and not is_reward_model(path) if path else config.model.architecture == "t5"
    if reads_twice:
        raise ConfigError(
            f"the reward model would start from {path or 'the policy'}, an encoder–decoder, and it reads a text at once: give "
            "preferences.path with a causal model."
        )
    tokenizer = load_tokenizer(path) if path else tokenizer_for(config, config.task, config.model, stages, report)[0]
    return preference_pairs(config, tokenizer, "reward")
