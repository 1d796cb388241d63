"""Rewards as functions of prompts and completions, with checked results."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence, Set
from contextlib import suppress
from numbers import Real
from typing import Any, cast

from rlgf.errors import ConfigError, RewardError, TrainingError, user_code
from rlgf.types import Prompt, RewardFunction
from rlgf.untrusted_text import show_value


def score_full_text(judge: RewardFunction) -> RewardFunction:
    """Return a reward that scores each prompt joined with its completion."""

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> Sequence[float]:
        return judge(prompts, [prompt.text + text for prompt, text in zip(prompts, texts)])

    reward.judge = judge  # pyright: ignore[reportFunctionMemberAccess]
    return reward


def continuation_only(reward: RewardFunction) -> RewardFunction | None:
    """Return the reward inside `score_full_text`, which scores completions alone, or None."""
    return getattr(reward, "judge", None)


def score(reward: RewardFunction, prompts: Sequence[Prompt], texts: Sequence[str], must_be_finite: bool = True) -> list[float]:
    """Call a reward and check that it returns one finite number for each completion.

    It gets lists of its own, so that one that changes them changes nothing else. Every failure
    raises `TrainingError`; without `must_be_finite`, for a guard to judge, numbers may be infinite
    or NaN.
    """
    columns = prompts[0].columns if prompts else {}
    with user_code(f"the reward failed on {len(texts)} completions", RewardError, TrainingError, columns):
        returned: Any = reward(list(prompts), list(texts))
        values = _listed(returned)
    if values is None:
        raise RewardError(
            f"the reward returned {_kind_of(returned)} for {len(texts)} completions: it must return a list of numbers, one for "
            "each."
        )
    if len(values) != len(texts):
        raise RewardError(
            f"the reward returned {len(values)} numbers for {len(texts)} completions: it must return one for each."
        )
    return [_checked_number(value, text, must_be_finite) for value, text in zip(values, texts)]


def _listed(returned: Any) -> list[Any] | None:
    """Convert a reward's result to a list; return None if that is impossible.

    The keys of a mapping and the letters of a text are no rewards.
    """
    if hasattr(returned, "tolist"):  # a tensor, an array or a column of a table
        returned = returned.tolist()
    if not isinstance(returned, Iterable) or isinstance(returned, str | bytes | bytearray | Mapping | Set):
        return None
    return list(cast("Iterable[Any]", returned))


def _kind_of(returned: object) -> str:
    """Return the type of a reward's result, with its article."""
    name = type(returned).__name__
    return "nothing" if returned is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _checked_number(value: Any, text: str, must_be_finite: bool) -> float:
    """Return the reward of a completion as a number; raise `RewardError` if it is none."""
    number, found = value, math.nan
    if not isinstance(value, Real) and getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        with user_code("the reward of a completion cannot be read", RewardError):
            number = value.item()  # a tensor's number
    is_number = type(number) is not bool and isinstance(number, Real)
    if is_number:
        with suppress(OverflowError):  # a whole number of hundreds of digits
            found = float(number)
    if not is_number or (must_be_finite and not math.isfinite(found)):
        raise RewardError(
            f"the reward of the completion {show_value(text)} is {show_value(value)}: it must be a finite number."
        )
    return found


def mean_of(values: Sequence[float]) -> float:
    """Return the mean of values; infinity or NaN where fp64 has none."""
    try:
        return statistics.fmean(values)
    except (OverflowError, ValueError):  # too large, or infinities of both signs
        return sum(values) / len(values)


def probe_reward(reward: RewardFunction, prompts: Sequence[Prompt], longest: str = "") -> None:
    """Call a reward on a few texts before training; raise `ConfigError` if it fails.

    Among them are the empty text and `longest`, as long as a completion can be.
    """
    texts = [prompt.references[0] if prompt.references else "a text" for prompt in prompts]
    extremes = ["", longest] if longest else [""]
    try:
        score(reward, [*prompts, *[prompts[0]] * len(extremes)], [*texts, *extremes])
    except TrainingError as error:
        raise ConfigError(f"probe: {error}") from error.__cause__
