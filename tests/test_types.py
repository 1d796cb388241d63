"""Masks derive from the origin of each token and the switch position."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlgf.models.log_probs import SampledSupport
from rlgf.rl.tensors import Rollout
from rlgf.types import GUIDE, POLICY, Origin, Prompt, SamplingParams

LETTERS = {"_": Origin.PAD, "x": Origin.PROMPT, "p": Origin.POLICY, "g": Origin.GUIDE}


def rollout(authors: list[str], switch: list[int], finisher: list[Origin]) -> Rollout:
    """A rollout in which `authors` spells who wrote each token: x prompt, p policy, g guide, _ padding."""
    origin = torch.tensor([[int(LETTERS[letter]) for letter in row] for row in authors], dtype=torch.uint8)
    zeros, texts = torch.zeros(origin.shape), len(authors)
    return Rollout(
        prompts=[Prompt("")] * texts,
        completions=[""] * texts,
        ids=torch.zeros(origin.shape, dtype=torch.int64),  # every id equals the padding's: nothing may depend on ids
        origin=origin,
        switch_position=torch.tensor(switch),
        rollout_by=torch.tensor([int(each) for each in finisher], dtype=torch.uint8),
        phase=torch.zeros(texts, dtype=torch.int64),
        ended_with_eos=torch.ones(texts, dtype=torch.bool),
        index=torch.arange(texts),
        group=torch.arange(texts),
        log_probs=zeros,
        full_log_probs=zeros,
        support=None,
        min_new_tokens=0,
    )


def spelled(mask: Tensor) -> list[str]:
    return ["".join("1" if each else "." for each in row) for row in mask.tolist()]


#                  PPO++      AggreVaTeD  guide alone  policy alone (h = L)
MIXED = rollout(["xxggpp", "xppgg_", "xgg___", "xxxpp_"], [2, 2, 0, 2], [POLICY, GUIDE, GUIDE, GUIDE])


def test_lengths_count_everything_but_padding() -> None:
    assert MIXED.lengths.tolist() == [6, 5, 3, 5]
    assert MIXED.prompt_lengths.tolist() == [2, 1, 1, 3]


def test_response_position_counts_from_the_end_of_the_prompt() -> None:
    assert MIXED.response_position.tolist() == [
        [-2, -1, 0, 1, 2, 3],
        [-1, 0, 1, 2, 3, 4],
        [-1, 0, 1, 2, 3, 4],
        [-3, -2, -1, 0, 1, 2],
    ]


def test_written_is_by_policy_or_by_guide() -> None:
    assert spelled(MIXED.completion_mask) == ["..1111", ".1111.", ".11...", "...11."]
    assert spelled(MIXED.by_policy) == ["....11", ".11...", "......", "...11."]
    assert spelled(MIXED.by_guide) == ["..11..", "...11.", ".11...", "......"]


def test_after_switch_is_the_rollout_and_empty_where_the_rollin_wrote_everything() -> None:
    assert spelled(MIXED.after_switch) == ["....11", "...11.", ".11...", "......"]


@pytest.mark.parametrize("credit", ["gae", "td"])
def test_the_policy_is_trained_on_its_own_tokens(credit: str) -> None:
    assert spelled(MIXED.trained_tokens(credit)) == spelled(MIXED.by_policy)


def test_credit_switch_trains_the_last_token_before_a_guide_and_all_of_a_policy_rollout() -> None:
    assert spelled(MIXED.trained_tokens("switch")) == ["....11", "..1...", "......", "....1."]


def test_a_plain_text_by_the_policy_is_all_after_the_switch_whatever_the_credit() -> None:
    plain = rollout(["xpp_", "xxp_"], [0, 0], [POLICY, POLICY])
    for credit in ("gae", "td", "switch"):
        assert spelled(plain.trained_tokens(credit)) == spelled(plain.after_switch) == [".11.", "..1."]


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5), st.booleans())
def test_masks_divide_the_written_tokens(shapes: list[tuple[int, int, int]], guide_first: bool) -> None:
    first, second = ("g", "p") if guide_first else ("p", "g")
    rows = ["x" * prompt + first * before + second * after for prompt, before, after in shapes]
    width = max(map(len, rows)) + 1
    finisher = LETTERS[second]
    found = rollout([row.ljust(width, "_") for row in rows], [before for _, before, _ in shapes], [finisher] * len(rows))
    assert torch.equal(found.completion_mask, found.by_policy ^ found.by_guide)
    assert torch.equal(found.after_switch, found.origin == finisher)
    assert torch.equal(found.lengths, found.prompt_lengths + found.completion_mask.sum(1))
    for credit in ("gae", "td", "switch"):
        assert not bool((found.trained_tokens(credit) & ~found.by_policy).any())
    if finisher == GUIDE:
        assert found.trained_tokens("switch").sum(1).tolist() == [min(before, 1) for _, before, _ in shapes]


def test_support_select_picks_ragged_lists_in_any_order() -> None:
    support = SampledSupport(torch.tensor([[2, 0, 1], [0, 3, 1]]), torch.tensor([10, 11, 12, 20, 21, 22, 23]))
    chosen = support.select(torch.tensor([1, 0, 0, 0, 1]), torch.tensor([1, 0, 1, 2, 2]))
    assert chosen.counts.tolist() == [3, 2, 0, 1, 1]
    assert chosen.ids.tolist() == [20, 21, 22, 10, 11, 12, 23]


def test_support_select_of_nothing_is_nothing() -> None:
    support = SampledSupport(torch.tensor([[2, 0]]), torch.tensor([10, 11]))
    nothing = torch.zeros(0, dtype=torch.int64)
    for rows, columns in ((nothing, nothing), (torch.tensor([0]), torch.tensor([1]))):
        chosen = support.select(rows, columns)
        assert chosen.counts.tolist() == [0] * len(rows)
        assert chosen.ids.tolist() == []


@given(
    st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 2)), max_size=6),
)
def test_support_select_equals_picking_from_nested_lists(counts: list[list[int]], places: list[tuple[int, int]]) -> None:
    flat = iter(range(100))
    nested = [[[next(flat) for _ in range(count)] for count in row] for row in counts]
    support = SampledSupport(torch.tensor(counts), torch.arange(sum(map(sum, counts))))
    places = [(row % len(counts), column) for row, column in places]
    rows, columns = (torch.tensor([place[axis] for place in places], dtype=torch.int64) for axis in (0, 1))
    chosen = support.select(rows, columns)
    assert chosen.counts.tolist() == [counts[row][column] for row, column in places]
    assert chosen.ids.tolist() == [token for row, column in places for token in nested[row][column]]


def test_nouns_are_frozen() -> None:
    for noun, name in ((Prompt("a"), "text"), (MIXED, "switch_position"), (SamplingParams(), "top_k")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(noun, name, None)


def test_decoding_says_when_it_truncates_and_describes_itself() -> None:
    assert not SamplingParams(temperature=0.5).restricts_support
    assert SamplingParams(top_k=1).restricts_support
    assert SamplingParams(top_p=0.9).restricts_support
    assert SamplingParams().describe() == "full softmax"
    assert SamplingParams(temperature=0.7, top_k=50, top_p=0.9).describe() == "temperature 0.7, top-k 50, top-p 0.9"
    assert SamplingParams(temperature=0.7, greedy=True).describe() == "greedy"
