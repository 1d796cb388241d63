"""Factors on the learning rate, at steps that can be worked out by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf.algorithms.schedules import learning_rate_factor

KINDS = st.sampled_from(["constant", "linear", "cosine"])


def factors(kind: str, steps: int, warmup: int = 0) -> list[float]:
    return [learning_rate_factor(kind, step, steps, warmup) for step in range(steps)]


def test_constant_is_1() -> None:
    assert factors("constant", 3) == [1, 1, 1]


def test_linear_falls_to_zero_after_the_last_step() -> None:
    assert factors("linear", 4) == [1, 0.75, 0.5, 0.25]
    assert learning_rate_factor("linear", 4, 4) == 0


def test_cosine_is_half_way_in_the_middle() -> None:
    assert factors("cosine", 3) == pytest.approx([1, 0.75, 0.25])
    assert learning_rate_factor("cosine", 3, 3) == pytest.approx(0)


def test_warmup_rises_linearly_and_the_decline_starts_after_it() -> None:
    assert factors("constant", 4, warmup=2) == [0.5, 1, 1, 1]
    assert factors("linear", 6, warmup=2) == [0.5, 1, 1, 0.75, 0.5, 0.25]


@given(KINDS, st.integers(0, 20), st.integers(0, 20), st.integers(0, 25))
def test_factors_stay_within_0_and_1_beyond_the_end_too(kind: str, step: int, steps: int, warmup: int) -> None:
    assert 0 <= learning_rate_factor(kind, step, steps, warmup) <= 1


@given(KINDS, st.integers(1, 30), st.integers(0, 10))
def test_after_the_warmup_factors_never_rise(kind: str, steps: int, warmup: int) -> None:
    after = factors(kind, steps + warmup, warmup)[warmup:]
    assert after[0] == 1
    assert after == sorted(after, reverse=True)
    assert all(factor > 0 for factor in after)


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'step'"):
        learning_rate_factor("step", 0, 1)
