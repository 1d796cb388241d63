"""Group baselines: advantages by hand, and the algorithms that use them."""

import pytest
import torch

from rlgf.algorithms.advantages import group_advantages
from rlgf.algorithms.baselines import GroupAdvantage, GroupBaseline
from rlgf.algorithms.registry import grpo, guided_grpo, rloo
from rlgf.errors import ConfigError
from rlgf.types import GUIDE, POLICY

REWARDS = torch.tensor([1.0, 0.0, 0.0, 5.0, 5.0, 7.0])
GROUPS = torch.tensor([4, 4, 4, 9, 9, 2])


@pytest.mark.parametrize(
    ("advantage", "expected"),
    [
        ("leave_one_out", [1.0, -0.5, -0.5, 0.0, 0.0, 0.0]),
        ("group_mean", [2 / 3, -1 / 3, -1 / 3, 0.0, 0.0, 0.0]),
        ("group_normalized", [2 / 3 / 0.6773503, -1 / 3 / 0.6773503, -1 / 3 / 0.6773503, 0.0, 0.0, 0.0]),  # std .57735 + .1
    ],
)
def test_an_advantage_over_a_group_by_hand(advantage: GroupAdvantage, expected: list[float]) -> None:
    found, differs = group_advantages(REWARDS, GROUPS, GroupBaseline(advantage, epsilon=0.1))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert differs.tolist() == [True, True, True, False, False, False]  # equal rewards, and a group of one


@pytest.mark.parametrize("advantage", ["leave_one_out", "group_mean", "group_normalized"])
def test_equal_rewards_have_no_advantage_whatever_their_size(advantage: GroupAdvantage) -> None:
    for value in (0.0, 0.1, -1e30, 3e38):
        found, differs = group_advantages(torch.full((5,), value), torch.zeros(5), GroupBaseline(advantage))
        assert found.tolist() == [0.0] * 5
        assert not bool(differs.any())


def test_the_order_of_rows_does_not_matter() -> None:
    order = torch.tensor([3, 0, 5, 2, 4, 1])
    baseline = GroupBaseline("group_normalized")
    found, _ = group_advantages(REWARDS, GROUPS, baseline)
    shuffled, _ = group_advantages(REWARDS[order], GROUPS[order], baseline)
    assert torch.equal(found[order], shuffled)


def test_no_row_has_no_advantage() -> None:
    found, differs = group_advantages(torch.zeros(0), torch.zeros(0, dtype=torch.int64), GroupBaseline("leave_one_out"))
    assert (len(found), len(differs)) == (0, 0)


def test_group_algorithms_have_no_critic_and_one_phase() -> None:
    for options in (grpo(), rloo(), guided_grpo(0.5)):
        algorithm = options.build()
        assert algorithm.critics == ()
        assert [phase.rollout for phase in algorithm.phases] == [POLICY]
    assert guided_grpo(0.5).build().phases[0].rollin == GUIDE
    assert grpo().build().baseline == GroupBaseline("group_normalized", epsilon=1e-4)
    assert grpo(normalize=False).build().baseline == GroupBaseline("group_mean")
    assert rloo().build().baseline == GroupBaseline("leave_one_out")
    assert not guided_grpo(over="prompt").build().shares_start_states
    assert guided_grpo().build().shares_start_states


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": "rows"}, "over is 'rows', which is unknown"),
        ({"epsilon": 0.0}, "epsilon is 0.0, but must be above 0"),
        ({"beta": 1.5}, "beta is 1.5, but must be at most 1"),
        ({"switch": "horizon"}, "switch is 'horizon', which is a rule for policy rollins"),
        ({"normalize": 2}, "normalize is 2, but must be true or false"),
    ],
)
def test_an_option_that_cannot_be_used_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        guided_grpo(**options).build()  # type: ignore[arg-type]
