"""Intervals over few prompts, by hand."""

import math

import pytest

from rlgf.evaluation.intervals import interval_in, mean_interval, share_interval, show_interval, show_mean
from rlgf.reports.tables import cell


def test_intervals_of_means_and_shares() -> None:
    # Student's t for 9 degrees of freedom is 2.26216
    assert mean_interval(1.0, 0.1, 10) == pytest.approx((1 - 0.226216, 1 + 0.226216), abs=1e-4)
    assert mean_interval(1.0, 0.1, 2) == pytest.approx((1 - 1.27062, 1 + 1.27062))
    assert mean_interval(1.0, 0.0, 1) == (-math.inf, math.inf)
    assert share_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)  # Wilson: n / (n + z²)
    assert share_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_only_numbers_over_few_prompts_have_one() -> None:
    few = {"score": 1.0, "score_standard_error": 0.1, "pass_rate": 0.5, "completions": 10.0, "kl": 3.0}
    assert show_interval(interval_in("score", few), ".2f") == " [0.77, 1.23]"
    assert show_interval(interval_in("pass_rate", few), ".2f") == " [0.24, 0.76]"
    assert interval_in("kl", few) is None
    assert interval_in("score", {**few, "completions": 64.0}) is None
    assert interval_in("accuracy", {"accuracy": 0.5, "held_out_pairs": 10}) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert interval_in("win_rate", {"win_rate": 0.5, "wins": 4.0, "ties": 2.0, "losses": 4.0}) is not None


def test_means_and_cells_carry_it() -> None:
    assert show_mean([0.0, 1.0] * 32) == "0.500"
    assert show_mean([0.0, 2.0, 0.0, 2.0], ".1f") == "1.0 [-0.8, 2.8]"
    assert show_mean([0.0] * 4) == "0.000 [0.000, 0.490]"  # a share, whose errors do not show in its spread
    metrics = {"pass_rate": [0.5], "completions": [10.0]}
    assert cell(metrics, "pass_rate") == "0.500 [0.237, 0.763]"
    # two seeds: half the width, over the square root of two
    assert cell({"pass_rate": [0.5, 0.5], "completions": [10.0, 10.0]}, "pass_rate") == "0.500 ± 0.000 [0.314, 0.686]"
    assert cell({"pass_rate": [0.5], "completions": [100.0]}, "pass_rate") == "0.500"
