"""Rollouts: origins, switch positions, and the errors of guides."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from helpers import asked, with_fast
from rlgf.algorithms.base import Algorithm, constant_schedule, single_phase
from rlgf.algorithms.registry import aggrevated, d2lols, guided_grpo, lols, ppo, ppo_pp
from rlgf.algorithms.switch_position import Phase, sample_switch
from rlgf.errors import ConfigError, TrainingError
from rlgf.generation.decoder import LocalSampler
from rlgf.guides.base import Capabilities, Completion, CompletionRequest, Guide, query_guide
from rlgf.guides.local import FunctionGuide, ModelGuide, ReferenceGuide
from rlgf.models.forward import token_logits
from rlgf.models.language_model import LanguageModel
from rlgf.models.log_probs import token_log_probs
from rlgf.randomness import Purpose, uniforms
from rlgf.rl.rollout import RolloutConfig, allocate_rows, collect_rollout, rollin_requests, select_prompts
from rlgf.rl.tensors import Rollout
from rlgf.types import GUIDE, POLICY, Origin, Prompt, SamplingParams

HORIZON = 8
WORD = "camera"
SPOKEN = "great acting"
ASPECTS = ["acting", "plot", "music", "script", "cast", "pacing"]
PROMPTS = [Prompt(f"review of : {' '.join(ASPECTS[: 1 + i % 6])} =>", (" bold plot",)) for i in range(24)]
INDICES = [3 + 7 * i for i in range(24)]
MIXTURES = {
    "ppo": ppo().build(),
    "ppo_pp": ppo_pp(0.7).build(),
    "ppo_pp_paper": ppo_pp(1.0, "paper").build(),
    "aggrevated": aggrevated(0.8).build(),
    "aggrevated_paper": aggrevated(1.0, switch="paper").build(),
    "aggrevated_horizon": aggrevated(1.0, switch="horizon").build(),
    "lols": lols(0.7, 0.8, 0.5).build(),
    "d2lols": d2lols(0.5, 1.0, 3).build(),
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
    return force(force(language_model, [word_id], -1e6), [language_model.eos_token_id], 3.0)


@pytest.fixture(scope="module")
def model_guide(new_tiny_model: Callable[..., LanguageModel], word_id: int) -> ModelGuide:
    """A model that writes nothing but its word, until it is cut off."""
    return ModelGuide(force(new_tiny_model("gpt2", seed=2, width=16, layers=1), [word_id], 1e6), SamplingParams())


@dataclass
class Listener:
    """A guide that remembers what it was asked, and answers with `count` of its word."""

    count: int = 3
    finished: bool = True
    can_continue: bool = True
    requests: list[CompletionRequest] = field(default_factory=list[CompletionRequest])

    def __call__(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        self.requests += requests
        return [Completion(f" {WORD}" * self.count, self.finished) for _ in requests]


def rollout_config(policy: LanguageModel, guide: Guide | None, **changes: Any) -> RolloutConfig:
    return replace(
        RolloutConfig(policy, LocalSampler(policy), guide, SamplingParams(), max_new_tokens=HORIZON, min_new_tokens=0, seed=11),
        **changes,
    )


def run(
    setting: RolloutConfig,
    algorithm: Algorithm,
    prompts: Sequence[Prompt] = PROMPTS,
    indices: Sequence[int] = INDICES,
    iteration: int = 0,
) -> Rollout:
    return collect_rollout(setting, algorithm, algorithm.schedule(iteration, 0.5), prompts, indices)


def responses(rollout: Rollout) -> list[list[tuple[int, int]]]:
    """For each text its written tokens with their authors."""
    pairs = zip(rollout.ids, rollout.origin, rollout.completion_mask)
    return [list(zip(ids[written].tolist(), origin[written].tolist())) for ids, origin, written in pairs]


def authors(rollout: Rollout) -> list[str]:
    return ["".join({int(POLICY): "p", int(GUIDE): "g"}[origin] for _, origin in row) for row in responses(rollout)]


# groups


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_completions_of_a_group_continue_one_start_state(policy: LanguageModel, beta: float) -> None:
    listener = Listener()
    algorithm = guided_grpo(beta).build()
    setting = rollout_config(policy, FunctionGuide(listener))
    prompts = [prompt for prompt in PROMPTS[:4] for _ in range(4)]
    rollout = collect_rollout(setting, algorithm, algorithm.schedule(0, 0.5), prompts, range(16), 4)
    assert rollout.group.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    rows = responses(rollout)
    guided = 0
    for first in range(0, 16, 4):
        switches = rollout.switch_position[first : first + 4]
        assert len(set(switches.tolist())) == 1
        prefixes = {tuple(row[: int(switches[0])]) for row in rows[first : first + 4]}
        assert len(prefixes) == 1
        assert all(origin == GUIDE for _, origin in next(iter(prefixes)))
        guided += rollout.guide_completions[first] is not None
        assert len({*rollout.guide_completions[first : first + 4]}) == 1
    assert len({tuple(row) for row in rows}) > 8  # the policy's tokens differ within a group
    assert len(listener.requests) == guided == rollout.counters["guide_requests"]
    assert guided == 4 if beta == 1 else 0 < guided < 4
    assert [asked.index % 4 for asked in listener.requests] == [0] * guided
    ahead = rollin_requests(setting, algorithm, algorithm.schedule(0, 0.5), prompts, range(16), 4)
    assert [(asked.index, asked.prompt) for asked in ahead] == [(asked.index, asked.prompt) for asked in listener.requests]


def test_over_a_prompt_every_completion_has_its_own_start_state(policy: LanguageModel) -> None:
    listener = Listener()
    algorithm = guided_grpo(1.0, over="prompt").build()
    prompts = [PROMPTS[0]] * 8
    setting = rollout_config(policy, FunctionGuide(listener))
    rollout = collect_rollout(setting, algorithm, algorithm.schedule(0, 0.5), prompts, range(8), 8)
    assert len(listener.requests) == 8
    assert len(set(rollout.switch_position.tolist())) > 1
    same = run(setting, ppo_pp(1.0).build(), prompts, range(8))
    assert torch.equal(rollout.ids, same.ids)  # the rows of PPO++


def test_a_group_whose_guide_fails_starts_at_its_prompt(policy: LanguageModel) -> None:
    def failing(requests: Sequence[CompletionRequest]) -> list[Completion]:
        return [Completion("", finished=True, failed=True, dropped=asked.index == 0) for asked in requests]

    algorithm = guided_grpo(1.0).build()
    setting = rollout_config(policy, FunctionGuide(failing))
    rollout = collect_rollout(setting, algorithm, algorithm.schedule(0, 0.5), [PROMPTS[0]] * 8, range(8), 4)
    assert rollout.index.tolist() == [4, 5, 6, 7]
    assert not bool(rollout.by_guide.any())
    assert rollout.counters["guide_rows_substituted"] == rollout.counters["guide_rows_dropped"] == 1  # one request each


# a known word


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("kind", with_fast(["function", "unfinished function", "model"], "unfinished function"))
def test_the_guides_word_is_exactly_where_the_guide_wrote(
    name: str, kind: str, policy: LanguageModel, model_guide: ModelGuide, word_id: int
) -> None:
    guide: Guide = model_guide if kind == "model" else FunctionGuide(Listener(finished=kind == "function"))
    rollout = run(rollout_config(policy, guide), MIXTURES[name])
    of_guide = (rollout.ids == word_id) | ((rollout.ids == policy.eos_token_id) & rollout.by_guide)
    assert torch.equal(of_guide & rollout.completion_mask, rollout.by_guide)
    assert bool((rollout.ids == word_id).any()) == (name != "ppo")
    for text, row in zip(rollout.completions, responses(rollout)):
        assert text.split().count(WORD) == sum(token == word_id for token, _ in row)


@pytest.mark.parametrize("name", MIXTURES)
def test_prompts_are_untouched_and_everything_adds_up(name: str, policy: LanguageModel) -> None:
    rollout = run(rollout_config(policy, FunctionGuide(Listener())), MIXTURES[name])
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
        assert bool(rollout.ended_with_eos[row]) == (ids[-1] == policy.eos_token_id)
        assert policy.eos_token_id not in ids[:-1]
        assert count == HORIZON or bool(rollout.ended_with_eos[row]) or name != "ppo"
        assert rollout.completions[row].split() == policy.tokenizer.decode(ids, skip_special_tokens=True).split()
        switch, finisher = int(rollout.switch_position[row]), int(rollout.rollout_by[row])
        phase = MIXTURES[name].phases[int(rollout.phase[row])]
        assert finisher == phase.rollout
        assert rest[switch:count] == [finisher] * (count - switch)
        assert rest[:switch] == [int(phase.rollin or 0)] * switch
    assert rollout.counters["truncated_completions"] == int((~rollout.ended_with_eos).sum())


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(temperature=0.7, top_k=5), SamplingParams(top_p=0.8)])
@pytest.mark.parametrize("minimum", [0, 3, HORIZON])
def test_log_probs_are_those_of_the_policys_tokens_and_zero_elsewhere(
    sampling: SamplingParams, minimum: int, policy: LanguageModel
) -> None:
    setting = rollout_config(policy, FunctionGuide(Listener()), sampling=sampling, min_new_tokens=minimum)
    rollout = run(setting, MIXTURES["lols"])
    mine = rollout.by_policy
    rows, columns = mine.nonzero(as_tuple=True)
    with torch.no_grad():
        logits, _ = token_logits(policy, asked(rollout.ids, rows, columns))
    tokens = rollout.ids[rows, columns]
    support = rollout.support.select(rows, columns) if rollout.support else None
    assert (rollout.support is not None) == sampling.restricts_support
    forbidden = rollout.response_position[rows, columns] < minimum
    ends = torch.tensor(policy.eos_token_ids)
    expected = token_log_probs(logits, tokens, sampling.temperature, support, forbidden, ends)
    torch.testing.assert_close(rollout.log_probs[mine], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.full_log_probs[mine], token_log_probs(logits, tokens), rtol=0, atol=1e-5)
    assert bool((rollout.log_probs[~mine] == 0).all())
    assert bool((rollout.full_log_probs[~mine] == 0).all())
    assert not bool((tokens[forbidden] == policy.eos_token_id).any())
    if rollout.support is not None:
        assert torch.equal(rollout.support.counts > 0, mine)


# the switch point


def coin(index: int) -> float:
    return float(uniforms(11, Purpose.ROLLIN, index, 1)[0])


def switch_draw(index: int) -> float:
    return float(uniforms(11, Purpose.SWITCH, index, 1)[0])


def test_a_text_has_a_rollin_where_its_coin_says_so(policy: LanguageModel, model_guide: ModelGuide) -> None:
    # with this guide L is the horizon, so a policy rollin has h >= 1 and a guide rollin h = 0 only by the law
    rollout = run(rollout_config(policy, model_guide), ppo_pp(0.5, "paper").build())
    assert [switch > 0 for switch in rollout.switch_position.tolist()] == [coin(index) < 0.5 for index in INDICES]
    rollout = run(rollout_config(policy, model_guide), aggrevated(0.5).build())
    assert [switch > 0 for switch in rollout.switch_position.tolist()] == [coin(index) < 0.5 for index in INDICES]
    assert {"p" in row for row in authors(rollout)} == {True, False}


@pytest.mark.parametrize("rule", ["uniform", "paper"])
def test_a_guide_rollin_switches_by_its_law_at_its_full_length(rule: Any, policy: LanguageModel) -> None:
    for count, finished, length in ((3, True, 4), (5, False, 5), (20, True, HORIZON), (0, True, 1)):
        rollout = run(rollout_config(policy, FunctionGuide(Listener(count, finished))), ppo_pp(1.0, rule).build())
        expected = [sample_switch(rule, GUIDE, length, HORIZON, switch_draw(index)) for index in INDICES]
        assert rollout.switch_position.tolist() == expected
        assert [row.count("g") for row in authors(rollout)] == expected
        assert bool(rollout.by_policy.any(1).all())  # h < L, so the policy always writes


@pytest.mark.parametrize("rule", ["uniform", "paper", "horizon"])
def test_a_policy_rollin_switches_by_its_law_at_its_full_length(rule: Any, policy: LanguageModel) -> None:
    lengths = run(rollout_config(policy, None), ppo().build()).completion_mask.sum(1).tolist()
    assert len(set(lengths)) > 3
    rollout = run(rollout_config(policy, FunctionGuide(Listener())), aggrevated(1.0, switch=rule).build())
    expected = [sample_switch(rule, POLICY, length, HORIZON, switch_draw(index)) for length, index in zip(lengths, INDICES)]
    assert rollout.switch_position.tolist() == expected
    assert [row.count("p") for row in authors(rollout)] == expected


def test_the_policys_part_is_what_it_would_have_written_alone(policy: LanguageModel) -> None:
    alone = responses(run(rollout_config(policy, None), ppo().build()))
    for rule in ("uniform", "horizon"):
        rollout = run(rollout_config(policy, FunctionGuide(Listener())), aggrevated(1.0, switch=rule).build())
        for mixed, own_text, switch in zip(responses(rollout), alone, rollout.switch_position.tolist()):
            assert mixed[:switch] == own_text[:switch]


def test_the_horizon_rule_writes_no_token_that_is_thrown_away(policy: LanguageModel) -> None:
    rollout = run(rollout_config(policy, FunctionGuide(Listener())), aggrevated(1.0, switch="horizon").build())
    assert rollout.counters["discarded_tokens"] == 0


@pytest.mark.parametrize("algorithm", [ppo_pp(1.0).build(), aggrevated(1.0).build(), ppo_pp(1.0, "paper").build()])
def test_where_lengths_are_known_the_same_texts_come_without_discarding(
    algorithm: Algorithm, policy: LanguageModel, model_guide: ModelGuide
) -> None:
    exact = run(rollout_config(policy, model_guide, min_new_tokens=HORIZON), algorithm)
    assert exact.counters["discarded_tokens"] == 0
    assert exact.lengths.tolist() == (exact.prompt_lengths + HORIZON).tolist()
    held = ModelGuide(model_guide.language_model, model_guide.sampling)
    held.capabilities = Capabilities(can_continue=True, exact_length=False)
    loose = run(rollout_config(policy, held, min_new_tokens=HORIZON), algorithm)
    assert torch.equal(loose.switch_position, exact.switch_position)
    assert torch.equal(loose.ids, exact.ids)
    assert torch.equal(loose.origin, exact.origin)
    guide_begins = algorithm.phases[0].rollin == GUIDE
    expected = sum(HORIZON - switch for switch in exact.switch_position.tolist()) if guide_begins else 0
    assert loose.counters["discarded_tokens"] == expected


# what a guide is asked


def test_a_text_that_the_policy_wrote_to_its_end_is_never_sent_to_the_guide(policy: LanguageModel) -> None:
    lengths = run(rollout_config(policy, None), ppo().build()).completion_mask.sum(1).tolist()
    listener = Listener()
    rollout = run(rollout_config(policy, FunctionGuide(listener)), aggrevated(1.0).build())
    complete = [switch == length for switch, length in zip(rollout.switch_position.tolist(), lengths)]
    assert any(complete)
    asked = {request.index for request in listener.requests}
    assert asked == {index for index, done in zip(INDICES, complete) if not done}
    assert rollout.counters["guide_requests"] == len(asked)
    for row, done in enumerate(complete):
        if done:
            assert not bool(rollout.after_switch[row].any())
            assert int(rollout.rollout_by[row]) == GUIDE


def test_a_prefix_that_ends_in_an_end_token_or_fills_the_budget_is_never_sent(policy: LanguageModel) -> None:
    listener = Listener(can_continue=True)
    for algorithm in (
        aggrevated(1.0).build(),
        aggrevated(1.0, switch="horizon").build(),
        aggrevated(1.0, switch="paper").build(),
    ):
        run(rollout_config(policy, FunctionGuide(listener)), algorithm)
        run(rollout_config(policy, FunctionGuide(listener), min_new_tokens=HORIZON), algorithm)
    assert len(listener.requests) > 50
    for request in listener.requests:
        assert request.max_new_tokens > 0
        assert not request.prefix_ids or request.prefix_ids[-1] != policy.eos_token_id


def test_a_request_says_all_that_a_guide_needs(policy: LanguageModel) -> None:
    listener = Listener()
    rollout = run(rollout_config(policy, FunctionGuide(listener), min_new_tokens=3), aggrevated(0.8).build())
    places = {index: row for row, index in enumerate(INDICES)}
    assert {bool(request.prefix_ids) for request in listener.requests} == {True, False}
    for request in listener.requests:
        row = places[request.index]
        switch = int(rollout.switch_position[row])
        written = [token for token, _ in responses(rollout)[row]][:switch]
        assert request.prompt is PROMPTS[row]
        assert list(request.prompt_ids) == policy.tokenizer(PROMPTS[row].text)["input_ids"]
        assert list(request.prefix_ids) == written
        whole = policy.tokenizer.decode([*request.prompt_ids, *written], skip_special_tokens=True)
        assert whole == policy.tokenizer.decode(request.prompt_ids, skip_special_tokens=True) + request.prefix
        assert request.max_new_tokens == HORIZON - switch
        assert request.min_new_tokens == max(0, 3 - switch)
        assert request.seed == 11


# what a guide answers


def test_guide_text_over_the_budget_is_cut_and_counted_and_gets_no_end_token(policy: LanguageModel, word_id: int) -> None:
    rollout = run(rollout_config(policy, FunctionGuide(Listener(count=20))), aggrevated(0.0).build())
    assert responses(rollout) == [[(word_id, GUIDE)] * HORIZON] * len(PROMPTS)
    assert rollout.counters["guide_completions_truncated"] == len(PROMPTS)
    assert not bool(rollout.ended_with_eos.any())
    assert rollout.counters["truncated_completions"] == len(PROMPTS)


def test_a_finished_text_that_fills_the_budget_has_no_room_for_an_end_token(policy: LanguageModel, word_id: int) -> None:
    rollout = run(rollout_config(policy, FunctionGuide(Listener(count=HORIZON))), aggrevated(0.0).build())
    assert responses(rollout) == [[(word_id, GUIDE)] * HORIZON] * len(PROMPTS)
    assert rollout.counters["guide_completions_truncated"] == 0
    assert not bool(rollout.ended_with_eos.any())


def test_a_finished_text_gets_the_policys_end_token_with_the_guide_as_its_author(policy: LanguageModel, word_id: int) -> None:
    rollout = run(rollout_config(policy, FunctionGuide(Listener(count=2))), aggrevated(0.0).build())
    assert responses(rollout) == [[(word_id, GUIDE)] * 2 + [(policy.eos_token_id, GUIDE)]] * len(PROMPTS)
    assert bool(rollout.ended_with_eos.all())
    assert rollout.counters["truncated_completions"] == 0


def test_an_unfinished_text_gets_no_end_token(policy: LanguageModel, word_id: int) -> None:
    rollout = run(rollout_config(policy, FunctionGuide(Listener(count=2, finished=False))), aggrevated(0.0).build())
    assert responses(rollout) == [[(word_id, GUIDE)] * 2] * len(PROMPTS)
    assert not bool(rollout.ended_with_eos.any())


def test_a_guide_with_nothing_to_add_writes_an_end_token_only(policy: LanguageModel) -> None:
    rollout = run(rollout_config(policy, FunctionGuide(Listener(count=0))), aggrevated(0.0).build())
    assert responses(rollout) == [[(policy.eos_token_id, GUIDE)]] * len(PROMPTS)
    assert list(rollout.completions) == [""] * len(PROMPTS)


def test_nothing_is_written_after_an_end_token_inside_a_guides_text(policy: LanguageModel) -> None:
    # '<end>' spells the policy's end token: a black box may write it, or a word that the tokenizer does not know
    for text in (f" {WORD} <end> {WORD}", "<end>", f" {WORD} unheard-of {WORD}"):
        for finished in (True, False):
            guide = FunctionGuide(lambda requests, text=text, finished=finished: [Completion(text, finished) for _ in requests])
            for algorithm in (aggrevated(0.5).build(), ppo_pp(1.0).build()):
                for row in responses(run(rollout_config(policy, guide), algorithm)):
                    assert policy.eos_token_id not in [token for token, _ in row][:-1]


def test_discarded_tokens_of_rollins_are_counted(policy: LanguageModel) -> None:
    rollout = run(rollout_config(policy, FunctionGuide(Listener(count=3))), ppo_pp(1.0).build())  # L = 4, end token included
    assert rollout.counters["discarded_tokens"] == sum(4 - switch for switch in rollout.switch_position.tolist())
    lengths = run(rollout_config(policy, None), ppo().build()).completion_mask.sum(1).tolist()
    rollout = run(rollout_config(policy, FunctionGuide(Listener())), aggrevated(1.0).build())
    expected = sum(length - switch for length, switch in zip(lengths, rollout.switch_position.tolist()))
    assert rollout.counters["discarded_tokens"] == expected


# draws


@pytest.mark.parametrize("name", ["ppo_pp", "aggrevated", "aggrevated_horizon"])
def test_row_order_and_company_change_no_text(name: str, policy: LanguageModel, new_tiny_model: Any) -> None:
    algorithm = MIXTURES[name]
    shares = algorithm.schedule(0, 0.5)[:1]  # one phase, so that the rows' phases stay as they are
    guide = ModelGuide(new_tiny_model("gpt2", seed=5, width=16, layers=1), SamplingParams(top_k=9))
    setting = rollout_config(policy, guide, sampling=SamplingParams(top_p=0.95))
    whole = collect_rollout(setting, algorithm, shares, PROMPTS, INDICES)
    texts, lengths = responses(whole), whole.prompt_lengths
    for order in (list(reversed(range(24))), [0, 5, 23]):
        part = collect_rollout(setting, algorithm, shares, [PROMPTS[i] for i in order], [INDICES[i] for i in order])
        assert responses(part) == [texts[i] for i in order]
        assert part.switch_position.tolist() == whole.switch_position[order].tolist()
        for row, i in enumerate(order):
            start, count = int(lengths[i]), len(texts[i])
            torch.testing.assert_close(
                part.log_probs[row, start : start + count], whole.log_probs[i, start : start + count], rtol=0, atol=1e-5
            )


def test_ppo_pp_without_rollins_writes_what_ppo_writes(policy: LanguageModel, model_guide: ModelGuide) -> None:
    plain, without = (
        run(rollout_config(policy, None), ppo().build()),
        run(rollout_config(policy, model_guide), ppo_pp(0.0).build()),
    )
    assert torch.equal(plain.ids, without.ids)
    assert torch.equal(plain.origin, without.origin)
    assert torch.equal(plain.log_probs, without.log_probs)


def test_other_seeds_indices_and_purposes_write_other_texts(policy: LanguageModel) -> None:
    first = run(rollout_config(policy, None), ppo().build())
    others = [
        run(rollout_config(policy, None, seed=12), ppo().build()),
        run(rollout_config(policy, None), ppo().build(), indices=[index + 1 for index in INDICES]),
        run(rollout_config(policy, None, token_purpose=Purpose.EVALUATION_TOKEN), ppo().build()),
    ]
    for other in others:
        assert responses(other) != responses(first)


def test_a_references_guide_draws_among_the_references(policy: LanguageModel) -> None:
    words = ["acting", "plot", "music"]
    prompt = Prompt("review of : cast =>", tuple(f" {word}" for word in words))
    prompts, indices = [prompt] * 60, list(range(60))
    rollout = run(rollout_config(policy, ReferenceGuide()), ppo_pp(1.0, "paper").build(), prompts, indices)
    assert rollout.switch_position.tolist() == [1] * 60  # a word and an end token: {1 … L−1} = {1}
    begun = [policy.tokenizer.decode([row[0][0]]) for row in responses(rollout)]
    expected = [words[int(3 * uniforms(11, Purpose.REFERENCE, index, 1)[0])] for index in indices]
    assert begun == expected
    assert set(begun) == set(words)


# failures


def bad(answer: Any) -> Callable[[Sequence[CompletionRequest]], Any]:
    return lambda requests: answer(requests)


FAILURES: dict[str, tuple[Any, str]] = {
    "too few": (lambda requests: [Completion("a", True)] * (len(requests) - 1), "returned 23 completions for 24 requests"),
    "too many": (lambda requests: [Completion("a", True)] * (len(requests) + 1), "returned 25 completions for 24 requests"),
    "no list": (lambda requests: None, "the guide failed on 24 requests"),
    "one text": (lambda requests: "a", "the guide failed on 24 requests"),
    "a None among them": (lambda requests: [None] * len(requests), "returned None for the prompt"),
    "a number among them": (lambda requests: [3] * len(requests), "returned 3 for the prompt"),
    "a text of None": (lambda requests: [Completion(None, True)] * len(requests), "it must return a string"),  # type: ignore[arg-type]
    "nothing, unfinished": (lambda requests: [Completion("", False)] * len(requests), "generated nothing for the prompt"),
    "no ids, unfinished": (lambda requests: [Completion("a", False, [])] * len(requests), "generated nothing for the prompt"),
    "an exception": (lambda requests: 1 // 0, r"the guide failed on 24 requests \(ZeroDivisionError"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_is_not_a_text_for_each_request_is_a_run_error(name: str, policy: LanguageModel) -> None:
    answer, message = FAILURES[name]
    with pytest.raises(TrainingError, match=message):
        run(rollout_config(policy, FunctionGuide(bad(answer))), aggrevated(0.0).build())


def test_a_prompt_without_a_reference_is_a_run_error_of_the_references_guide(policy: LanguageModel) -> None:
    with pytest.raises(TrainingError, match="has no reference"):
        run(rollout_config(policy, ReferenceGuide()), ppo_pp(1.0).build(), [Prompt("review of : plot =>")], [0])


def test_every_failure_of_a_guide_is_one_kind_of_error() -> None:
    for error in (ConfigError("a"), TrainingError("b"), ValueError("c")):

        def fail(requests: Sequence[CompletionRequest], error: Exception = error) -> list[str]:
            raise error

        with pytest.raises(TrainingError, match=str(error)):
            query_guide(FunctionGuide(fail), [CompletionRequest(PROMPTS[0], [1], "", [], 3, 0, 0, 0)])


def test_nothing_to_ask_asks_nothing() -> None:
    listener = Listener()
    assert query_guide(FunctionGuide(listener), []) == []
    assert listener.requests == []


# sharing out


def test_texts_are_split_by_fraction_and_add_up() -> None:
    halves = lols(0.5, 0.5, 0.5).build().schedule(0, 0.0)
    assert allocate_rows(halves, 8) == [4, 4]
    assert sum(allocate_rows(halves, 7)) == 7
    thirds = [single_phase(0, POLICY, 1 / 3), single_phase(1, GUIDE, 2 / 3)]
    assert allocate_rows(thirds, 9) == [3, 6]
    assert allocate_rows([single_phase(0, POLICY)], 5) == [5]


def test_each_share_writes_its_part_of_the_texts(policy: LanguageModel) -> None:
    rollout = run(rollout_config(policy, FunctionGuide(Listener())), lols(1.0, 1.0, 0.5).build())
    assert rollout.phase.tolist() == [0] * 12 + [1] * 12
    assert rollout.rollout_by.tolist() == [POLICY] * 12 + [GUIDE] * 12


def test_an_algorithm_of_the_guide_alone_needs_no_member_of_the_family(policy: LanguageModel) -> None:
    alone = Algorithm(
        "guide", "guide", (Phase(None, GUIDE),), constant_schedule(single_phase(0, GUIDE)), "gae", "the guide alone"
    )
    rollout = run(rollout_config(policy, FunctionGuide(Listener(count=1))), alone)
    assert authors(rollout) == ["gg"] * len(PROMPTS)


def test_prompts_are_taken_in_passes_each_in_an_order_of_its_own() -> None:
    prompts = [Prompt(str(i)) for i in range(5)]
    passes = [[prompt.text for prompt in select_prompts(prompts, 0, range(5 * i, 5 * i + 5), 1)] for i in range(4)]
    assert all(sorted(texts) == ["0", "1", "2", "3", "4"] for texts in passes)
    assert len({tuple(texts) for texts in passes}) > 1
    backwards = select_prompts(prompts, 0, range(19, -1, -1), 1)
    assert [prompt.text for prompt in backwards] == [text for texts in passes for text in texts][::-1]


def test_texts_of_one_group_share_their_prompt() -> None:
    prompts = [Prompt(str(i)) for i in range(5)]
    grouped = select_prompts(prompts, 0, range(20), 2)
    assert grouped[0::2] == grouped[1::2] == select_prompts(prompts, 0, range(10), 1)
