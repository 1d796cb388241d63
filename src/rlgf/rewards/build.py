"""Construction of the configured reward, and checks of its names and columns."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlgf.config.objects import PASSED, require_same_source
from rlgf.config.sections import RewardConfig
from rlgf.config.specs import load_object
from rlgf.errors import INPUT_ERRORS, ConfigError, unknown
from rlgf.models import lora
from rlgf.models.language_model import LanguageModel
from rlgf.rewards.base import continuation_only, score_full_text
from rlgf.rewards.classifier import SequenceClassifier, check_classifier, read_label
from rlgf.rewards.ngram import NgramClassifier
from rlgf.rewards.reward_model import is_reward_model, load_reward_model, require_reward_model
from rlgf.rewards.signatures import bind_columns
from rlgf.rewards.weighted_sum import WeightedSum
from rlgf.tasks.base import Task
from rlgf.text_metrics.as_rewards import (
    TEXT_FUNCTIONS,
    TermSum,
    build_text_function,
    read_text_options,
    require_columns,
    strip_reply_prefixes,
)
from rlgf.types import Prompt, RewardFunction


def build_reward(
    config: RewardConfig,
    task: Task,
    stage_folders: Mapping[str, Path],
    device: str = "cpu",
    backbone: LanguageModel | None = None,
) -> RewardFunction:
    """Build the reward of `reward.path`, or the weighted sum of `reward.weights`.

    `stage_folders` maps 'ngram' and 'preferences', if used, to the folders of their stages. A
    reward model that is an adapter is loaded onto the weights of `backbone` if it was trained for
    them.
    """
    check_reward_names(config.names, config.options)
    load = partial(load_reward_model, device=device, backbone=backbone)
    if config.weights:
        parts = {name: (weight, _build(name, config, task, stage_folders, load)) for name, weight in config.weights.items()}
        return WeightedSum(parts)
    return _build(config.path, config, task, stage_folders, load)


def _build(
    path: str, config: RewardConfig, task: Task, stage_folders: Mapping[str, Path], load: Callable[[str], RewardFunction]
) -> RewardFunction:
    """Build one reward by name.

    For a task that scores the full text, a classifier takes prompt and completion together.
    """
    if path == "task":
        if task.reward is None:
            raise missing_rule_error(task.name)
        return task.reward
    if path.startswith("python:"):
        return bind_columns(load_object(path, "reward"))
    if path in TEXT_FUNCTIONS:
        return build_text_function(path, task.train, config.options.get(path))
    folder = stage_folders.get(path) or Path(path).expanduser()
    judge: RewardFunction
    place = str(stage_folders.get(path, path))
    if (folder / "ngram.json").is_file():
        judge = NgramClassifier.load(folder)
    elif lora.is_adapter_folder(place) or is_reward_model(place):
        return load(place)
    else:
        judge = SequenceClassifier(place, read_label(path, config.options.get(path)))
    return score_full_text(judge) if task.scores_full_text else score_reply(judge)


def score_reply(judge: RewardFunction) -> RewardFunction:
    """Return a reward that scores completions without the prefix of a chat template's replies."""

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[float]:
        return judge(prompts, strip_reply_prefixes(prompts, texts))

    reward.scorer = judge  # pyright: ignore[reportFunctionMemberAccess]
    return reward


def scorers_in(reward: RewardFunction) -> list[Any]:
    """Return the scorers in a reward: one without wrappers, or one per summed term."""
    if isinstance(reward, TermSum):
        return [scorer for _, term in reward.terms.values() for scorer in scorers_in(term)]
    return [continuation_only(reward) or getattr(reward, "scorer", reward)]


def missing_rule_error(task: str) -> ConfigError:
    """Return the error for a task without a reward of its own."""
    return ConfigError(
        f"task '{task}' has no built-in reward: set reward.path to 'ngram', 'preferences', a metric, a classifier or a reward "
        "model, or 'python:module:name'."
    )


def is_model(name: str) -> bool:
    """Return whether a reward names a model: a Hub name or a folder."""
    functions = name in ("task", "ngram", "preferences") or name in TEXT_FUNCTIONS
    return not functions and not name.startswith(("python:", PASSED))


def check_reward_names(names: Sequence[str], options: Mapping[str, Any] | None = None) -> None:
    """Raise if a reward does not exist, from the configs of the models alone.

    Rewards that this run trains are skipped. `options` are those of the rewards, by name.
    """
    for name in names:
        if not is_model(name):
            continue
        folder = Path(name).expanduser()
        if not folder.exists() and difflib.get_close_matches(name, TEXT_FUNCTIONS, n=1, cutoff=0.8):
            raise unknown("reward", name, TEXT_FUNCTIONS)
        require_reward_model(name)
        # raises if there is no such model
        if not (folder / "ngram.json").is_file() and not is_reward_model(name) and not lora.is_adapter_folder(name):
            check_classifier(name, read_label(name, (options or {}).get(name)))


def check_reward_options(config: RewardConfig) -> None:
    """Raise `ConfigError` for options of text metrics that cannot be used, before any work."""
    for name in config.names:
        if name in TEXT_FUNCTIONS:
            read_text_options(name, config.options.get(name))


def check_reward_sources(config: RewardConfig) -> None:
    """Raise `ConfigError` if a function has changed since Python code passed it."""
    if config.source is not None and config.path.startswith("python:"):
        require_same_source(load_object(config.path, "reward"), config.source, f"reward '{config.path}'")


def check_reward_columns(config: RewardConfig, split: str, prompts: Sequence[Prompt]) -> None:
    """Raise `ConfigError` if prompts lack the columns that a metric needs as a reward."""
    for name in config.names:
        if name in TEXT_FUNCTIONS:
            try:
                require_columns(name, prompts, config.options.get(name) or {})
            except INPUT_ERRORS as error:
                raise ConfigError(f"{split} prompts: {error}") from None
