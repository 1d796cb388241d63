"""Two authors, one text: who wrote what, where the pen changed hands, and what a guide may not do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from helpers import asked
from rlgf.algorithms import Algorithm, Phase, aggrevated, always, d2lols, draw_switch, lols, own, ppo, ppo_pp
from rlgf.errors import RunError, UserError
from rlgf.forward import token_logits
from rlgf.guides import Capabilities, FunctionGuide, Guide, ModelGuide, ReferenceGuide, Request, Text, ask
from rlgf.models import LanguageModel
from rlgf.ops import token_log_probs
from rlgf.randomness import Purpose, uniforms
from rlgf.rollout import Writing, choose_prompts, collect, guide_ids, split_texts
from rlgf.types import GUIDE, POLICY, Decoding, Origin, Prompt, Rollout

HORIZON = 8
WORD = "camera"
SPOKEN = "great acting"
ASPECTS = ["acting", "plot", "music", "script", "cast", "pacing"]
PROMPTS = [Prompt(f"review of : {' '.join(ASPECTS[: 1 + i % 6])} =>", (" bold plot",)) for i in range(24)]
INDICES = [3 + 7 * i for i in range(24)]
MIXTURES = {
    "ppo": ppo(),
    "ppo_pp": ppo_pp(0.7),
    "ppo_pp_paper": ppo_pp(1.0, "paper"),
    "aggrevated": aggrevated(0.8),
    "aggrevated_paper": aggrevated(1.0, switch="paper"),
    "aggrevated_horizon": aggrevated(1.0, switch="horizon"),
    "lols": lols(0.7, 0.8, 0.5),
    "d2lols": d2lols(0.5, 1.0, 3),
}


def force(language_model: LanguageModel, ids: Sequence[int], value: float) -> LanguageModel:
    """Add `value` to the logits of some tokens, for good."""

    def shift(module: Any, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        shifted = output.clone()
        shifted[..., list(ids)] += value
        return shifted

    language_model.model.get_output_embeddings().register_forward_hook(shift)
    return language_model


@pytest.fixture(scope="module")
def word_id(word_tokenizer: Any) -> int:
    return word_tokenizer.convert_tokens_to_ids(WORD)


@pytest.fixture(scope="module")
def policy(new_tiny_model: Callable[..., LanguageModel], word_id: int) -> LanguageModel:
    """A policy that can write everything but the guide's word, and ends its texts now and then."""
    language_model = new_tiny_model("gpt2", seed=1, width=16, layers=1)
    return force(force(language_model, [word_id], -1e6), [language_model.end_id], 3.0)


@pytest.fixture(scope="module")
def model_guide(new_tiny_model: Callable[..., LanguageModel], word_id: int) -> ModelGuide:
    """A model that writes nothing but its word, until it is cut off."""
    return ModelGuide(force(new_tiny_model("gpt2", seed=2, width=16, layers=1), [word_id], 1e6), Decoding())


@dataclass
class Listener:
    """A guide that remembers what it was asked, and answers with `count` of its word."""

    count: int = 3
    finished: bool = True
    can_finish: bool = True
    requests: list[Request] = field(default_factory=list[Request])

    def __call__(self, requests: Sequence[Request]) -> list[Text]:
        self.requests += requests
        return [Text(f" {WORD}" * self.count, self.finished) for _ in requests]


def writing(policy: LanguageModel, guide: Guide | None, **changes: Any) -> Writing:
    return replace(Writing(policy, guide, Decoding(), horizon=HORIZON, minimum=0, seed=11), **changes)


def run(
    setting: Writing,
    algorithm: Algorithm,
    prompts: Sequence[Prompt] = PROMPTS,
    indices: Sequence[int] = INDICES,
    iteration: int = 0,
) -> Rollout:
    return collect(setting, algorithm, algorithm.plan(iteration, 0.5), prompts, indices)


def responses(rollout: Rollout) -> list[list[tuple[int, int]]]:
    """For each text its written tokens with their authors."""
    pairs = zip(rollout.ids, rollout.origin, rollout.written)
    return [list(zip(ids[written].tolist(), origin[written].tolist())) for ids, origin, written in pairs]


def authors(rollout: Rollout) -> list[str]:
    return ["".join({int(POLICY): "p", int(GUIDE): "g"}[origin] for _, origin in row) for row in responses(rollout)]


# a known word


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("kind", ["function", "unfinished function", "model"])
def test_the_guides_word_is_exactly_where_the_guide_wrote(
    name: str, kind: str, policy: LanguageModel, model_guide: ModelGuide, word_id: int
) -> None:
    guide: Guide = model_guide if kind == "model" else FunctionGuide(Listener(finished=kind == "function"))
    rollout = run(writing(policy, guide), MIXTURES[name])
    of_guide = (rollout.ids == word_id) | ((rollout.ids == policy.end_id) & rollout.by_guide)
    assert torch.equal(of_guide & rollout.written, rollout.by_guide)
    assert bool((rollout.ids == word_id).any()) == (name != "ppo")
    for text, row in zip(rollout.texts, responses(rollout)):
        assert text.split().count(WORD) == sum(token == word_id for token, _ in row)


@pytest.mark.parametrize("name", MIXTURES)
def test_prompts_are_untouched_and_everything_adds_up(name: str, policy: LanguageModel) -> None:
    rollout = run(writing(policy, FunctionGuide(Listener())), MIXTURES[name])
    assert list(rollout.prompts) == PROMPTS
    assert rollout.index.tolist() == rollout.group.tolist() == INDICES
    for row, prompt in enumerate(PROMPTS):
        prompt_ids = policy.tokenizer(prompt.text)["input_ids"]
        length = len(prompt_ids)
        assert rollout.ids[row, :length].tolist() == prompt_ids
        assert rollout.origin[row, :length].tolist() == [Origin.PROMPT] * length
        rest = rollout.origin[row, length:].tolist()
        count = len([origin for origin in rest if origin])
        assert rest == [origin for origin in rest if origin] + [0] * (len(rest) - count)
        assert 0 < count <= HORIZON
        ids = rollout.ids[row, length : length + count].tolist()
        assert bool(rollout.finished[row]) == (ids[-1] == policy.end_id)
        assert policy.end_id not in ids[:-1]
        assert count == HORIZON or bool(rollout.finished[row]) or name != "ppo"
        assert rollout.texts[row].split() == policy.tokenizer.decode(ids, skip_special_tokens=True).split()
        switch, finisher = int(rollout.switch[row]), int(rollout.finisher[row])
        phase = MIXTURES[name].phases[int(rollout.phase[row])]
        assert finisher == phase.rollout
        assert rest[switch:count] == [finisher] * (count - switch)
        assert rest[:switch] == [int(phase.rollin or 0)] * switch
    assert rollout.counts["truncated_texts"] == int((~rollout.finished).sum())


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(temperature=0.7, top_k=5), Decoding(top_p=0.8)])
@pytest.mark.parametrize("minimum", [0, 3, HORIZON])
def test_log_probs_are_those_of_the_policys_tokens_and_zero_elsewhere(
    decoding: Decoding, minimum: int, policy: LanguageModel
) -> None:
    setting = writing(policy, FunctionGuide(Listener()), decoding=decoding, minimum=minimum)
    rollout = run(setting, MIXTURES["lols"])
    mine = rollout.by_policy
    rows, columns = mine.nonzero(as_tuple=True)
    with torch.no_grad():
        logits, _ = token_logits(policy, asked(rollout.ids, rows, columns))
    tokens = rollout.ids[rows, columns]
    support = rollout.support.select(rows, columns) if rollout.support else None
    assert (rollout.support is not None) == decoding.truncates
    forbidden = rollout.response_position[rows, columns] < minimum
    ends = torch.tensor(policy.end_ids)
    expected = token_log_probs(logits, tokens, decoding.temperature, support, forbidden, ends)
    torch.testing.assert_close(rollout.log_probs[mine], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.full_log_probs[mine], token_log_probs(logits, tokens), rtol=0, atol=1e-5)
    assert bool((rollout.log_probs[~mine] == 0).all())
    assert bool((rollout.full_log_probs[~mine] == 0).all())
    assert not bool((tokens[forbidden] == policy.end_id).any())
    if rollout.support is not None:
        assert torch.equal(rollout.support.counts > 0, mine)


# the switch point


def coin(index: int) -> float:
    return float(uniforms(11, Purpose.ROLLIN_COIN, index, 1)[0])


def switch_draw(index: int) -> float:
    return float(uniforms(11, Purpose.SWITCH, index, 1)[0])


def test_a_text_has_a_rollin_where_its_coin_says_so(policy: LanguageModel, model_guide: ModelGuide) -> None:
    # with this guide L is the horizon, so a policy rollin has h >= 1 and a guide rollin h = 0 only by the law
    rollout = run(writing(policy, model_guide), ppo_pp(0.5, "paper"))
    assert [switch > 0 for switch in rollout.switch.tolist()] == [coin(index) < 0.5 for index in INDICES]
    rollout = run(writing(policy, model_guide), aggrevated(0.5))
    assert [switch > 0 for switch in rollout.switch.tolist()] == [coin(index) < 0.5 for index in INDICES]
    assert {"p" in row for row in authors(rollout)} == {True, False}


@pytest.mark.parametrize("rule", ["uniform", "paper"])
def test_a_guide_rollin_switches_by_its_law_at_its_full_length(rule: Any, policy: LanguageModel) -> None:
    for count, finished, length in ((3, True, 4), (5, False, 5), (20, True, HORIZON), (0, True, 1)):
        rollout = run(writing(policy, FunctionGuide(Listener(count, finished))), ppo_pp(1.0, rule))
        expected = [draw_switch(rule, GUIDE, length, HORIZON, switch_draw(index)) for index in INDICES]
        assert rollout.switch.tolist() == expected
        assert [row.count("g") for row in authors(rollout)] == expected
        assert bool(rollout.by_policy.any(1).all())  # h < L, so the policy always writes


@pytest.mark.parametrize("rule", ["uniform", "paper", "horizon"])
def test_a_policy_rollin_switches_by_its_law_at_its_full_length(rule: Any, policy: LanguageModel) -> None:
    lengths = run(writing(policy, None), ppo()).written.sum(1).tolist()
    assert len(set(lengths)) > 3
    rollout = run(writing(policy, FunctionGuide(Listener())), aggrevated(1.0, switch=rule))
    expected = [draw_switch(rule, POLICY, length, HORIZON, switch_draw(index)) for length, index in zip(lengths, INDICES)]
    assert rollout.switch.tolist() == expected
    assert [row.count("p") for row in authors(rollout)] == expected


def test_the_policys_part_is_what_it_would_have_written_alone(policy: LanguageModel) -> None:
    alone = responses(run(writing(policy, None), ppo()))
    for rule in ("uniform", "horizon"):
        rollout = run(writing(policy, FunctionGuide(Listener())), aggrevated(1.0, switch=rule))
        for mixed, own_text, switch in zip(responses(rollout), alone, rollout.switch.tolist()):
            assert mixed[:switch] == own_text[:switch]


def test_the_horizon_rule_writes_no_token_that_is_thrown_away(policy: LanguageModel) -> None:
    rollout = run(writing(policy, FunctionGuide(Listener())), aggrevated(1.0, switch="horizon"))
    assert rollout.counts["discarded_tokens"] == 0


@pytest.mark.parametrize("algorithm", [ppo_pp(1.0), aggrevated(1.0), ppo_pp(1.0, "paper")])
def test_where_lengths_are_known_the_same_texts_come_without_discarding(
    algorithm: Algorithm, policy: LanguageModel, model_guide: ModelGuide
) -> None:
    exact = run(writing(policy, model_guide, minimum=HORIZON), algorithm)
    assert exact.counts["discarded_tokens"] == 0
    assert exact.lengths.tolist() == (exact.prompt_lengths + HORIZON).tolist()
    held = ModelGuide(model_guide.language_model, model_guide.decoding)
    held.capabilities = Capabilities(can_finish=True, exact_budget=False)
    loose = run(writing(policy, held, minimum=HORIZON), algorithm)
    assert torch.equal(loose.switch, exact.switch)
    assert torch.equal(loose.ids, exact.ids)
    assert torch.equal(loose.origin, exact.origin)
    guide_begins = algorithm.phases[0].rollin == GUIDE
    expected = sum(HORIZON - switch for switch in exact.switch.tolist()) if guide_begins else 0
    assert loose.counts["discarded_tokens"] == expected


# what a guide is asked


def test_a_text_that_the_policy_wrote_to_its_end_is_never_sent_to_the_guide(policy: LanguageModel) -> None:
    lengths = run(writing(policy, None), ppo()).written.sum(1).tolist()
    listener = Listener()
    rollout = run(writing(policy, FunctionGuide(listener)), aggrevated(1.0))
    complete = [switch == length for switch, length in zip(rollout.switch.tolist(), lengths)]
    assert any(complete)
    asked = {request.index for request in listener.requests}
    assert asked == {index for index, done in zip(INDICES, complete) if not done}
    assert rollout.counts["guide_requests"] == len(asked)
    for row, done in enumerate(complete):
        if done:
            assert not bool(rollout.after_switch[row].any())
            assert int(rollout.finisher[row]) == GUIDE


def test_a_prefix_that_ends_in_an_end_token_or_fills_the_budget_is_never_sent(policy: LanguageModel) -> None:
    listener = Listener(can_finish=True)
    for algorithm in (aggrevated(1.0), aggrevated(1.0, switch="horizon"), aggrevated(1.0, switch="paper")):
        run(writing(policy, FunctionGuide(listener)), algorithm)
        run(writing(policy, FunctionGuide(listener), minimum=HORIZON), algorithm)
    assert len(listener.requests) > 50
    for request in listener.requests:
        assert request.budget > 0
        assert not request.prefix_ids or request.prefix_ids[-1] != policy.end_id


def test_a_request_says_all_that_a_guide_needs(policy: LanguageModel) -> None:
    listener = Listener()
    rollout = run(writing(policy, FunctionGuide(listener), minimum=3), aggrevated(0.8))
    places = {index: row for row, index in enumerate(INDICES)}
    assert {bool(request.prefix_ids) for request in listener.requests} == {True, False}
    for request in listener.requests:
        row = places[request.index]
        switch = int(rollout.switch[row])
        written = [token for token, _ in responses(rollout)[row]][:switch]
        assert request.prompt is PROMPTS[row]
        assert list(request.prompt_ids) == policy.tokenizer(PROMPTS[row].text)["input_ids"]
        assert list(request.prefix_ids) == written
        whole = policy.tokenizer.decode([*request.prompt_ids, *written], skip_special_tokens=True)
        assert whole == policy.tokenizer.decode(request.prompt_ids, skip_special_tokens=True) + request.prefix
        assert request.budget == HORIZON - switch
        assert request.minimum == max(0, 3 - switch)
        assert request.seed == 11


# what a guide answers


def test_guide_text_over_the_budget_is_cut_and_counted_and_gets_no_end_token(policy: LanguageModel, word_id: int) -> None:
    rollout = run(writing(policy, FunctionGuide(Listener(count=20))), aggrevated(0.0))
    assert responses(rollout) == [[(word_id, GUIDE)] * HORIZON] * len(PROMPTS)
    assert rollout.counts["guide_texts_cut"] == len(PROMPTS)
    assert not bool(rollout.finished.any())
    assert rollout.counts["truncated_texts"] == len(PROMPTS)


def test_a_finished_text_that_fills_the_budget_has_no_room_for_an_end_token(policy: LanguageModel, word_id: int) -> None:
    rollout = run(writing(policy, FunctionGuide(Listener(count=HORIZON))), aggrevated(0.0))
    assert responses(rollout) == [[(word_id, GUIDE)] * HORIZON] * len(PROMPTS)
    assert rollout.counts["guide_texts_cut"] == 0
    assert not bool(rollout.finished.any())


def test_a_finished_text_gets_the_policys_end_token_with_the_guide_as_its_author(policy: LanguageModel, word_id: int) -> None:
    rollout = run(writing(policy, FunctionGuide(Listener(count=2))), aggrevated(0.0))
    assert responses(rollout) == [[(word_id, GUIDE)] * 2 + [(policy.end_id, GUIDE)]] * len(PROMPTS)
    assert bool(rollout.finished.all())
    assert rollout.counts["truncated_texts"] == 0


def test_an_unfinished_text_gets_no_end_token(policy: LanguageModel, word_id: int) -> None:
    rollout = run(writing(policy, FunctionGuide(Listener(count=2, finished=False))), aggrevated(0.0))
    assert responses(rollout) == [[(word_id, GUIDE)] * 2] * len(PROMPTS)
    assert not bool(rollout.finished.any())


def test_a_guide_with_nothing_to_add_writes_an_end_token_only(policy: LanguageModel) -> None:
    rollout = run(writing(policy, FunctionGuide(Listener(count=0))), aggrevated(0.0))
    assert responses(rollout) == [[(policy.end_id, GUIDE)]] * len(PROMPTS)
    assert list(rollout.texts) == [""] * len(PROMPTS)


def test_nothing_is_written_after_an_end_token_inside_a_guides_text(policy: LanguageModel) -> None:
    # '<end>' spells the policy's end token: a black box may write it, or a word that the tokenizer does not know
    for text in (f" {WORD} <end> {WORD}", "<end>", f" {WORD} unheard-of {WORD}"):
        for finished in (True, False):
            guide = FunctionGuide(lambda requests, text=text, finished=finished: [Text(text, finished) for _ in requests])
            for algorithm in (aggrevated(0.5), ppo_pp(1.0)):
                for row in responses(run(writing(policy, guide), algorithm)):
                    assert policy.end_id not in [token for token, _ in row][:-1]


def test_guide_ids_by_hand(policy: LanguageModel, word_id: int) -> None:
    end = policy.end_id
    assert guide_ids(policy, Text(f" {WORD}", finished=True), 3) == ([word_id, end], True, False)
    assert guide_ids(policy, Text(f" {WORD}", finished=True), 1) == ([word_id], False, False)
    assert guide_ids(policy, Text(f" {WORD}", finished=False), 3) == ([word_id], False, False)
    assert guide_ids(policy, Text(f" {WORD} {WORD}", finished=True), 1) == ([word_id], False, True)
    assert guide_ids(policy, Text("", finished=True), 3) == ([end], True, False)
    assert guide_ids(policy, Text("", True, ids=[7, 8, end]), 3) == ([7, 8, end], True, False)
    assert guide_ids(policy, Text("", True, ids=[7, 8, end]), 2) == ([7, 8], False, True)
    assert guide_ids(policy, Text("", False, ids=[7, 8]), 3) == ([7, 8], False, False)


def test_discarded_tokens_of_rollins_are_counted(policy: LanguageModel) -> None:
    rollout = run(writing(policy, FunctionGuide(Listener(count=3))), ppo_pp(1.0))  # L = 4, end token included
    assert rollout.counts["discarded_tokens"] == sum(4 - switch for switch in rollout.switch.tolist())
    lengths = run(writing(policy, None), ppo()).written.sum(1).tolist()
    rollout = run(writing(policy, FunctionGuide(Listener())), aggrevated(1.0))
    expected = sum(length - switch for length, switch in zip(lengths, rollout.switch.tolist()))
    assert rollout.counts["discarded_tokens"] == expected


# draws


@pytest.mark.parametrize("name", ["ppo_pp", "aggrevated", "aggrevated_horizon"])
def test_row_order_and_company_change_no_text(name: str, policy: LanguageModel, new_tiny_model: Any) -> None:
    algorithm = MIXTURES[name]
    shares = algorithm.plan(0, 0.5)[:1]  # one phase, so that the rows' phases stay as they are
    guide = ModelGuide(new_tiny_model("gpt2", seed=5, width=16, layers=1), Decoding(top_k=9))
    setting = writing(policy, guide, decoding=Decoding(top_p=0.95))
    whole = collect(setting, algorithm, shares, PROMPTS, INDICES)
    texts, lengths = responses(whole), whole.prompt_lengths
    for order in (list(reversed(range(24))), [0, 5, 23]):
        part = collect(setting, algorithm, shares, [PROMPTS[i] for i in order], [INDICES[i] for i in order])
        assert responses(part) == [texts[i] for i in order]
        assert part.switch.tolist() == whole.switch[order].tolist()
        for row, i in enumerate(order):
            start, count = int(lengths[i]), len(texts[i])
            torch.testing.assert_close(
                part.log_probs[row, start : start + count], whole.log_probs[i, start : start + count], rtol=0, atol=1e-5
            )


def test_ppo_pp_without_rollins_writes_what_ppo_writes(policy: LanguageModel, model_guide: ModelGuide) -> None:
    plain, without = run(writing(policy, None), ppo()), run(writing(policy, model_guide), ppo_pp(0.0))
    assert torch.equal(plain.ids, without.ids)
    assert torch.equal(plain.origin, without.origin)
    assert torch.equal(plain.log_probs, without.log_probs)


def test_other_seeds_indices_and_purposes_write_other_texts(policy: LanguageModel) -> None:
    first = run(writing(policy, None), ppo())
    others = [
        run(writing(policy, None, seed=12), ppo()),
        run(writing(policy, None), ppo(), indices=[index + 1 for index in INDICES]),
        run(writing(policy, None, token_purpose=Purpose.EVALUATION_TOKEN), ppo()),
    ]
    for other in others:
        assert responses(other) != responses(first)


def test_a_references_guide_draws_among_the_references(policy: LanguageModel) -> None:
    words = ["acting", "plot", "music"]
    prompt = Prompt("review of : cast =>", tuple(f" {word}" for word in words))
    prompts, indices = [prompt] * 60, list(range(60))
    rollout = run(writing(policy, ReferenceGuide()), ppo_pp(1.0, "paper"), prompts, indices)
    assert rollout.switch.tolist() == [1] * 60  # a word and an end token: {1 … L−1} = {1}
    begun = [policy.tokenizer.decode([row[0][0]]) for row in responses(rollout)]
    expected = [words[int(3 * uniforms(11, Purpose.REFERENCE, index, 1)[0])] for index in indices]
    assert begun == expected
    assert set(begun) == set(words)


# failures


def bad(answer: Any) -> Callable[[Sequence[Request]], Any]:
    return lambda requests: answer(requests)


FAILURES: dict[str, tuple[Any, str]] = {
    "too few": (lambda requests: [Text("a", True)] * (len(requests) - 1), "gave 23 texts for 24 requests"),
    "too many": (lambda requests: [Text("a", True)] * (len(requests) + 1), "gave 25 texts for 24 requests"),
    "no list": (lambda requests: None, "the guide failed on 24 requests"),
    "one text": (lambda requests: "a", "the guide failed on 24 requests"),
    "a None among them": (lambda requests: [None] * len(requests), "answered None to the prompt"),
    "a number among them": (lambda requests: [3] * len(requests), "answered 3 to the prompt"),
    "a text of None": (lambda requests: [Text(None, True)] * len(requests), "it must be a text"),  # type: ignore[arg-type]
    "nothing, unfinished": (lambda requests: [Text("", False)] * len(requests), "wrote nothing for the prompt"),
    "no ids, unfinished": (lambda requests: [Text("a", False, [])] * len(requests), "wrote nothing for the prompt"),
    "an exception": (lambda requests: 1 // 0, r"the guide failed on 24 requests \(ZeroDivisionError"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_is_not_a_text_for_each_request_is_a_run_error(name: str, policy: LanguageModel) -> None:
    answer, message = FAILURES[name]
    with pytest.raises(RunError, match=message):
        run(writing(policy, FunctionGuide(bad(answer))), aggrevated(0.0))


def test_a_prompt_without_a_reference_is_a_run_error_of_the_references_guide(policy: LanguageModel) -> None:
    with pytest.raises(RunError, match="has no reference"):
        run(writing(policy, ReferenceGuide()), ppo_pp(1.0), [Prompt("review of : plot =>")], [0])


def test_every_failure_of_a_guide_is_one_kind_of_error() -> None:
    for error in (UserError("a"), RunError("b"), ValueError("c")):

        def fail(requests: Sequence[Request], error: Exception = error) -> list[str]:
            raise error

        with pytest.raises(RunError, match=str(error)):
            ask(FunctionGuide(fail), [Request(PROMPTS[0], [1], "", [], 3, 0, 0, 0)])


def test_nothing_to_ask_asks_nothing() -> None:
    listener = Listener()
    assert ask(FunctionGuide(listener), []) == []
    assert listener.requests == []


# sharing out


def test_texts_are_split_by_fraction_and_add_up() -> None:
    halves = lols(0.5, 0.5, 0.5).plan(0, 0.0)
    assert split_texts(halves, 8) == [4, 4]
    assert sum(split_texts(halves, 7)) == 7
    thirds = [own(0, POLICY, 1 / 3), own(1, GUIDE, 2 / 3)]
    assert split_texts(thirds, 9) == [3, 6]
    assert split_texts([own(0, POLICY)], 5) == [5]


def test_each_share_writes_its_part_of_the_texts(policy: LanguageModel) -> None:
    rollout = run(writing(policy, FunctionGuide(Listener())), lols(1.0, 1.0, 0.5))
    assert rollout.phase.tolist() == [0] * 12 + [1] * 12
    assert rollout.finisher.tolist() == [POLICY] * 12 + [GUIDE] * 12


def test_an_algorithm_of_the_guide_alone_needs_no_member_of_the_family(policy: LanguageModel) -> None:
    alone = Algorithm("guide", "guide", (Phase(None, GUIDE),), always(own(0, GUIDE)), "gae", "the guide alone")
    rollout = run(writing(policy, FunctionGuide(Listener(count=1))), alone)
    assert authors(rollout) == ["gg"] * len(PROMPTS)


def test_prompts_are_taken_in_passes_each_in_an_order_of_its_own() -> None:
    prompts = [Prompt(str(i)) for i in range(5)]
    passes = [[prompt.text for prompt in choose_prompts(prompts, 0, range(5 * i, 5 * i + 5), 1)] for i in range(4)]
    assert all(sorted(texts) == ["0", "1", "2", "3", "4"] for texts in passes)
    assert len({tuple(texts) for texts in passes}) > 1
    backwards = choose_prompts(prompts, 0, range(19, -1, -1), 1)
    assert [prompt.text for prompt in backwards] == [text for texts in passes for text in texts][::-1]


def test_texts_of_one_group_share_their_prompt() -> None:
    prompts = [Prompt(str(i)) for i in range(5)]
    grouped = choose_prompts(prompts, 0, range(20), 2)
    assert grouped[0::2] == grouped[1::2] == choose_prompts(prompts, 0, range(10), 1)
