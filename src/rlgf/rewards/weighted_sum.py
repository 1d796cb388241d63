"""Weighted sums of rewards, and the scores of their terms."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlgf.errors import ConfigError
from rlgf.rewards.base import score
from rlgf.rewards.reward_model import AdapterRewardModel, RewardModel
from rlgf.rewards.signatures import bind_columns
from rlgf.text_metrics.as_rewards import TermSum
from rlgf.types import Prompt, RewardFunction
from rlgf.untrusted_text import show_value


class WeightedSum(TermSum):
    """A weighted sum of rewards, with the result of each one checked."""

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Return the weighted sum for each completion."""
        return self.total({name: score(reward, prompts, texts) for name, (_, reward) in self.terms.items()})


def sum_of_rewards(rewards: Any) -> Any:
    """Return the sum of several rewards: a list, or a dict with weights.

    Raises `ConfigError` for anything but functions and for weights that are no numbers.
    """
    weights = dict(rewards) if isinstance(rewards, Mapping) else dict.fromkeys(rewards, 1.0)
    terms: dict[str, tuple[float, RewardFunction]] = {}
    for function, weight in weights.items():
        if not callable(function) or isinstance(weight, bool) or not isinstance(weight, int | float):
            raise ConfigError(
                f"reward holds {show_value(function)} with the weight {show_value(weight)}, but a list of rewards holds "
                "functions, and a dict their weights: give names of rewards in settings={'reward.weights': {NAME: WEIGHT}}."
            )
        name = getattr(function, "__name__", type(function).__name__)
        terms[name if name not in terms else f"{name}-{len(terms)}"] = (float(weight), bind_columns(function))
    if not terms:
        raise ConfigError("reward is empty: give at least one function.")
    return next(iter(weights)) if len(weights) == 1 and set(weights.values()) == {1.0} else WeightedSum(terms)


Batch = tuple[Sequence[Prompt], Sequence[str]]


def no_op() -> None:
    """Do nothing, as the default callback."""


def score_components(
    reward: RewardFunction, batches: Sequence[Batch], on_weights_released: Callable[[], None] = no_op
) -> list[tuple[list[float], dict[str, list[float]]]]:
    """Return for each batch the rewards of its completions and those of each term.

    The terms are those of a sum, by name, `TERM/TERM` for nested sums; other rewards have none.
    Rewards that use the policy's weights are evaluated first; `on_weights_released` is called after
    them. Numbers that are not finite are returned, for the guard of training.
    """
    if not isinstance(reward, TermSum):
        if not uses_policy_weights(reward):
            on_weights_released()
        found = [(score(reward, *batch, must_be_finite=False), dict[str, list[float]]()) for batch in batches]
        on_weights_released()
        return found
    terms: list[dict[str, list[float]]] = [{} for _ in batches]
    parts: list[dict[str, list[float]]] = [{} for _ in batches]
    own = [name for name, (_, term) in reward.terms.items() if uses_policy_weights(term)]
    for name in [*own, *(name for name in reward.terms if name not in own)]:
        if name not in own:
            on_weights_released()
        for place, (values, inner) in enumerate(score_components(reward.terms[name][1], batches)):
            terms[place][name] = values
            parts[place] |= {name: values, **{f"{name}/{part}": components for part, components in inner.items()}}
    on_weights_released()
    totals = [reward.total({name: components[name] for name in reward.terms}) for components in terms]
    return [
        (score(lambda *_, total=total: total, *batch, must_be_finite=False), components)
        for total, batch, components in zip(totals, batches, parts)
    ]


def uses_policy_weights(reward: RewardFunction) -> bool:
    """Return whether a reward uses the policy's weights, which serve one model at a time."""
    if isinstance(reward, TermSum):
        return any(uses_policy_weights(term) for _, term in reward.terms.values())
    return isinstance(reward, RewardModel) and isinstance(reward.model, AdapterRewardModel)
