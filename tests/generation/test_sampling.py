"""The decoder: its samples and log-probabilities, and the independence of rows."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from helpers import asked
from rlgf.generation import decoder
from rlgf.generation.base import SampledCompletions
from rlgf.generation.decoder import sample_completions
from rlgf.generation.sampling import inverse_cdf, restrict_support, sample_tokens
from rlgf.models.forward import pad_rows, token_logits
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import load_language_model
from rlgf.models.log_probs import token_log_probs
from rlgf.randomness import Purpose, uniform_rows, uniforms
from rlgf.types import SamplingParams

GREEDY = SamplingParams(greedy=True)
LAST_UNIFORM = 1 - 2**-53
PREFIXES = [[5, 9, 12, 3, 7, 20], [11], [2, 30, 4], [8, 8, 8, 8, 8, 8, 8, 8, 8], [17, 23, 40, 1, 6]]
DECODINGS = {
    "full softmax": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "top-k": SamplingParams(top_k=5),
    "top-p": SamplingParams(top_p=0.8),
    "all": SamplingParams(temperature=1.3, top_k=9, top_p=0.9),
}


def with_ends(language_model: LanguageModel, *end_ids: int) -> LanguageModel:
    """The same model with other end tokens."""
    return LanguageModel(
        language_model.model, language_model.tokenizer, end_ids, language_model.max_length, language_model.vocab_size
    )


def draws_for(rows: int, most: int, seed: int = 0) -> NDArray[np.float64]:
    return uniform_rows(seed, Purpose.POLICY_TOKEN, range(rows), most, [0] * rows)


def write(
    language_model: LanguageModel,
    prefixes: Sequence[Sequence[int]],
    sampling: SamplingParams,
    most: int = 12,
    minimum: int = 0,
    budgets: Sequence[int] | None = None,
    seed: int = 0,
) -> SampledCompletions:
    rows = len(prefixes)
    budgets = budgets or [most] * rows
    return sample_completions(
        language_model, prefixes, budgets, [minimum] * rows, draws_for(rows, max(budgets), seed), sampling
    )


def rows_of(written: SampledCompletions) -> list[list[int]]:
    return [row[:length].tolist() for row, length in zip(written.tokens, written.lengths.tolist())]


def generated(language_model: LanguageModel, prefixes: Sequence[Sequence[int]], most: int, minimum: int) -> list[list[int]]:
    """What transformers' own greedy search writes after each prefix, the batch padded on the left; up to the end token."""
    width = max(map(len, prefixes))
    pad = language_model.eos_token_id
    output = language_model.model.generate(
        input_ids=torch.tensor([[pad] * (width - len(prefix)) + list(prefix) for prefix in prefixes]),
        attention_mask=torch.tensor([[0] * (width - len(prefix)) + [1] * len(prefix) for prefix in prefixes]),
        do_sample=False,
        max_new_tokens=most,
        min_new_tokens=minimum,
        eos_token_id=list(language_model.eos_token_ids),
        bos_token_id=pad,
        pad_token_id=pad,
    )
    rows: list[list[int]] = []
    for row in output[:, width:].tolist():
        end = next((i for i, token in enumerate(row) if token in language_model.eos_token_ids), len(row) - 1)
        rows.append(row[: end + 1])
    return rows


def common_ends(language_model: LanguageModel) -> LanguageModel:
    """The model with end tokens that its greedy texts do come to: the tokenizer's and two that it likes to write."""
    texts = generated(language_model, PREFIXES, 12, 0)
    return with_ends(language_model, language_model.eos_token_id, texts[0][3], texts[2][5])


# greedy search


@pytest.mark.parametrize("minimum", [0, 6])
@pytest.mark.parametrize("ragged", [True, False])
def test_greedy_equals_generate_token_for_token(tiny_model: LanguageModel, ragged: bool, minimum: int) -> None:
    ending = common_ends(tiny_model)
    prefixes = PREFIXES if ragged else [prefix[:1] for prefix in PREFIXES]
    expected = generated(ending, prefixes, 12, minimum)
    written = write(ending, prefixes, GREEDY, 12, minimum)
    assert rows_of(written) == expected
    assert written.ended_with_eos.tolist() == [row[-1] in ending.eos_token_ids for row in expected]
    assert all(len(row) > minimum or not minimum or len(row) == 12 for row in expected)
    if ragged and minimum == 0:
        assert len({len(row) for row in expected}) > 1  # else no row ever left the batch and little was shown


@pytest.mark.parametrize("kept", [1, 4])
def test_greedy_restarted_inside_a_text_finishes_it_as_generate_does(tiny_model: LanguageModel, kept: int) -> None:
    whole = generated(tiny_model, PREFIXES, 10, 10)
    restarted = [prefix + text[:kept] for prefix, text in zip(PREFIXES, whole)]
    written = write(tiny_model, restarted, GREEDY, 10 - kept, 10 - kept)
    assert rows_of(written) == generated(tiny_model, restarted, 10 - kept, 10 - kept)
    assert rows_of(written) == [text[kept:] for text in whole]


def test_budgets_differ_between_rows(tiny_model: LanguageModel) -> None:
    ending = common_ends(tiny_model)
    budgets = [3, 12, 0, 1, 7]
    written = write(ending, PREFIXES, GREEDY, budgets=budgets)
    expected = [row[:budget] for row, budget in zip(generated(ending, PREFIXES, 12, 0), budgets)]
    assert rows_of(written) == expected
    assert written.ended_with_eos.tolist() == [bool(row) and row[-1] in ending.eos_token_ids for row in expected]


@pytest.mark.data
def test_greedy_equals_generate_on_a_real_model(shared_data: Path) -> None:
    language_model = load_language_model(str(shared_data / "stories260k/hf"))
    texts = ["Once upon a time, there was", "One day, a girl named Lily", "Tom", "The big red ball was in the park and"]
    prefixes = [list(language_model.tokenizer(text)["input_ids"]) for text in texts]
    likely = language_model.tokenizer(".", add_special_tokens=False)["input_ids"][-1]
    for ending in (language_model, with_ends(language_model, language_model.eos_token_id, likely)):
        for minimum in (0, 20):
            expected = generated(ending, prefixes, 60, minimum)
            assert rows_of(write(ending, prefixes, GREEDY, 60, minimum)) == expected
            for kept in (1, 9):
                restarted = [prefix + text[:kept] for prefix, text in zip(prefixes, expected) if len(text) > kept]
                again = generated(ending, restarted, 30, 0)
                assert rows_of(write(ending, restarted, GREEDY, 30)) == again
            assert rows_of(write(ending, prefixes[:1], GREEDY, 60, minimum)) == expected[:1]


@pytest.mark.data
@pytest.mark.parametrize("sampling", DECODINGS.values(), ids=DECODINGS)
def test_a_real_model_samples_the_same_alone_and_in_a_batch(shared_data: Path, sampling: SamplingParams) -> None:
    language_model = load_language_model(str(shared_data / "stories260k/hf"))
    texts = ["Once upon a time, there was", "One day, a girl named Lily", "Tom", "The big red ball was in the park and"]
    prefixes = [list(language_model.tokenizer(text)["input_ids"]) for text in texts]
    assert_rows_independent(language_model, prefixes, sampling, 24, rounding=1e-5)
    assert_agrees_with_a_full_forward(language_model, prefixes, sampling, 24, 5, rounding=1e-5)


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


@pytest.mark.parametrize("sampling", DECODINGS.values(), ids=DECODINGS)
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


@pytest.mark.parametrize("sampling", DECODINGS.values(), ids=DECODINGS)
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
    assert stats.chisquare(seen[expected > 0], expected[expected > 0] * count).pvalue > 1e-3


def test_frequencies_of_whole_texts_fit_the_model(new_tiny_model: Callable[..., LanguageModel]) -> None:
    language_model = new_tiny_model("gpt2", seed=4, width=16, layers=1, init_std=0.6)
    count = 2000
    written = write(language_model, [[3, 5]] * count, SamplingParams(), most=2, minimum=2, seed=9)
    ids = torch.arange(language_model.vocab_size)
    vocabulary = language_model.vocab_size
    first = token_logits(language_model, asked(torch.tensor([[3, 5, 0]]), torch.tensor([0]), torch.tensor([2])))[0][0]
    allowed = ids != language_model.eos_token_id
    likely = first.masked_fill(~allowed, -torch.inf).softmax(0).topk(3).indices
    followers = torch.stack([torch.full((3,), 3), torch.full((3,), 5), likely, torch.zeros(3, dtype=torch.int64)], 1)
    second = token_logits(language_model, asked(followers, torch.arange(3), torch.full((3,), 3)))[0]
    joint = torch.zeros((4, vocabulary), dtype=torch.float64)
    start = first.double().masked_fill(~allowed, -torch.inf).softmax(0)
    joint[:3] = start[likely][:, None] * second.double().masked_fill(~allowed, -torch.inf).softmax(1)
    seen = torch.zeros((4, vocabulary))
    for one, other in written.tokens.tolist():
        place = likely.tolist().index(one) if one in likely else 3
        seen[place, other] += 1
    cells = joint[:3].flatten() * count > 5
    expected = torch.cat([joint[:3].flatten()[cells] * count, torch.tensor([0.0])])
    expected[-1] = count - expected.sum()
    counts = torch.cat([seen[:3].flatten()[cells], torch.tensor([0.0])])
    counts[-1] = count - counts.sum()
    assert stats.chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


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


@pytest.mark.parametrize("sampling", DECODINGS.values(), ids=DECODINGS)
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


# rows and batches


def assert_rows_independent(
    language_model: LanguageModel,
    prefixes: Sequence[Sequence[int]],
    sampling: SamplingParams,
    most: int,
    rounding: float = 0.0,  # relative, where logits are large
) -> None:
    draws = draws_for(len(prefixes), most, seed=2)

    def some(order: Sequence[int]) -> dict[int, tuple[list[int], Tensor, Tensor, list[list[int]]]]:
        order = list(order)
        written = sample_completions(
            language_model, [prefixes[i] for i in order], [most] * len(order), [2] * len(order), draws[order], sampling
        )
        kept: list[list[int]] = [[] for _ in range(len(order) * most)]
        if written.support is not None:
            kept = [part.tolist() for part in written.support.ids.split(written.support.counts.flatten().tolist())]
        return {
            i: (
                written.tokens[place, : int(written.lengths[place])].tolist(),
                written.log_probs[place, : int(written.lengths[place])],
                written.full_log_probs[place, : int(written.lengths[place])],
                kept[place * most : (place + 1) * most],
            )
            for place, i in enumerate(order)
        }

    whole = some(range(len(prefixes)))
    others = [some(reversed(range(len(prefixes)))), some(range(0, len(prefixes), 2))]
    others += [some([0]), some([1])]
    others.append(some([0, len(prefixes) - 1]))
    for other in others:
        for i, (tokens, log_probs, full_log_probs, kept) in other.items():
            assert tokens == whole[i][0]
            torch.testing.assert_close(log_probs, whole[i][1], rtol=rounding, atol=1e-5)
            torch.testing.assert_close(full_log_probs, whole[i][2], rtol=rounding, atol=1e-5)
            assert kept == whole[i][3]


def assert_agrees_with_a_full_forward(
    language_model: LanguageModel,
    prefixes: Sequence[Sequence[int]],
    sampling: SamplingParams,
    most: int,
    minimum: int,
    rounding: float = 0.0,  # relative, where logits are large
) -> None:
    written = write(language_model, prefixes, sampling, most, minimum)
    rows, steps = (torch.arange(most) < written.lengths[:, None]).nonzero(as_tuple=True)
    columns = torch.tensor([len(prefix) for prefix in prefixes])[rows] + steps
    texts = pad_rows([[*prefix, *text] for prefix, text in zip(prefixes, rows_of(written))])
    with torch.no_grad():
        logits, _ = token_logits(language_model, asked(texts, rows, columns))
    tokens = written.tokens[rows, steps]
    support = None if written.support is None else written.support.select(rows, steps)
    assert (support is None) == (not sampling.restricts_support)
    forbidden, ends = steps < minimum, torch.tensor(language_model.eos_token_ids)
    log_probs = token_log_probs(logits, tokens, sampling.temperature, support, forbidden, ends)
    torch.testing.assert_close(written.log_probs[rows, steps], log_probs, rtol=rounding, atol=1e-5)
    full = token_log_probs(logits, tokens)
    torch.testing.assert_close(written.full_log_probs[rows, steps], full, rtol=rounding, atol=1e-5)
    assert not bool(torch.isin(tokens[forbidden], ends).any())
    beyond = torch.arange(most) >= written.lengths[:, None]
    assert bool((written.tokens[beyond] == 0).all())
    assert bool((written.log_probs[beyond] == 0).all())
    if support is not None and written.support is not None:
        assert bool((support.counts > 0).all())
        assert bool((written.support.counts[beyond] == 0).all())
        for token, part in zip(tokens.tolist(), support.ids.split(support.counts.tolist())):
            assert token in part.tolist()
            assert part.tolist() == sorted(set(part.tolist()))


@pytest.mark.parametrize("sampling", [DECODINGS["full softmax"], DECODINGS["all"]], ids=["full softmax", "all"])
def test_neighbours_order_and_padding_change_no_draw(tiny_model: LanguageModel, sampling: SamplingParams) -> None:
    assert_rows_independent(tiny_model, PREFIXES, sampling, 8)


@pytest.mark.parametrize("sampling", DECODINGS.values(), ids=DECODINGS)
def test_log_probs_and_support_agree_with_a_full_forward(tiny_model: LanguageModel, sampling: SamplingParams) -> None:
    assert_agrees_with_a_full_forward(tiny_model, PREFIXES, sampling, 12, 4)


def test_the_size_of_decoding_batches_changes_no_draw(tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tiny_model, PREFIXES, SamplingParams(top_p=0.9), budgets=[12, 3, 12, 7, 1])
    bounds = [("BATCH_TOKENS", 1), ("BATCH_TOKENS", 40), ("PREFILL_TOKENS", 1), ("PREFILL_TOKENS", 20), ("BATCH_LOGITS", 1)]
    for bound, size in bounds:
        with monkeypatch.context() as patch:
            patch.setattr(decoder, bound, size)
            parts = write(tiny_model, PREFIXES, SamplingParams(top_p=0.9), budgets=[12, 3, 12, 7, 1])
        assert rows_of(parts) == rows_of(whole)
        assert torch.equal(parts.ended_with_eos, whole.ended_with_eos)
        torch.testing.assert_close(parts.log_probs, whole.log_probs, rtol=0, atol=1e-5)
        assert parts.support is not None
        assert whole.support is not None
        assert torch.equal(parts.support.ids, whole.support.ids)
        assert torch.equal(parts.support.counts, whole.support.counts)


def test_a_restart_with_the_remaining_uniforms_writes_the_same_rest(tiny_model: LanguageModel) -> None:
    whole = write(tiny_model, PREFIXES, SamplingParams(top_k=6), minimum=12)
    kept = [1, 5, 0, 11, 7]
    starts = [[*prefix, *text[:keep]] for prefix, text, keep in zip(PREFIXES, rows_of(whole), kept)]
    draws = uniform_rows(0, Purpose.POLICY_TOKEN, range(len(kept)), 12, kept)
    rest = sample_completions(
        tiny_model, starts, [12 - keep for keep in kept], [12 - keep for keep in kept], draws, SamplingParams(top_k=6)
    )
    assert rows_of(rest) == [text[keep:] for text, keep in zip(rows_of(whole), kept)]
    for row, keep in enumerate(kept):
        torch.testing.assert_close(rest.log_probs[row, : 12 - keep], whole.log_probs[row, keep:], rtol=0, atol=1e-5)


def test_a_token_that_is_padding_and_end_at_once_is_read_like_any_other(tiny_model: LanguageModel) -> None:
    end = tiny_model.eos_token_id
    assert tiny_model.tokenizer.pad_token_id == end
    prefixes = [[end, 5, 9], [7, end, end, 4, 2, 8], [end], [3, end]]
    assert rows_of(write(tiny_model, prefixes, GREEDY, 8, 8)) == generated(tiny_model, prefixes, 8, 8)
    assert_rows_independent(tiny_model, prefixes, SamplingParams(), 8)


def test_the_minimum_counts_from_the_prefix_and_budgets_end_texts(tiny_model: LanguageModel) -> None:
    ending = with_ends(tiny_model, *range(0, 41, 2))
    written = write(ending, PREFIXES * 4, SamplingParams(), most=6, minimum=3)
    for text, finished in zip(rows_of(written), written.ended_with_eos.tolist()):
        assert not set(text[:3]) & set(ending.eos_token_ids)
        assert not set(text[:-1]) & set(ending.eos_token_ids)
        assert finished == (text[-1] in ending.eos_token_ids)
        assert len(text) == 6 or finished
    assert len(set(written.lengths.tolist())) > 1


def test_nothing_to_write_is_no_error(tiny_model: LanguageModel) -> None:
    written = sample_completions(tiny_model, [], [], [], np.zeros((0, 0)), SamplingParams(top_k=3))
    assert written.tokens.shape == (0, 0)
    written = sample_completions(tiny_model, [[1, 2]], [0], [0], np.zeros((1, 0)), SamplingParams())
    assert written.tokens.shape == (1, 0)
    assert written.lengths.tolist() == [0]
    assert written.ended_with_eos.tolist() == [False]


# what is computed


@dataclass
class Calls:
    """The shape of the ids of every forward pass of a model."""

    shapes: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])


@contextlib.contextmanager
def counted(language_model: LanguageModel) -> Iterator[Calls]:
    calls = Calls()

    def note(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        calls.shapes.append(tuple(keywords["input_ids"].shape))

    handle = language_model.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def test_a_prefix_is_read_in_one_pass_and_only_what_follows_is_decoded(tiny_model: LanguageModel) -> None:
    with counted(tiny_model) as calls:
        write(tiny_model, [[4] * 20, [9] * 20, [7] * 20], SamplingParams(), most=5, minimum=5)
    assert calls.shapes == [(3, 20)] + [(3, 1)] * 4  # the last token is drawn and not read


def test_ragged_prefixes_are_each_read_once(tiny_model: LanguageModel) -> None:
    with counted(tiny_model) as calls:
        write(tiny_model, [[4] * 20, [9] * 2, [7] * 19, [5] * 2], SamplingParams(), most=4, minimum=4)
    prefills = [shape for shape in calls.shapes if shape[1] > 1]
    assert sum(rows for rows, _ in prefills) == 4
    assert sum(rows * width for rows, width in prefills) <= 2 * 20 + 2 * 2  # short ones are not padded to the longest
    assert calls.shapes[len(prefills) :] == [(4, 1)] * 3


def test_rows_that_have_finished_leave_the_batch(tiny_model: LanguageModel) -> None:
    ending = with_ends(tiny_model, *range(0, 41, 4))
    with counted(tiny_model) as calls:
        written = write(ending, [[4, 5]] * 20, SamplingParams(), most=10)
    going = [int((written.lengths > step).sum()) for step in range(1, 10)]  # rows that write a token after this step
    assert calls.shapes == [(1, 2)] + [(rows, 1) for rows in going if rows]  # one prefix for all of them
    assert going[-1] < going[0] < 20


def test_rows_that_have_used_their_budget_leave_the_batch(tiny_model: LanguageModel) -> None:
    with counted(tiny_model) as calls:
        write(tiny_model, [[4, 5]] * 4, SamplingParams(), minimum=9, budgets=[1, 4, 2, 4])
    assert calls.shapes == [(1, 2), (3, 1), (2, 1), (2, 1)]


def test_the_model_is_left_as_it_was(tiny_model: LanguageModel) -> None:
    before = {name: value.clone() for name, value in tiny_model.model.state_dict().items()}
    write(tiny_model, PREFIXES, SamplingParams())
    for name, value in tiny_model.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not tiny_model.model.get_output_embeddings()._forward_pre_hooks


def test_uniforms_and_not_the_global_generator_decide(tiny_model: LanguageModel) -> None:
    torch.manual_seed(1)
    first = rows_of(write(tiny_model, PREFIXES, SamplingParams()))
    torch.manual_seed(2)
    assert rows_of(write(tiny_model, PREFIXES, SamplingParams())) == first
    assert rows_of(write(tiny_model, PREFIXES, SamplingParams(), seed=1)) != first
    assert uniforms(0, Purpose.POLICY_TOKEN, 0, 1)[0] != uniforms(1, Purpose.POLICY_TOKEN, 0, 1)[0]


def test_beam_search_continues_each_prefix_as_transformers_does(tiny_model: LanguageModel) -> None:
    written = rows_of(write(tiny_model, PREFIXES, SamplingParams(num_beams=4), most=6))
    for prefix, mine in zip(PREFIXES, written):
        found = tiny_model.model.generate(
            torch.tensor([prefix]), num_beams=4, do_sample=False, max_new_tokens=6, pad_token_id=0,
            eos_token_id=list(tiny_model.eos_token_ids),
        )[0, len(prefix) :].tolist()  # fmt: skip
        assert mine == found
