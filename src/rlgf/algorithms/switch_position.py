"""Phases: who generates which part of a completion, and where they switch."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from rlgf.bounds import Probability, check_bounds
from rlgf.errors import FieldError
from rlgf.types import GUIDE, Origin

SwitchRule = Literal["uniform", "paper", "horizon"]


@dataclass(frozen=True)
class Phase:
    """One way to divide a completion between policy and guide.

    With probability `beta` the rollin origin generates the first h tokens and the rollout origin
    the rest; otherwise the rollout origin generates all tokens. `switch` is the distribution of the
    switch position h given the rollin length L (see `sample_switch`).
    """

    rollin: Origin | None
    rollout: Origin
    beta: Probability = 0.0
    switch: SwitchRule = "uniform"

    def __post_init__(self) -> None:
        """Raise `ConfigError` if `beta` or `switch` is invalid."""
        check_bounds(self)
        require_switch_rule("switch", self.switch, self.rollin)


def sample_switch(rule: SwitchRule, rollin: Origin, length: int, max_new_tokens: int, uniform: float) -> int:
    """Sample the switch position h: the number of rollin tokens to keep.

    Args:
        rule: the distribution of h, uniform over one of these sets:
            'uniform': {0 … L−1} for a guide rollin, so that the policy trains on the first token
                as well; {1 … L} for a policy rollin, so that it trains on the last one as well.
            'paper': {1 … L−1} for both; 0 if L < 2.
            'horizon': {1 … H}, sampled before generation, clipped to L.
        rollin: the origin of the rollin.
        length: L, the tokens of the rollin, EOS token included.
        max_new_tokens: H, the maximum completion length in tokens.
        uniform: a uniform number in [0, 1); h is a deterministic function of it.
    """
    if rule == "paper":
        return 0 if length < 2 else 1 + math.floor(uniform * (length - 1))
    if rule == "horizon":
        return min(1 + math.floor(uniform * max_new_tokens), length)
    first = 0 if rollin == GUIDE else 1
    return min(first, length) + math.floor(uniform * length) if length else 0


def require_switch_rule(name: str, rule: str, rollin: Origin | None) -> None:
    """Raise if a switch rule does not exist, or not for this rollin."""
    require_choice(name, rule, get_args(SwitchRule))
    if rule == "horizon" and rollin == GUIDE:
        raise FieldError(f"{name} is 'horizon', which is a rule for policy rollins: choose 'uniform' or 'paper'.")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise if the value of an option is not one of the choices."""
    if value not in choices:
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(choices)}."
        raise FieldError(f"{name} is '{value}', which is unknown: {hint}")
