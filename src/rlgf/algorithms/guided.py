"""The five algorithms of the paper as data: phases, and a schedule of their weights.

Each algorithm is a dataclass of its options with `build()`. A new one is a class here and an entry
in `rlgf.algorithms.registry`; its options are then `algorithm.options.NAME` of a config.

Source: Chang et al. 2023, "Learning to Generate Better Than Your LLM" (arXiv:2306.11816), called
"the paper" below.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from rlgf.algorithms.base import Algorithm, Credit, PhaseSchedule, PhaseWeight, constant_schedule, single_phase
from rlgf.algorithms.switch_position import Phase, SwitchRule, require_choice, require_switch_rule
from rlgf.bounds import NonNegativeInt, Probability, check_bounds
from rlgf.types import GUIDE, POLICY

Mix = Literal["advantage", "iteration"]


@dataclass(frozen=True)
class PPO:
    """PPO: the policy generates all tokens.

    Source: Schulman et al. 2017, "Proximal Policy Optimization Algorithms".

    Example:
        >>> algorithm = rlgf.ppo().build()
        >>> algorithm.needs_guide_rollin, algorithm.needs_guide_rollout
        (False, False)
    """

    name: ClassVar[str] = "ppo"
    title: ClassVar[str] = "PPO"

    def build(self) -> Algorithm:
        """Return the algorithm; it has no options."""
        phase = Phase(rollin=None, rollout=POLICY)
        schedule = constant_schedule(single_phase(0, POLICY))
        return Algorithm(self.name, self.title, (phase,), schedule, "gae", "the policy generates everything")


@dataclass(frozen=True)
class PPOPlusPlus:
    """PPO++: guide rollin with probability `beta`, policy rollout.

    The policy trains on the tokens it generated. Source: the paper, algorithm 1.

    Raises:
        ConfigError: `beta` is outside [0, 1], or `switch` is not a rule for guide rollins.

    Example:
        >>> rlgf.ppo_pp(beta=0.5).build().needs_guide_rollin
        True
        >>> rlgf.ppo_pp(beta=1.5)
        Traceback (most recent call last):
        rlgf.errors.FieldError: beta is 1.5, but must be at most 1.
    """

    name: ClassVar[str] = "ppo_pp"
    title: ClassVar[str] = "PPO++"

    beta: Probability = 0.2  # probability of a guide rollin
    switch: SwitchRule = "uniform"  # distribution of the switch position

    def __post_init__(self) -> None:
        """Raise `ConfigError` for an invalid option."""
        check_bounds(self)
        require_switch_rule("switch", self.switch, GUIDE)

    def build(self) -> Algorithm:
        """Return the algorithm with these options."""
        phase = Phase(GUIDE, POLICY, self.beta, self.switch)
        schedule = constant_schedule(single_phase(0, POLICY))
        summary = "the guide starts, the policy continues and is trained"
        return Algorithm(self.name, self.title, (phase,), schedule, "gae", summary)


@dataclass(frozen=True)
class AggreVaTeD:
    """AggreVaTeD: policy rollin with probability `beta`, guide rollout.

    The policy trains on its rollin tokens; their advantages come from the completion that the guide
    generated after them. Source: the paper, algorithm 2.

    Raises:
        ConfigError: `beta` is outside [0, 1], or `credit` or `switch` is unknown.

    Example:
        >>> algorithm = rlgf.aggrevated(beta=0.8, credit="switch").build()
        >>> algorithm.needs_guide_rollout, algorithm.critics
        (True, (<Origin.GUIDE: 3>,))
    """

    name: ClassVar[str] = "aggrevated"
    title: ClassVar[str] = "AggreVaTeD"

    beta: Probability = 0.8  # probability of a policy rollin
    credit: Credit = "gae"  # advantage estimator for guide rollouts
    switch: SwitchRule = "uniform"  # distribution of the switch position

    def __post_init__(self) -> None:
        """Raise `ConfigError` for an invalid option."""
        check_bounds(self)
        require_choice("credit", self.credit, get_args(Credit))
        require_switch_rule("switch", self.switch, POLICY)

    def build(self) -> Algorithm:
        """Return the algorithm with these options."""
        phase = Phase(POLICY, GUIDE, self.beta, self.switch)
        schedule = constant_schedule(single_phase(0, GUIDE))
        summary = "the policy starts and is trained, the guide continues"
        return Algorithm(self.name, self.title, (phase,), schedule, self.credit, summary)


@dataclass(frozen=True)
class LOLS:
    """LOLS: a mixture of PPO++ and AggreVaTeD.

    With `mix` 'advantage', half of an iteration's rows belong to each phase, and all are trained on
    α A^π + (1−α) A^g, where α is `mixing_weight`. With 'iteration', the whole iteration is PPO++
    with probability α, else AggreVaTeD, as in the paper's released code. Source: the paper,
    algorithm 4.

    Raises:
        ConfigError: a probability or `mixing_weight` is outside [0, 1], or a choice is unknown.

    Example:
        >>> algorithm = rlgf.lols(mixing_weight=0.75).build()
        >>> [(w.fraction, w.policy_weight, w.guide_weight) for w in algorithm.schedule(0, 0.5)]
        [(0.5, 0.75, 0.25), (0.5, 0.75, 0.25)]
    """

    name: ClassVar[str] = "lols"
    title: ClassVar[str] = "LOLS"

    beta_guide: Probability = 0.2  # probability of a guide rollin in the phase of PPO++
    beta_policy: Probability = 0.8  # probability of a policy rollin in the phase of AggreVaTeD
    mixing_weight: Probability = 0.8  # α
    mix: Mix = "advantage"  # mix advantages in every iteration, or whole iterations
    credit: Credit = "gae"  # advantage estimator for guide rollouts
    switch_guide: SwitchRule = "uniform"  # of guide rollins
    switch_policy: SwitchRule = "uniform"  # of policy rollins

    def __post_init__(self) -> None:
        """Raise `ConfigError` for an invalid option."""
        _check_both(self)
        require_choice("mix", self.mix, get_args(Mix))

    def build(self) -> Algorithm:
        """Return the algorithm with these options."""
        alpha = self.mixing_weight
        if self.mix == "advantage":
            schedule = constant_schedule(PhaseWeight(0, 0.5, alpha, 1 - alpha), PhaseWeight(1, 0.5, alpha, 1 - alpha))
            summary = f"both at once, advantages mixed {alpha:g} to {1 - alpha:.2g}"
        else:
            schedule = _by_probability(alpha)
            summary = f"each iteration PPO++ with probability {alpha:g}, otherwise AggreVaTeD"
        return Algorithm(self.name, self.title, _both_phases(self), schedule, self.credit, summary)


@dataclass(frozen=True)
class D2LOLS:
    """D2LOLS: AggreVaTeD for the first `switch_iteration` iterations, then PPO++.

    Source: the paper, algorithm 3.

    Raises:
        ConfigError: a probability is outside [0, 1], `switch_iteration` is negative, or a choice is
            unknown.

    Example:
        >>> algorithm = rlgf.d2lols(switch_iteration=8).build()
        >>> [algorithm.schedule(iteration, 0.5)[0].guide_weight for iteration in (7, 8)]
        [1.0, 0.0]
    """

    name: ClassVar[str] = "d2lols"
    title: ClassVar[str] = "D2LOLS"

    beta_guide: Probability = 0.2  # probability of a guide rollin in the phase of PPO++
    beta_policy: Probability = 0.8  # probability of a policy rollin in the phase of AggreVaTeD
    switch_iteration: NonNegativeInt = 20  # the first iteration of PPO++
    credit: Credit = "gae"  # advantage estimator for guide rollouts
    switch_guide: SwitchRule = "uniform"  # of guide rollins
    switch_policy: SwitchRule = "uniform"  # of policy rollins

    def __post_init__(self) -> None:
        """Raise `ConfigError` for an invalid option."""
        _check_both(self)

    def build(self) -> Algorithm:
        """Return the algorithm with these options."""
        summary = f"AggreVaTeD for {self.switch_iteration} iterations, then PPO++"
        return Algorithm(
            self.name, self.title, _both_phases(self), _from_iteration(self.switch_iteration), self.credit, summary
        )


def _check_both(options: LOLS | D2LOLS) -> None:
    """Raise for an invalid option of the phases of PPO++ and AggreVaTeD."""
    check_bounds(options)
    require_choice("credit", options.credit, get_args(Credit))
    require_switch_rule("switch_guide", options.switch_guide, GUIDE)
    require_switch_rule("switch_policy", options.switch_policy, POLICY)


def _both_phases(options: LOLS | D2LOLS) -> tuple[Phase, Phase]:
    """Return the phase of PPO++ and the phase of AggreVaTeD, in this order."""
    return (
        Phase(GUIDE, POLICY, options.beta_guide, options.switch_guide),
        Phase(POLICY, GUIDE, options.beta_policy, options.switch_policy),
    )


def _by_probability(alpha: float) -> PhaseSchedule:
    """Return the schedule of the first phase with probability `alpha`, else of the second."""
    return lambda iteration, uniform: (single_phase(0, POLICY),) if uniform < alpha else (single_phase(1, GUIDE),)


def _from_iteration(start: int) -> PhaseSchedule:
    """Return the schedule of the second phase before iteration `start`, then of the first."""
    return lambda iteration, uniform: (single_phase(1, GUIDE),) if iteration < start else (single_phase(0, POLICY),)


def guide_only() -> Algorithm:
    """Return the algorithm in which the guide generates all tokens.

    It trains nothing; it serves to evaluate a guide and to collect its completions.
    """
    phase = Phase(rollin=None, rollout=GUIDE)
    return Algorithm(
        "guide", "guide", (phase,), constant_schedule(single_phase(0, GUIDE)), "gae", "the guide generates everything"
    )
