"""The decoder: its samples and log-probabilities, and the independence of rows."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers import WAYS_TO_SAMPLE, asked, chi_square_p_value
from rlgf.generation import decoder, kv_decoder
from rlgf.generation.base import SampledCompletions
from rlgf.generation.decoder import sample_completions
from rlgf.models.forward import pad_rows, token_logits
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import load_language_model
from rlgf.models.log_probs import token_log_probs
from rlgf.randomness import Purpose, uniform_rows, uniforms
from rlgf.types import SamplingParams

GREEDY = SamplingParams(greedy=True)
PREFIXES = [[5, 9, 12, 3, 7, 20], [11], [2, 30, 4], [8, 8, 8, 8, 8, 8, 8, 8, 8], [17, 23, 40, 1, 6]]


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
    """Return what transformers' greedy search generates after each prefix (batch padded on the left), up to EOS."""
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
@pytest.mark.parametrize("sampling", WAYS_TO_SAMPLE.values(), ids=WAYS_TO_SAMPLE)
def test_a_real_model_samples_the_same_alone_and_in_a_batch(shared_data: Path, sampling: SamplingParams) -> None:
    language_model = load_language_model(str(shared_data / "stories260k/hf"))
    texts = ["Once upon a time, there was", "One day, a girl named Lily", "Tom", "The big red ball was in the park and"]
    prefixes = [list(language_model.tokenizer(text)["input_ids"]) for text in texts]
    assert_rows_independent(language_model, prefixes, sampling, 24, rounding=1e-5)
    assert_agrees_with_a_full_forward(language_model, prefixes, sampling, 24, 5, rounding=1e-5)


# whole texts


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
    assert chi_square_p_value(counts, expected) > 1e-3


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


@pytest.mark.parametrize("sampling", [WAYS_TO_SAMPLE["full softmax"], WAYS_TO_SAMPLE["all"]], ids=["full softmax", "all"])
def test_neighbours_order_and_padding_change_no_draw(tiny_model: LanguageModel, sampling: SamplingParams) -> None:
    assert_rows_independent(tiny_model, PREFIXES, sampling, 8)


@pytest.mark.parametrize("sampling", WAYS_TO_SAMPLE.values(), ids=WAYS_TO_SAMPLE)
def test_log_probs_and_support_agree_with_a_full_forward(tiny_model: LanguageModel, sampling: SamplingParams) -> None:
    assert_agrees_with_a_full_forward(tiny_model, PREFIXES, sampling, 12, 4)


@pytest.mark.integration
def test_the_size_of_decoding_batches_changes_no_draw(tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = write(tiny_model, PREFIXES, SamplingParams(top_p=0.9), budgets=[12, 3, 12, 7, 1])
    bounds = [("BATCH_TOKENS", 1), ("BATCH_TOKENS", 40), ("PREFILL_TOKENS", 1), ("PREFILL_TOKENS", 20), ("BATCH_LOGITS", 1)]
    for bound, size in bounds:
        with monkeypatch.context() as patch:
            patch.setattr(kv_decoder if bound == "PREFILL_TOKENS" else decoder, bound, size)
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
