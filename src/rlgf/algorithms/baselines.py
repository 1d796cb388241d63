"""Group baselines: the others of a group in place of a critic."""

from dataclasses import dataclass
from typing import Literal, get_args

from rlgf.algorithms.switch_position import require_choice
from rlgf.bounds import PositiveFloat, check_bounds

GroupAdvantage = Literal["leave_one_out", "group_mean", "group_normalized"]
GroupOver = Literal["start_state", "prompt"]


@dataclass(frozen=True)
class GroupBaseline:
    """A baseline from the rewards of a group: the `ppo.samples_per_prompt` completions of a prompt.

    `over` is 'start_state' or 'prompt'. With 'start_state' the completions of a group share the
    guide's prefix and the switch position; with 'prompt' each has its own.
    """

    advantage: GroupAdvantage
    over: GroupOver = "start_state"
    epsilon: PositiveFloat = 1e-4  # added to the standard deviation

    def __post_init__(self) -> None:
        """Raise `ConfigError` for an invalid option."""
        check_bounds(self)
        require_choice("advantage", self.advantage, get_args(GroupAdvantage))
        require_choice("over", self.over, get_args(GroupOver))
