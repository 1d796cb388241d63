"""Numbers that training adapts: each step by hand."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf.config.sections import KLConfig, RewardConfig
from rlgf.errors import TrainingError
from rlgf.rl.kl_controller import KLController
from rlgf.rl.shaping import RewardShaper, RunningStats
from rlgf.types import Prompt

PROMPTS = [Prompt("a", ("xx",)), Prompt("b", ("x", "xxxxx"))]


def length(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    return [float(len(text)) for text in texts]


def test_a_fixed_coefficient_stays() -> None:
    controller = KLController(KLConfig(coefficient=0.1, controller="fixed"), 0.1)
    controller.update(1000.0, 10_000)
    assert controller.coefficient == 0.1


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (600.0, 1.02), (0.0, 0.98), (-5.0, 0.98)])
def test_an_adaptive_coefficient_moves_towards_its_target_by_a_bounded_step(kl: float, factor: float) -> None:
    config = KLConfig(coefficient=0.2, controller="adaptive", target=6.0, horizon=1000)
    controller = KLController(config, 0.2)
    controller.update(kl, num_completions=100)
    assert controller.coefficient == pytest.approx(0.2 * factor)


def test_running_moments_by_hand() -> None:
    running = RunningStats()
    assert running.scale == 1
    running.add(1.0)
    assert (running.mean, running.scale) == (1.0, 1)
    running.add(3.0)
    assert (running.count, running.mean, running.scale) == (2, 2.0, 1.0)
    running.add(8.0)
    assert running.mean == 4.0
    assert running.scale == pytest.approx((26 / 3) ** 0.5)


def test_equal_values_have_scale_1() -> None:
    running = RunningStats()
    for _ in range(3):
        running.add(5.0)
    assert running.scale == 1


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20))
def test_running_moments_equal_those_of_the_whole(values: list[float]) -> None:
    running = RunningStats()
    for value in values:
        running.add(value)
    mean = sum(values) / len(values)
    assert running.mean == pytest.approx(mean, abs=1e-6)
    assert running.deviations == pytest.approx(sum((value - mean) ** 2 for value in values), abs=1e-4)


def test_by_default_rewards_stay_as_they_are() -> None:
    shaper = RewardShaper(RewardConfig(), length)
    assert shaper.shape([0.25, -3.0], PROMPTS, [True, False]) == [0.25, -3.0]


def test_the_score_of_the_first_reference_is_subtracted() -> None:
    shaper = RewardShaper(RewardConfig(subtract_reference=True), length)
    assert shaper.shape([5.0, 5.0], PROMPTS, [True, True]) == [3.0, 4.0]


def test_rewards_are_clipped_on_both_sides() -> None:
    shaper = RewardShaper(RewardConfig(clip=1.5), length)
    assert shaper.shape([5.0, -5.0], PROMPTS, [True, True]) == [1.5, -1.5]
    assert shaper.shape([1.0, -1.25], PROMPTS, [True, True]) == [1.0, -1.25]


def test_a_text_that_was_cut_off_pays_the_penalty() -> None:
    shaper = RewardShaper(RewardConfig(missing_eos_penalty=0.5), length)
    assert shaper.shape([1.0, 1.0], PROMPTS, [True, False]) == [1.0, 0.5]


def test_rewards_are_normalised_by_all_values_so_far() -> None:
    shaper = RewardShaper(RewardConfig(normalize=True), length)
    assert shaper.shape([1.0, 3.0], PROMPTS, [True, True]) == [-1.0, 1.0]
    # now 1, 3, 8, 4: mean 4, variance 26/4
    second = shaper.shape([8.0, 4.0], PROMPTS, [True, True])
    assert second == pytest.approx([4 / 6.5**0.5, 0.0])


def test_the_order_is_reference_scale_clip_penalty() -> None:
    config = RewardConfig(subtract_reference=True, normalize=True, clip=0.5, missing_eos_penalty=2.0)
    shaper = RewardShaper(config, length)
    # 5 − 2 = 3 and 2 − 1 = 1; then ±1; then ±.5; then the penalty, beyond the clip
    assert shaper.shape([5.0, 2.0], PROMPTS, [True, False]) == [0.5, -2.5]


def test_the_scores_that_were_given_are_left_alone() -> None:
    scores = [5.0, 2.0]
    RewardShaper(RewardConfig(clip=0.5, normalize=True), length).shape(scores, PROMPTS, [True, True])
    assert scores == [5.0, 2.0]


def test_a_restored_shaper_goes_on_as_if_never_stopped() -> None:
    first = RewardShaper(RewardConfig(normalize=True), length)
    first.shape([1.0, 3.0], PROMPTS, [True, True])
    second = RewardShaper(RewardConfig(normalize=True), length)
    second.load_state(first.state())
    assert second.shape([8.0, 4.0], PROMPTS, [True, True]) == first.shape([8.0, 4.0], PROMPTS, [True, True])
    assert second.state() == first.state()


def test_a_reward_that_fails_on_references_is_a_run_error() -> None:
    shaper = RewardShaper(RewardConfig(subtract_reference=True), lambda prompts, texts: [float("nan")] * len(texts))
    with pytest.raises(TrainingError, match="must be a finite number"):
        shaper.shape([1.0, 1.0], PROMPTS, [True, True])


def test_nothing_to_shape_is_no_error() -> None:
    config = RewardConfig(subtract_reference=True, normalize=True, clip=1.0, missing_eos_penalty=1.0)
    assert RewardShaper(config, length).shape([], [], []) == []
