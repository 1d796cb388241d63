"""Guides with other tokenizers: text completions, characters of several tokens, a guide model."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import chi_square_p_value, with_fast
from rlgf.algorithms.registry import aggrevated, ppo, ppo_pp
from rlgf.algorithms.switch_position import sample_switch
from rlgf.config.loading import override
from rlgf.config.recipes import quickstart
from rlgf.config.sections import ModelConfig
from rlgf.config.specs import parse_guide
from rlgf.data.files import read_complete_lines
from rlgf.data.tokenization import (
    Codec,
    complete_utf8_prefix,
    decode,
    decode_continuations,
    encode_continuation,
)
from rlgf.errors import ConfigError, TrainingError
from rlgf.generation.decoder import LocalSampler
from rlgf.guides.base import Completion, CompletionRequest, Guide, query_guide
from rlgf.guides.local import FunctionGuide, ModelGuide, TextModelGuide, guide_model_path
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import new_language_model
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.run import train
from rlgf.pipeline.stages import train_tokenizer
from rlgf.randomness import Purpose, uniforms
from rlgf.rl.rollout import RolloutConfig, collect_rollout
from rlgf.rl.tensors import Rollout
from rlgf.runs.recorder import rollout_rows
from rlgf.types import GUIDE, POLICY, Prompt, SamplingParams
from rlgf.untrusted_text import replace_surrogates

HORIZON = 12
CORPUS = ["the plot is a bore", "a great cast and a great plot", "what a film, the cast is great"]
PARTY = "\U0001f389"
PROMPTS = [Prompt(f"review {i}: the plot") for i in range(24)]
INDICES = [5 + 3 * i for i in range(24)]


@pytest.fixture(scope="module")
def byte_tokenizer() -> Any:
    return train_tokenizer(CORPUS, 300)


def byte_ids(tokenizer: Any, text: str) -> list[int]:
    """One token for each byte."""
    letters = [tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(letter)[0][0] for letter in text]
    return [tokenizer.convert_tokens_to_ids(byte) for spelt in letters for byte in spelt]


def model_of(tokenizer: Any, seed: int, context: int = 64) -> LanguageModel:
    shape = ModelConfig(layers=1, width=16, heads=2, max_length=context, init_std=0.3)
    made = new_language_model(shape, tokenizer, seed)
    made.model.requires_grad_(False)
    return made


def forced(language_model: LanguageModel, ids: Sequence[int]) -> LanguageModel:
    """Let it write only these tokens."""

    def shift(module: Any, arguments: Any, output: Any) -> Any:
        shifted = output.clone()
        shifted[..., list(ids)] += 1e6
        return shifted

    language_model.model.get_output_embeddings().register_forward_hook(shift)
    return language_model


@pytest.fixture(scope="module")
def policy(byte_tokenizer: Any) -> LanguageModel:
    return model_of(byte_tokenizer, seed=1)


@pytest.fixture(scope="module")
def byte_policy(byte_tokenizer: Any) -> LanguageModel:
    """A policy that writes nothing but the four bytes of an emoji, in any order: characters, beginnings, and garbage."""
    return forced(model_of(byte_tokenizer, seed=2), byte_ids(byte_tokenizer, PARTY))


def says(text: str, finished: bool = True) -> FunctionGuide:
    return FunctionGuide(lambda requests: [Completion(text, finished) for _ in requests])


def rollout_config(policy: LanguageModel, guide: Guide | None, **changes: Any) -> RolloutConfig:
    return replace(
        RolloutConfig(policy, LocalSampler(policy), guide, SamplingParams(), max_new_tokens=HORIZON, min_new_tokens=0, seed=11),
        **changes,
    )


def run(setting: RolloutConfig, algorithm: Any) -> Rollout:
    return collect_rollout(setting, algorithm, algorithm.schedule(0, 0.5), PROMPTS, INDICES)


def response(rollout: Rollout, row: int) -> list[int]:
    return rollout.ids[row, int(rollout.prompt_lengths[row]) : int(rollout.lengths[row])].tolist()


# characters


def test_a_text_is_kept_to_its_last_whole_character(byte_tokenizer: Any) -> None:
    word, party = encode_continuation(byte_tokenizer, " plot"), byte_ids(byte_tokenizer, PARTY)
    assert len(party) == 4
    for more in range(4):
        assert complete_utf8_prefix(byte_tokenizer, [*word, *party[:more]]) == len(word)
        assert complete_utf8_prefix(byte_tokenizer, party[:more]) == 0
    assert complete_utf8_prefix(byte_tokenizer, [*word, *party]) == len(word) + 4
    assert complete_utf8_prefix(byte_tokenizer, [*word, *party, byte_tokenizer.eos_token_id]) == len(word) + 5
    assert complete_utf8_prefix(byte_tokenizer, []) == 0


def test_bytes_that_never_become_a_character_stay(byte_tokenizer: Any) -> None:
    first, second, third, last = byte_ids(byte_tokenizer, PARTY)
    word = encode_continuation(byte_tokenizer, "plot")
    for garbage in ([last], [second, third, last], [first, last, *word], [first, second, first, second, third, last]):
        assert complete_utf8_prefix(byte_tokenizer, garbage) == len(garbage)
    # the last byte alone begins nothing, and what the first began is broken off by it
    assert complete_utf8_prefix(byte_tokenizer, [last, first]) == 1
    assert complete_utf8_prefix(byte_tokenizer, [last, first, second, third]) == 1


def test_a_token_that_ends_inside_a_character_is_given_up_whole(byte_tokenizer: Any) -> None:
    tokenizer = train_tokenizer([f" {chr(0x1F380 + i)}" for i in range(64)] * 4, 262)
    merged = encode_continuation(tokenizer, f"a {PARTY}")
    assert len(merged) < 6  # the space and the first bytes are one token
    for length in range(2, len(merged)):
        assert complete_utf8_prefix(tokenizer, merged[:length]) == 1


def test_a_tokenizer_of_words_has_no_parts_of_characters(word_tokenizer: Any) -> None:
    ids = word_tokenizer("great plot")["input_ids"]
    assert complete_utf8_prefix(word_tokenizer, ids) == len(ids)


@pytest.mark.parametrize("rule", ["uniform", "paper", "horizon"])
@pytest.mark.parametrize("minimum", [0, HORIZON])
def test_a_switch_inside_a_character_of_the_policy_moves_back(rule: Any, minimum: int, byte_policy: LanguageModel) -> None:
    heard: list[CompletionRequest] = []

    def guide(requests: Sequence[CompletionRequest]) -> list[Completion]:
        heard.extend(requests)
        return [Completion(" great", True) for _ in requests]

    tokenizer = byte_policy.tokenizer
    alone = run(rollout_config(byte_policy, None, min_new_tokens=minimum), ppo().build())
    rollout = run(
        rollout_config(byte_policy, FunctionGuide(guide), min_new_tokens=minimum), aggrevated(1.0, switch=rule).build()
    )
    moved, discarded = 0, 0
    for row, index in enumerate(INDICES):
        whole = response(alone, row)
        draw = float(uniforms(11, Purpose.SWITCH, index, 1)[0])
        drawn = sample_switch(rule, POLICY, len(whole), HORIZON, draw)
        expected = drawn if drawn == HORIZON else complete_utf8_prefix(tokenizer, whole[:drawn])
        assert int(rollout.switch_position[row]) == expected
        assert response(rollout, row)[:expected] == whole[:expected]  # the policy's own ids are never altered
        assert int((rollout.by_policy[row]).sum()) == expected
        moved += expected < drawn
        # planned switches write the drawn part only
        planned = rule == "horizon" or minimum == HORIZON
        discarded += (drawn if planned else len(whole)) - expected
    assert moved > 3
    assert rollout.counters["switches_moved"] == moved
    assert rollout.counters["discarded_tokens"] == discarded
    for request in heard:
        assert complete_utf8_prefix(tokenizer, list(request.prefix_ids)) == len(request.prefix_ids)
        assert request.max_new_tokens == HORIZON - len(request.prefix_ids)


@pytest.mark.parametrize("rule", ["uniform", "paper"])
def test_a_switch_inside_a_character_of_the_guide_moves_back(rule: Any, policy: LanguageModel) -> None:
    text = f" great {PARTY}{PARTY} plot"
    ids = encode_continuation(policy.tokenizer, text)[:HORIZON]
    rollout = run(rollout_config(policy, says(text)), ppo_pp(1.0, rule).build())
    switches = set(rollout.switch_position.tolist())
    assert switches <= {length for length in range(HORIZON) if complete_utf8_prefix(policy.tokenizer, ids[:length]) == length}
    assert rollout.counters["switches_moved"] > 0
    for row, switch in enumerate(rollout.switch_position.tolist()):
        assert response(rollout, row)[:switch] == ids[:switch]
        assert "\ufffd" not in decode(policy.tokenizer, response(rollout, row)[:switch])
        assert int(rollout.by_guide[row].sum()) == switch


LAW = [
    (ppo_pp(1.0), range(HORIZON)), (ppo_pp(1.0, "paper"), range(1, HORIZON)), (aggrevated(1.0), range(1, HORIZON + 1)),
    (aggrevated(1.0, switch="horizon"), range(1, HORIZON + 1)),
]  # fmt: skip


def continues_ids(language_model: LanguageModel) -> FunctionGuide:
    """A function that continues ids with ids, as a server driven by token ids does."""
    model = ModelGuide(language_model, SamplingParams())

    def complete(requests: Sequence[CompletionRequest]) -> list[Completion]:
        return model.complete(requests)

    complete.takes_token_ids = True  # type: ignore[attr-defined]
    return FunctionGuide(complete)


@pytest.mark.parametrize("law", with_fast(LAW, LAW[1], LAW[2]))
def test_the_switch_of_a_guide_by_token_ids_has_its_law_inside_characters_too(
    law: tuple[Any, range], byte_policy: LanguageModel
) -> None:
    options, positions = law
    rows, algorithm = range(25 * HORIZON), options.build()
    is_function = algorithm.name == "ppo_pp" and 0 in positions
    guide = continues_ids(byte_policy) if is_function else ModelGuide(byte_policy, SamplingParams())
    setting = rollout_config(byte_policy, guide, min_new_tokens=HORIZON)
    rollout = collect_rollout(setting, algorithm, algorithm.schedule(0, 0.5), [PROMPTS[0]] * len(rows), rows)
    switches = rollout.switch_position.tolist()
    assert rollout.counters["switches_moved"] == 0
    assert set(switches) == set(positions)
    assert chi_square_p_value([switches.count(position) for position in positions]) > 0.01
    inside = [complete_utf8_prefix(byte_policy.tokenizer, response(rollout, row)[:h]) < h for row, h in enumerate(switches)]
    assert sum(inside) > len(rows) / 4  # otherwise this shows nothing


def test_every_position_of_a_text_with_letters_of_two_bytes_is_trained(byte_tokenizer: Any) -> None:
    first, second = byte_ids(byte_tokenizer, "\u00e9")
    policy = model_of(byte_tokenizer, seed=2)
    letters = FunctionGuide(lambda requests: [Completion("", True, [first, second] * (HORIZON // 2)) for _ in requests])
    letters.capabilities = replace(letters.capabilities, takes_token_ids=True)
    algorithm, rows = ppo_pp(1.0).build(), range(20 * HORIZON)
    setting = rollout_config(policy, letters)
    rollout = collect_rollout(setting, algorithm, algorithm.schedule(0, 0.5), [PROMPTS[0]] * len(rows), rows)
    start = int(rollout.prompt_lengths[0])
    begun_by_policy = torch.bincount(rollout.switch_position, minlength=HORIZON)
    assert int(begun_by_policy.min()) > 0  # the second byte of a letter as often as the first
    assert bool(rollout.by_policy[:, start : start + HORIZON].any(0).all())


def test_a_guide_that_writes_text_is_asked_for_all_of_it_whatever_the_switch(policy: LanguageModel) -> None:
    budgets: list[int] = []

    def guide(requests: Sequence[CompletionRequest]) -> list[Completion]:
        budgets.extend(request.max_new_tokens for request in requests)
        return [Completion(" a great plot", True) for _ in requests]

    rollout = run(rollout_config(policy, FunctionGuide(guide), min_new_tokens=HORIZON), ppo_pp(1.0).build())
    assert budgets == [HORIZON] * len(PROMPTS)
    assert rollout.counters["guide_completions_truncated"] == 0
    assert set(rollout.guide_completions) == {" a great plot"}


# what is kept


def test_the_guides_text_becomes_ids_once_and_is_never_read_again(policy: LanguageModel) -> None:
    # cut inside a word, its decoded text would be encoded with other tokens than it has
    text = "what a great"
    ids = encode_continuation(policy.tokenizer, text)
    cuts = [n for n in range(len(ids)) if encode_continuation(policy.tokenizer, decode(policy.tokenizer, ids[:n])) != ids[:n]]
    rollout = run(rollout_config(policy, says(text)), ppo_pp(1.0).build())
    assert len({*rollout.switch_position.tolist()}) > 3
    for row, switch in enumerate(rollout.switch_position.tolist()):
        assert response(rollout, row)[:switch] == ids[:switch]
    begun = run(rollout_config(policy, says(text)), aggrevated(1.0).build())
    alone = run(rollout_config(policy, None), ppo().build())
    changed = 0
    for row, switch in enumerate(begun.switch_position.tolist()):
        prefix = response(alone, row)[:switch]
        changed += encode_continuation(policy.tokenizer, decode(policy.tokenizer, prefix)) != prefix
        assert response(begun, row)[:switch] == prefix
        if not bool(begun.ended_with_eos[row]) or GUIDE in begun.origin[row]:
            assert response(begun, row)[switch:] == [*ids, policy.eos_token_id][: HORIZON - switch]
    assert changed + len(cuts) > 0  # otherwise this shows nothing


def test_what_a_tokenizer_cannot_write_is_kept_and_counted(word_tokenizer: Any) -> None:
    policy = model_of(word_tokenizer, seed=1)
    prompts = [Prompt("review of : plot =>")] * 3
    texts = iter([" great acting", f" great {PARTY}", " great\nplot"])
    guide = FunctionGuide(lambda requests: [Completion(next(texts), True) for _ in requests])
    algorithm = aggrevated(0.0).build()
    rollout = collect_rollout(rollout_config(policy, guide), algorithm, algorithm.schedule(0, 0.5), prompts, [0, 1, 2])
    assert rollout.counters["guide_completions_changed"] == 2
    assert list(rollout.guide_completions) == [" great acting", f" great {PARTY}", " great\nplot"]
    assert rollout.completions[0] == " great acting"
    rows = rollout_rows(rollout, [0.0] * 3, 0, policy.codec)
    assert [row["guide_completion"] for row in rows] == list(rollout.guide_completions)
    assert [row["text"] for row in rows] == list(rollout.completions)


def test_a_cut_text_is_not_a_changed_one(policy: LanguageModel) -> None:
    rollout = run(rollout_config(policy, says(" a great plot" * 10)), aggrevated(0.0).build())
    assert rollout.counters["guide_completions_truncated"] == len(PROMPTS)
    assert rollout.counters["guide_completions_changed"] == 0
    assert not bool(rollout.ended_with_eos.any())
    assert policy.eos_token_id not in rollout.ids[rollout.by_guide].tolist()


def test_no_guide_text_where_no_guide_wrote_text(policy: LanguageModel) -> None:
    assert list(run(rollout_config(policy, None), ppo().build()).guide_completions) == [None] * len(PROMPTS)
    spoken = run(rollout_config(policy, ModelGuide(policy, SamplingParams())), aggrevated(0.5).build())
    assert list(spoken.guide_completions) == [None] * len(PROMPTS)
    assert spoken.counters["guide_completions_changed"] == 0
    some = run(rollout_config(policy, says(" great")), ppo_pp(0.5).build())
    asked = [float(uniforms(11, Purpose.ROLLIN, index, 1)[0]) < 0.5 for index in INDICES]
    assert [text is not None for text in some.guide_completions] == asked


def test_half_a_surrogate_pair_is_written_as_unknown(policy: LanguageModel) -> None:
    assert replace_surrogates("a \ud83c b") == "a \ufffd b"
    assert replace_surrogates("\ud83c\udf89") == PARTY
    assert replace_surrogates(f"\ufeffé{PARTY}") == f"\ufeffé{PARTY}"
    rollout = run(rollout_config(policy, says(" a \ud83c")), aggrevated(0.0).build())
    assert rollout.counters["guide_completions_changed"] == len(PROMPTS)
    assert set(rollout.guide_completions) == {" a \ufffd"}


def test_a_tokenizer_that_closes_every_text_leaves_prompts_open(byte_tokenizer: Any) -> None:
    from tokenizers import processors

    closing = train_tokenizer(CORPUS, 300)
    end = (closing.eos_token, closing.eos_token_id)
    closing.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{end[0]} $A {end[0]}", special_tokens=[end]
    )
    assert closing("a")["input_ids"][-1] == closing.eos_token_id
    ids = [closing.eos_token_id, *byte_tokenizer("the plot")["input_ids"]]
    assert Codec(closing).prompt(Prompt("the plot")) == ids
    assert Codec(closing).prompts([Prompt("the plot"), Prompt("", ids=(3,)), Prompt("")]) == [ids, [3], []]


# a model with a tokenizer of its own


def request(prompt: str = "review of : plot =>", prefix: str = "", index: int = 0, **changes: Any) -> CompletionRequest:
    made = CompletionRequest(Prompt(prompt), [3, 4, 5, 6, 7], prefix, [8] * len(prefix.split()), 4, 0, index, 7)
    return replace(made, **changes)


@pytest.fixture(scope="module")
def text_guide(byte_tokenizer: Any) -> TextModelGuide:
    return TextModelGuide(model_of(byte_tokenizer, seed=3), SamplingParams(top_k=20))


def test_a_model_of_another_tokenizer_reads_and_writes_text(text_guide: TextModelGuide) -> None:
    tokenizer = text_guide.language_model.tokenizer
    asked = request(prefix=" great plot")
    answer = text_guide.complete([asked])[0]
    assert answer.ids is None
    assert answer.text
    # the same as the model driven by its own tokens, given the same draws
    ids = Codec(tokenizer).prompt(Prompt("review of : plot => great plot"))
    own = replace(asked, prompt_ids=ids[:-2], prefix_ids=ids[-2:], max_new_tokens=60)
    spoken = ModelGuide(text_guide.language_model, text_guide.sampling).complete([replace(own, max_new_tokens=64 - len(ids))])[
        0
    ]
    assert decode_continuations(tokenizer, [ids], [list(spoken.ids or ())])[0].startswith(answer.text)


def test_a_conversation_is_read_by_its_own_template(byte_tokenizer: Any) -> None:
    import copy

    own = copy.deepcopy(byte_tokenizer)
    own.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    guide = TextModelGuide(model_of(own, seed=3), SamplingParams(top_k=20))
    prompt = Prompt("<|im_start|>hi", messages=({"role": "user", "content": "hi"},), reply_prefix="<t></t>")
    for prefix, read in (("", "[hi]:"), ("<t></t> so", "[hi]: so")):
        request = CompletionRequest(prompt, [1], prefix, [], 8, 0, 0, 0)
        assert own.decode(guide._contexts([request])[0][0]) == read  # pyright: ignore[reportPrivateUsage]
        (completion,) = guide.complete([request])
        assert completion.text.startswith("<t></t>") == (not prefix)


@pytest.mark.integration
def test_its_text_depends_on_seed_trajectory_and_position_alone(text_guide: TextModelGuide) -> None:
    together = text_guide.complete([request(index=index, prefix=" a" * (index % 3)) for index in range(6)])
    assert len({answer.text for answer in together}) == 6
    for index in (5, 0, 3):
        assert text_guide.complete([request(index=index, prefix=" a" * (index % 3))]) == [together[index]]
    assert text_guide.complete([request(seed=8)]) != [together[0]]
    assert text_guide.complete([request(prompt_ids=[1, 2, 3, 4, 9])]) == [together[0]]  # the policy's ids are not read
    fixed = replace(request().prompt, ids=(3, 4, 5, 6, 7))
    assert text_guide.complete([request(), replace(request(), prompt=fixed)]) == [together[0]] * 2


def test_its_budget_is_enough_for_the_policys_and_ends_at_its_context(byte_tokenizer: Any) -> None:
    language_model = forced(model_of(byte_tokenizer, seed=3), byte_ids(byte_tokenizer, "abc"))
    guide = TextModelGuide(language_model, SamplingParams())
    length = len(Codec(byte_tokenizer).prompt(request().prompt))
    for budget, minimum in ((4, 0), (4, 4), (1, 0)):
        answer = guide.complete([request(max_new_tokens=budget, min_new_tokens=minimum)])[0]
        assert not answer.finished
        assert len(answer.text) >= budget * length / 5  # a letter each
    # shortened, not refused, as long as something remains
    assert len(guide.complete([request(max_new_tokens=1000)])[0].text) == 64 - length
    last = "a" * (63 - length)
    ids = Codec(byte_tokenizer).prompt(Prompt(request().prompt.text + last))
    assert len(ids) == 63
    assert len(guide.complete([request(prefix=last)])[0].text) == 1
    with pytest.raises(TrainingError, match="the guide's context is 64 tokens"):
        query_guide(guide, [request(prefix=last + "a")])


def test_its_text_ends_with_a_whole_character_or_is_finished(byte_tokenizer: Any) -> None:
    guide = TextModelGuide(forced(model_of(byte_tokenizer, seed=3), byte_ids(byte_tokenizer, "a\u00e9")), SamplingParams())
    texts = [answer.text for answer in guide.complete([request(index=index) for index in range(40)])]
    assert any("\u00e9" in text for text in texts)
    first = byte_ids(byte_tokenizer, "\u00e9")[0]
    for index, text in enumerate(texts):
        assert not text.endswith("\ufffd") or encode_continuation(byte_tokenizer, text)[-1] != first, index
    silent = TextModelGuide(forced(model_of(byte_tokenizer, seed=3), [byte_tokenizer.eos_token_id]), SamplingParams())
    assert query_guide(silent, [request(), request(prompt="")]) == [Completion("", True)] * 2


@pytest.mark.integration
def test_a_guide_of_another_tokenizer_begins_and_finishes(byte_tokenizer: Any, word_tokenizer: Any) -> None:
    policy = model_of(word_tokenizer, seed=1)
    text_guide = TextModelGuide(model_of(byte_tokenizer, seed=3, context=256), SamplingParams(top_k=20))
    for algorithm in (ppo_pp(1.0).build(), aggrevated(0.8).build()):
        rollout = run(rollout_config(policy, text_guide), algorithm)
        assert rollout.counters["guide_requests"] > 10
        assert rollout.counters["guide_completions_changed"] > 0  # 40 words cannot write what bytes spell
        assert all(text is None or isinstance(text, str) for text in rollout.guide_completions)
        for row in range(len(PROMPTS)):
            assert len(response(rollout, row)) <= HORIZON


# naming a model


def test_a_run_is_a_guide_once_it_has_a_policy(tmp_path: Path) -> None:
    assert guide_model_path(parse_guide("model:some/where")) == "some/where"
    assert guide_model_path(parse_guide("references")) is None
    with pytest.raises(ConfigError, match="holds no run"):
        guide_model_path(parse_guide(f"run:{tmp_path}"))
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(ConfigError, match="has no policy yet"):
        guide_model_path(parse_guide(f"run:{tmp_path}"))
    (tmp_path / "policy").mkdir()
    assert guide_model_path(parse_guide(f"run:{tmp_path}")) == str(tmp_path / "policy")


SMALL = [
    ("task.options", {"slots": 2, "train_prompts": 64, "held_out_prompts": 16}), ("task.max_new_tokens", 5),
    ("task.min_new_tokens", 0), ("model.layers", 1), ("model.width", 16), ("model.heads", 2), ("sft.steps", 3),
    ("sft.batch_size", 8), ("ppo.iterations", 2), ("ppo.completions_per_iteration", 8), ("ppo.minibatch_size", 4),
    ("evaluation.prompts", 4), ("evaluation.final_prompts", 8), ("runtime.trackers", []), ("algorithm.name", "lols"),
]  # fmt: skip


@pytest.mark.integration
def test_a_model_of_any_tokenizer_guides_a_run_and_that_run_another(tmp_path: Path, stages: Path, byte_tokenizer: Any) -> None:
    model_of(byte_tokenizer, seed=3, context=256).save(tmp_path / "model")
    config = override(quickstart(), [*SMALL, ("guide.spec", f"model:{tmp_path / 'model'}")])
    trainer = train(config, tmp_path / "run", stages)
    assert isinstance(trainer.components.guide, TextModelGuide)
    rows = read_complete_lines(tmp_path / "run" / "rollouts.jsonl")
    asked = [row for row in rows if row["guide_completion"] is not None]
    assert sum(row["guide_completions_changed"] for row in read_complete_lines(tmp_path / "run" / "metrics.jsonl")) > 0
    assert 0 < len(asked) < len(rows)
    for row in rows:
        assert row["guide_completion"] is not None or {span["origin"] for span in row["spans"]} <= {"policy"}
    # the policy of that run speaks this one's tokens
    other = override(config, [("guide.spec", f"run:{tmp_path / 'run'}")])
    guide = prepare(other, stages).guide
    assert isinstance(guide, ModelGuide)
    assert not isinstance(guide, TextModelGuide)
    for weight, saved in zip(guide.language_model.model.parameters(), trainer.components.models.policy.model.parameters()):
        assert torch.equal(weight, saved)
    for missing in ("nowhere", str(tmp_path)):
        with pytest.raises(ConfigError, match="holds no run"):
            prepare(override(config, [("guide.spec", f"run:{missing}")]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_short_guide_of_the_policys_tokenizer_is_refused(tmp_path: Path, word_tokenizer: Any) -> None:
    model_of(word_tokenizer, seed=3, context=16).save(tmp_path / "model")
    config = override(quickstart(), [*SMALL, ("guide.spec", f"model:{tmp_path / 'model'}")])
    with pytest.raises(ConfigError, match="has a context of 16 tokens"):
        prepare(config, tmp_path / "stages")
