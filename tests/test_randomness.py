"""Random numbers are a pure function of (seed, purpose, index, position)."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import chi_square_p_value
from rlgf.randomness import Purpose, permutation, uniform_rows, uniforms

PINNED = [
    [0.4291563450602872, 0.6443840681728986, 0.4839306937685306],
    [0.13963110160390912, 0.04871101618142959, 0.9223962470333809],
]
PURPOSES = st.sampled_from(Purpose)
SEEDS = st.integers(0, 2**62)
INDICES = st.integers(0, 2**62)


def test_the_numbers_of_a_run_are_pinned() -> None:
    # a change here changes every run: say so in the changelog
    assert uniforms(0, Purpose.POLICY_TOKEN, 0, 3).tolist() == PINNED[0]
    assert uniforms(7, Purpose.SWITCH, 12345, 3).tolist() == PINNED[1]


@given(SEEDS, PURPOSES, INDICES, st.integers(0, 40))
def test_draws_depend_on_arguments_alone(seed: int, purpose: Purpose, index: int, count: int) -> None:
    first = uniforms(seed, purpose, index, count)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    uniforms(seed + 1, purpose, index + 1, 3)
    assert np.array_equal(uniforms(seed, purpose, index, count), first)
    assert first.dtype == np.float64
    assert first.shape == (count,)
    assert bool(((first >= 0) & (first < 1)).all())


@given(SEEDS, PURPOSES, INDICES, st.integers(0, 40), st.integers(0, 20))
def test_a_position_is_the_same_whether_asked_with_a_start_or_not(
    seed: int, purpose: Purpose, index: int, start: int, count: int
) -> None:
    whole = uniforms(seed, purpose, index, start + count)
    assert np.array_equal(uniforms(seed, purpose, index, count, start), whole[start:])
    assert np.array_equal(uniforms(seed, purpose, index, start), whole[:start])


@given(SEEDS, PURPOSES, st.lists(st.tuples(INDICES, st.integers(0, 20)), max_size=5), st.integers(0, 10))
def test_rows_are_those_of_single_calls(seed: int, purpose: Purpose, places: list[tuple[int, int]], count: int) -> None:
    rows = uniform_rows(seed, purpose, [index for index, _ in places], count, [start for _, start in places])
    assert rows.shape == (len(places), count)
    for row, (index, start) in zip(rows, places):
        assert np.array_equal(row, uniforms(seed, purpose, index, count, start))


def test_no_two_of_seed_purpose_and_index_share_a_draw() -> None:
    draws = [
        value
        for seed in (0, 1, 2, 2**40)
        for purpose in Purpose
        for index in (0, 1, 2, 3, 10**9)
        for value in uniforms(seed, purpose, index, 50).tolist()
    ]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize("seeds", [(-1, -2), (-1, 0), (2**63, 2**63 + 1), (2**64 - 1, 2**64 - 2)])
def test_negative_and_large_seeds_and_indices_have_draws_of_their_own(seeds: tuple[int, int]) -> None:
    first, second = (uniforms(seed, Purpose.TASK, 0, 2).tolist() for seed in seeds)
    assert first != second
    first, second = (uniforms(0, Purpose.TASK, index, 2).tolist() for index in seeds)
    assert first != second


def test_long_rows_do_not_run_into_the_next_index() -> None:
    first, second = uniforms(0, Purpose.TASK, 0, 5000), uniforms(0, Purpose.TASK, 1, 5000)
    assert not set(first.tolist()) & set(second.tolist())


@pytest.mark.parametrize("along", ["position", "index", "seed"])
def test_draws_are_uniform_and_neighbours_independent(along: str) -> None:
    count = 4096
    if along == "position":
        draws = uniforms(3, Purpose.POLICY_TOKEN, 5, count)
    elif along == "index":
        draws = uniform_rows(3, Purpose.POLICY_TOKEN, range(count), 1, [2] * count)[:, 0]
    else:
        draws = np.array([uniforms(seed, Purpose.POLICY_TOKEN, 5, 1)[0] for seed in range(count)])
    cells = (draws * 8).astype(int)
    assert chi_square_p_value(np.bincount(cells, minlength=8)) > 1e-3
    assert chi_square_p_value(np.bincount(8 * cells[:-1] + cells[1:], minlength=64)) > 1e-3


@given(SEEDS, PURPOSES, INDICES, st.integers(0, 50))
def test_a_permutation_holds_every_place_once(seed: int, purpose: Purpose, index: int, size: int) -> None:
    order = permutation(seed, purpose, index, size)
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(order, permutation(seed, purpose, index, size))


def test_permutations_of_three_are_equally_likely() -> None:
    orders = [tuple(permutation(0, Purpose.MINIBATCH, index, 3).tolist()) for index in range(3000)]
    counts = [orders.count(order) for order in sorted(set(orders))]
    assert len(counts) == 6
    assert chi_square_p_value(counts) > 1e-3


def test_purposes_have_numbers_of_their_own() -> None:
    assert len({int(purpose) for purpose in Purpose}) == len(Purpose.__members__)
