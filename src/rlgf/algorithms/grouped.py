"""Algorithms without a critic: advantages over a group of completions of one prompt.

A group has `ppo.samples_per_prompt` completions. The KL penalty is in the reward
(`kl.coefficient`, before the baseline) or in the loss (`kl.loss_coefficient`); the form of the loss
is that of the section `ppo`.
"""

from dataclasses import dataclass
from typing import ClassVar, get_args

from rlgf.algorithms.base import Algorithm, constant_schedule, single_phase
from rlgf.algorithms.baselines import GroupAdvantage, GroupBaseline, GroupOver
from rlgf.algorithms.switch_position import Phase, SwitchRule, require_choice, require_switch_rule
from rlgf.bounds import Flag, PositiveFloat, Probability, check_bounds
from rlgf.types import GUIDE, POLICY


@dataclass(frozen=True)
class GRPO:
    """GRPO: the policy generates all tokens; advantages are normalized within the group.

    With `normalize` false they are not divided by the standard deviation, as in Dr. GRPO. Source:
    Shao et al. 2024 (arXiv:2402.03300); Liu et al. 2025 (arXiv:2503.20783).

    Raises:
        ConfigError: `epsilon` is not positive.

    Example:
        >>> algorithm = rlgf.grpo().build()
        >>> algorithm.critics, algorithm.needs_guide
        ((), False)
    """

    name: ClassVar[str] = "grpo"
    title: ClassVar[str] = "GRPO"

    normalize: Flag = True  # divide by the standard deviation of the group's rewards
    epsilon: PositiveFloat = 1e-4  # added to it

    def __post_init__(self) -> None:
        """Raise `ConfigError` for an invalid option."""
        check_bounds(self)

    def build(self) -> Algorithm:
        """Return the algorithm with these options."""
        baseline = GroupBaseline(_advantage(self.normalize), epsilon=self.epsilon)
        return _unguided(self.name, self.title, baseline)


@dataclass(frozen=True)
class RLOO:
    """RLOO: the policy generates all tokens; the baseline is the mean reward of the others.

    Source: Ahmadian et al. 2024 (arXiv:2402.14740).

    Example:
        >>> rlgf.rloo().build().baseline.advantage
        'leave_one_out'
    """

    name: ClassVar[str] = "rloo"
    title: ClassVar[str] = "RLOO"

    def build(self) -> Algorithm:
        """Return the algorithm; it has no options."""
        return _unguided(self.name, self.title, GroupBaseline("leave_one_out"))


@dataclass(frozen=True)
class GuidedGRPO:
    """Guided GRPO: PPO++ with a group in place of the critic.

    With probability `beta` the completions of a group continue a prefix that the guide generated.
    With `over` 'start_state' it is one prefix for the whole group, with 'prompt' one for each
    completion.

    Raises:
        ConfigError: `beta` is outside [0, 1], `epsilon` is not positive, or a choice is unknown.

    Example:
        >>> algorithm = rlgf.guided_grpo(beta=0.5).build()
        >>> algorithm.critics, algorithm.needs_guide_rollin
        ((), True)
    """

    name: ClassVar[str] = "guided_grpo"
    title: ClassVar[str] = "Guided GRPO"

    beta: Probability = 0.2  # probability of a guide rollin
    switch: SwitchRule = "uniform"  # distribution of the switch position
    over: GroupOver = "start_state"  # what the completions of a group share
    normalize: Flag = True  # divide by the standard deviation of the group's rewards
    epsilon: PositiveFloat = 1e-4  # added to it

    def __post_init__(self) -> None:
        """Raise `ConfigError` for an invalid option."""
        check_bounds(self)
        require_choice("over", self.over, get_args(GroupOver))
        require_switch_rule("switch", self.switch, GUIDE)

    def build(self) -> Algorithm:
        """Return the algorithm with these options."""
        baseline = GroupBaseline(_advantage(self.normalize), self.over, self.epsilon)
        phase = Phase(GUIDE, POLICY, self.beta, self.switch)
        schedule = constant_schedule(single_phase(0, POLICY))
        summary = "the guide starts, a group of completions by the policy continues and is trained"
        return Algorithm(self.name, self.title, (phase,), schedule, "gae", summary, baseline)


def _advantage(normalize: bool) -> GroupAdvantage:
    return "group_normalized" if normalize else "group_mean"


def _unguided(name: str, title: str, baseline: GroupBaseline) -> Algorithm:
    """Return an algorithm in which the policy generates all tokens."""
    schedule = constant_schedule(single_phase(0, POLICY))
    return Algorithm(
        name, title, (Phase(None, POLICY),), schedule, "gae", "the policy generates everything, in groups", baseline
    )
