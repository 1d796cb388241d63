"""The family is data: phases say who writes what, a plan says how the phases share an iteration.

An algorithm never touches a model, a guide or a task. Two rules elsewhere do the rest: the policy trains on its own
tokens, and the critic of whoever finished a text trains on what comes after the switch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rlgf.errors import UserError, unknown
from rlgf.types import GUIDE, POLICY, Origin

Credit = Literal["gae", "td", "switch"]
SwitchRule = Literal["uniform", "paper", "horizon"]


@dataclass(frozen=True)
class Phase:
    """One way of sharing a text: with probability `beta` the rollin actor begins it, then the rollout actor finishes it.

    `switch` is the law of the switch point h given the rollin text's length L (`draw_switch`).
    """

    rollin: Origin | None
    rollout: Origin
    beta: float = 0.0
    switch: SwitchRule = "uniform"

    def __post_init__(self) -> None:
        """Refuse what cannot be a phase."""
        if not 0.0 <= self.beta <= 1.0:
            raise UserError(f"beta is {self.beta:g}, but it is a probability: choose a value within [0, 1].")
        if self.switch == "horizon" and self.rollin == GUIDE:
            raise UserError("switch 'horizon' is a rule for policy rollins: choose 'uniform' or 'paper' here.")


@dataclass(frozen=True)
class Share:
    """What a phase has in one iteration: a share of its texts, and the weights of A^π and A^g on them."""

    phase: int
    fraction: float
    policy_weight: float
    guide_weight: float


@dataclass(frozen=True)
class Algorithm:
    """Phases, and a plan: (iteration, a uniform draw) -> the shares of that iteration."""

    name: str
    title: str
    phases: tuple[Phase, ...]
    plan: Callable[[int, float], tuple[Share, ...]]
    credit: Credit
    summary: str

    @property
    def critics(self) -> tuple[Origin, ...]:
        """Whose values are needed: V^π where the policy rolls out, V^g where the guide does."""
        return tuple(origin for origin in (POLICY, GUIDE) if any(phase.rollout == origin for phase in self.phases))

    @property
    def asks_guide_to_begin(self) -> bool:
        """Whether the guide must write texts from the prompt."""
        return any(phase.rollin == GUIDE and phase.beta > 0 for phase in self.phases)

    @property
    def asks_guide_to_finish(self) -> bool:
        """Whether the guide must finish prefixes of the policy's."""
        return any(phase.rollout == GUIDE for phase in self.phases)


def own(phase: int, finisher: Origin, fraction: float = 1.0) -> Share:
    """A share whose advantage is that of its own finisher alone."""
    return Share(phase, fraction, float(finisher == POLICY), float(finisher == GUIDE))


def always(*shares: Share) -> Callable[[int, float], tuple[Share, ...]]:
    """The same shares in every iteration."""
    return lambda iteration, coin: shares


def draw_switch(rule: SwitchRule, rollin: Origin, length: int, horizon: int, uniform: float) -> int:
    """The switch point h for a rollin text of `length` tokens (L, end token included), from one uniform in [0, 1).

    'uniform': {0 … L−1} for a guide rollin (so that the first token is trained), {1 … L} for a policy rollin (so that the
    last one is). 'paper': {1 … L−1} for both, 0 where L < 2. 'horizon': {1 … H} before writing, clipped to L.
    """
    if rule == "paper":
        return 0 if length < 2 else 1 + math.floor(uniform * (length - 1))
    if rule == "horizon":
        return min(1 + math.floor(uniform * horizon), length)
    first = 0 if rollin == GUIDE else 1
    return min(first, length) + math.floor(uniform * length) if length else 0


def ppo() -> Algorithm:
    """The policy writes everything."""
    phase = Phase(rollin=None, rollout=POLICY)
    return Algorithm("ppo", "PPO", (phase,), always(own(0, POLICY)), "gae", "the policy writes everything")


def ppo_pp(beta: float, switch: SwitchRule = "uniform") -> Algorithm:
    """The guide begins a share of the texts; the policy finishes them and learns from its own part. Paper, algorithm 1."""
    phase = Phase(GUIDE, POLICY, beta, switch)
    return Algorithm(
        "ppo_pp", "PPO++", (phase,), always(own(0, POLICY)), "gae", "the guide begins, the policy finishes and learns"
    )


def aggrevated(beta: float, credit: Credit = "gae", switch: SwitchRule = "uniform") -> Algorithm:
    """The policy begins, the guide finishes; the policy learns from what the guide made of its words. Paper, algorithm 2."""
    phase = Phase(POLICY, GUIDE, beta, switch)
    return Algorithm(
        "aggrevated",
        "AggreVaTeD",
        (phase,),
        always(own(0, GUIDE)),
        credit,
        "the policy begins and learns, the guide finishes",
    )


def _both(beta_guide: float, beta_policy: float, switch_guide: SwitchRule, switch_policy: SwitchRule) -> tuple[Phase, Phase]:
    """The phase of PPO++ and that of AggreVaTeD, in this order."""
    return Phase(GUIDE, POLICY, beta_guide, switch_guide), Phase(POLICY, GUIDE, beta_policy, switch_policy)


def lols(
    beta_guide: float,
    beta_policy: float,
    alpha: float,
    mix: Literal["advantage", "iteration"] = "advantage",
    credit: Credit = "gae",
    switch_guide: SwitchRule = "uniform",
    switch_policy: SwitchRule = "uniform",
) -> Algorithm:
    """PPO++ and AggreVaTeD together. Paper, algorithm 4.

    mix 'advantage': every iteration has texts of both and trains on α A^π + (1−α) A^g. 'iteration': every iteration is
    PPO++ with probability α and AggreVaTeD otherwise, as the released code has it.
    """
    if not 0.0 <= alpha <= 1.0:
        raise UserError(f"alpha is {alpha:g}, but for lols it is a weight: choose a value within [0, 1].")
    phases = _both(beta_guide, beta_policy, switch_guide, switch_policy)
    plan: Callable[[int, float], tuple[Share, ...]]
    if mix == "advantage":
        plan = always(Share(0, 0.5, alpha, 1 - alpha), Share(1, 0.5, alpha, 1 - alpha))
        summary = f"both at once, advantages mixed {alpha:g} to {1 - alpha:.2g}"
    elif mix == "iteration":

        def by_coin(iteration: int, coin: float) -> tuple[Share, ...]:
            return (own(0, POLICY),) if coin < alpha else (own(1, GUIDE),)

        plan = by_coin
        summary = f"each iteration PPO++ with probability {alpha:g}, otherwise AggreVaTeD"
    else:
        raise unknown("mix", mix, ("advantage", "iteration"))
    return Algorithm("lols", "LOLS", phases, plan, credit, summary)


def d2lols(
    beta_guide: float,
    beta_policy: float,
    alpha: int,
    credit: Credit = "gae",
    switch_guide: SwitchRule = "uniform",
    switch_policy: SwitchRule = "uniform",
) -> Algorithm:
    """AggreVaTeD for the first `alpha` iterations, then PPO++ to the end. Paper, algorithm 3."""
    if alpha < 0:
        raise UserError(f"alpha is {alpha}, but for d2lols it counts iterations: choose 0 or more.")

    def plan(iteration: int, coin: float) -> tuple[Share, ...]:
        return (own(1, GUIDE),) if iteration < alpha else (own(0, POLICY),)

    phases = _both(beta_guide, beta_policy, switch_guide, switch_policy)
    return Algorithm("d2lols", "D2LOLS", phases, plan, credit, f"AggreVaTeD for {alpha} iterations, then PPO++")


def guide_alone() -> Algorithm:
    """The guide writes everything: no algorithm to learn by, but how a guide is evaluated and its texts are gathered."""
    phase = Phase(rollin=None, rollout=GUIDE)
    return Algorithm("guide", "guide", (phase,), always(own(0, GUIDE)), "gae", "the guide writes everything")


NAMES = ("ppo", "ppo_pp", "aggrevated", "lols", "d2lols")
