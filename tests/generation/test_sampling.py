"""One step of sampling: the distribution that tokens are drawn from, and the inverse of its cumulative sum."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from helpers import WAYS_TO_SAMPLE, chi_square_p_value
from rlgf.generation.sampling import inverse_cdf, restrict_support, sample_tokens
from rlgf.randomness import Purpose, uniform_rows
from rlgf.types import SamplingParams

LAST_UNIFORM = 1 - 2**-53


# the distribution of one step


def processed(logits: Tensor, forbidden: Tensor, end_ids: Sequence[int], sampling: SamplingParams) -> Tensor:
    """The logits as transformers' processors and warpers shape them, in the order of `generate`."""
    scores = logits.clone()
    for row in range(len(scores)):
        ids = torch.zeros((1, 4), dtype=torch.int64)
        ban = MinNewTokensLengthLogitsProcessor(3, 3 if bool(forbidden[row]) else 1, list(end_ids))
        scores[row : row + 1] = ban(ids, scores[row : row + 1])
    warpers: list[Callable[[Any, Tensor], Tensor]] = []
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(min(sampling.top_k, logits.shape[1])))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    for warper in warpers:
        scores = warper(None, scores)
    return scores


def assert_draws_from(logits: Tensor, forbidden: Tensor, end_ids: Sequence[int], sampling: SamplingParams) -> None:
    """Every token of every row is drawn exactly in its own share of [0, 1), with the log-probability of that share."""
    expected = processed(logits, forbidden, end_ids, sampling).double().softmax(1)
    for row in range(len(logits)):
        shares = expected[row]
        possible = shares.nonzero().squeeze(1)
        middles = shares.cumsum(0)[possible] - shares[possible] / 2
        wide = shares[possible] > 1e-5  # a narrower share may be missed by rounding
        drawn = sample_tokens(
            logits[row].expand(len(possible), -1), middles, forbidden[row].expand(len(possible)), end_ids, sampling
        )
        assert drawn.tokens[wide].tolist() == possible[wide].tolist()
        torch.testing.assert_close(drawn.log_probs.double()[wide], shares[possible[wide]].log(), rtol=0, atol=1e-6)
        full = logits[row].double().log_softmax(0)[drawn.tokens]
        torch.testing.assert_close(drawn.full_log_probs.double(), full, rtol=0, atol=2e-6)
        if sampling.restricts_support:
            assert drawn.support is not None
            assert drawn.support.counts.tolist() == [len(possible)] * len(possible)
            assert drawn.support.ids.view(len(possible), -1).tolist() == [possible.tolist()] * len(possible)
        else:
            assert drawn.support is None


@pytest.mark.parametrize("sampling", WAYS_TO_SAMPLE.values(), ids=WAYS_TO_SAMPLE)
@pytest.mark.parametrize("end_ids", [(0,), (3, 7)])
def test_a_step_draws_from_what_transformers_processors_leave(sampling: SamplingParams, end_ids: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn((8, 24), generator=generator) * torch.linspace(0.2, 4, 8)[:, None]
    assert_draws_from(logits, torch.arange(8) % 2 == 0, end_ids, sampling)


@pytest.mark.parametrize(
    "sampling", [SamplingParams(top_k=3), SamplingParams(top_k=1), SamplingParams(temperature=0.5, top_k=4)]
)
def test_ties_at_the_last_place_of_top_k_are_all_kept(sampling: SamplingParams) -> None:
    logits = torch.tensor(
        [
            [0.0, 2.0, 1.0, 1.0, 1.0, -1.0],  # three for the last two places
            [1.0, 1.0, 1.0, 1.0, 1.0, 1.0],  # all alike
            [5.0, 4.0, 3.0, 2.0, 1.0, 0.0],  # none
            [2.0, 2.0, 0.0, 0.0, 2.0, 2.0],
        ]
    )
    for forbidden in (torch.zeros(4, dtype=torch.bool), torch.tensor([True, False, True, True])):
        assert_draws_from(logits, forbidden, (0,), sampling)
        for row in range(4):
            assert_draws_from(logits[row : row + 1], forbidden[row : row + 1], (0,), sampling)


def test_top_k_beyond_the_vocabulary_cuts_nothing_off() -> None:
    logits = torch.tensor([[0.3, -0.2, 1.0]])
    assert_draws_from(logits, torch.tensor([False]), (0,), SamplingParams(top_k=50))


def test_top_p_keeps_the_most_likely_token_however_small_p_is() -> None:
    logits = torch.tensor([[0.0, 0.5, 0.2]])
    assert_draws_from(logits, torch.tensor([False]), (0,), SamplingParams(top_p=1e-6))
    assert_draws_from(logits, torch.tensor([True]), (1,), SamplingParams(top_p=1e-6))


def test_top_p_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()
    kept, ids = restrict_support(logits, SamplingParams(top_p=0.65))
    assert ids.tolist() == [[1, 3]]
    torch.testing.assert_close(kept.softmax(1), torch.tensor([[4 / 7, 3 / 7]]))


@pytest.mark.parametrize(
    "sampling", [SamplingParams(top_p=0.7), SamplingParams(top_k=20, top_p=0.7), SamplingParams(top_k=30, top_p=0.4)]
)
def test_what_is_kept_of_tied_tokens_does_not_depend_on_the_other_rows(sampling: SamplingParams) -> None:
    tied, untied = torch.zeros((1, 40)), torch.linspace(0, 4, 40)[None]
    uniform, forbidden = torch.tensor([0.999] * 2, dtype=torch.float64), torch.tensor([False, False])
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randint(0, 3, (1, 40), generator=generator).float()  # many ties, also where top-p cuts
        found: list[list[int]] = []
        for other in (tied, untied):
            drawn = sample_tokens(torch.cat([logits, other]), uniform, forbidden, (0,), sampling)
            assert drawn.support is not None
            found.append(drawn.support.ids[: int(drawn.support.counts[0])].tolist())
        assert found[0] == found[1]


@functools.cache
def first_draws(count: int) -> NDArray[np.float64]:
    """One uniform of each of many trajectories."""
    return uniform_rows(5, Purpose.POLICY_TOKEN, range(count), 1, [3] * count)[:, 0]


@pytest.mark.parametrize("sampling", WAYS_TO_SAMPLE.values(), ids=WAYS_TO_SAMPLE)
@pytest.mark.parametrize("forbidden", [False, True])
def test_frequencies_of_draws_fit_the_distribution(sampling: SamplingParams, forbidden: bool) -> None:
    count = 6000
    logits = torch.tensor([0.5, -1.0, 1.5, 0.0, -3.0, 1.4, 0.2, -0.5])
    mask = torch.full((count,), forbidden)
    draws = torch.from_numpy(first_draws(count))
    tokens = sample_tokens(logits.expand(count, -1), draws, mask, (2,), sampling).tokens
    expected = processed(logits[None], mask[:1], (2,), sampling)[0].double().softmax(0).numpy()
    seen = np.bincount(tokens.numpy(), minlength=8)
    assert seen[expected == 0].sum() == 0
    assert chi_square_p_value(seen[expected > 0], expected[expected > 0] * count) > 1e-3


# inverting the cumulative sum


def test_invert_by_hand() -> None:
    weights = torch.tensor([[1.0, 2.0, 1.0]]).expand(6, -1)
    uniform = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.75, LAST_UNIFORM], dtype=torch.float64)
    assert inverse_cdf(weights, uniform).tolist() == [0, 0, 1, 1, 2, 2]


def test_invert_never_returns_a_token_of_weight_zero() -> None:
    weights = torch.tensor(
        [[0.0, 1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0], [1e-30, 0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1e-38]]
    )
    edges = [0.0, 2**-53, 1 / 3 - 2**-54, 1 / 3, 1 / 3 + 2**-53, 0.5, 1 - 2**-52, LAST_UNIFORM]
    for row in weights:
        for uniform in edges:
            place = int(inverse_cdf(row[None], torch.tensor([uniform], dtype=torch.float64)))
            assert float(row[place]) > 0


def test_the_edges_of_the_uniform_give_the_first_and_the_last_possible_token() -> None:
    weights = torch.zeros((2, 50_000))
    weights[:, 7:40_001] = 0.1
    uniform = torch.tensor([0.0, LAST_UNIFORM], dtype=torch.float64)
    assert inverse_cdf(weights, uniform).tolist() == [7, 40_000]


@pytest.mark.parametrize("sampling", WAYS_TO_SAMPLE.values(), ids=WAYS_TO_SAMPLE)
@pytest.mark.parametrize("uniform", [0.0, LAST_UNIFORM])
def test_edge_uniforms_draw_neither_forbidden_nor_cut_tokens(sampling: SamplingParams, uniform: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn((40, 60), generator=generator) * 8  # some weights underflow to zero
    ends = (0, 59)
    drawn = sample_tokens(
        logits, torch.full((40,), uniform, dtype=torch.float64), torch.ones(40, dtype=torch.bool), ends, sampling
    )
    expected = processed(logits, torch.ones(40, dtype=torch.bool), ends, sampling)
    picked = expected.gather(1, drawn.tokens[:, None]).squeeze(1)
    assert bool((picked > -torch.inf).all())
    assert bool(drawn.log_probs.isfinite().all())
