"""Texts of other tokenizers: what becomes of a guide's text, of characters that are several tokens, of a guide of its own."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlgf.algorithms import aggrevated, draw_switch, ppo, ppo_pp
from rlgf.config import ModelConfig, override
from rlgf.errors import RunError, UserError
from rlgf.guides import FunctionGuide, Guide, ModelGuide, Request, Text, ask
from rlgf.guides.local import TextModelGuide, guide_model_path
from rlgf.models import LanguageModel, new_language_model
from rlgf.pipeline import prepare, train
from rlgf.randomness import Purpose, uniforms
from rlgf.recipes import quickstart
from rlgf.rollout import Writing, collect
from rlgf.runs import read_complete_lines, rollout_rows
from rlgf.stages import train_tokenizer
from rlgf.tokens import (
    Codec,
    decode,
    decode_continuations,
    encode_continuation,
    well_formed,
    whole_characters,
)
from rlgf.types import GUIDE, POLICY, Decoding, Prompt, Rollout

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
    shape = ModelConfig(layers=1, width=16, heads=2, context=context, initial_std=0.3)
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
    return FunctionGuide(lambda requests: [Text(text, finished) for _ in requests])


def writing(policy: LanguageModel, guide: Guide | None, **changes: Any) -> Writing:
    return replace(Writing(policy, guide, Decoding(), horizon=HORIZON, minimum=0, seed=11), **changes)


def run(setting: Writing, algorithm: Any) -> Rollout:
    return collect(setting, algorithm, algorithm.plan(0, 0.5), PROMPTS, INDICES)


def response(rollout: Rollout, row: int) -> list[int]:
    return rollout.ids[row, int(rollout.prompt_lengths[row]) : int(rollout.lengths[row])].tolist()


# characters


def test_a_text_is_kept_to_its_last_whole_character(byte_tokenizer: Any) -> None:
    word, party = encode_continuation(byte_tokenizer, " plot"), byte_ids(byte_tokenizer, PARTY)
    assert len(party) == 4
    for more in range(4):
        assert whole_characters(byte_tokenizer, [*word, *party[:more]]) == len(word)
        assert whole_characters(byte_tokenizer, party[:more]) == 0
    assert whole_characters(byte_tokenizer, [*word, *party]) == len(word) + 4
    assert whole_characters(byte_tokenizer, [*word, *party, byte_tokenizer.eos_token_id]) == len(word) + 5
    assert whole_characters(byte_tokenizer, []) == 0


def test_bytes_that_never_become_a_character_stay(byte_tokenizer: Any) -> None:
    first, second, third, last = byte_ids(byte_tokenizer, PARTY)
    word = encode_continuation(byte_tokenizer, "plot")
    for garbage in ([last], [second, third, last], [first, last, *word], [first, second, first, second, third, last]):
        assert whole_characters(byte_tokenizer, garbage) == len(garbage)
    # the last byte alone begins nothing, and what the first began is broken off by it
    assert whole_characters(byte_tokenizer, [last, first]) == 1
    assert whole_characters(byte_tokenizer, [last, first, second, third]) == 1


def test_a_token_that_ends_inside_a_character_is_given_up_whole(byte_tokenizer: Any) -> None:
    tokenizer = train_tokenizer([f" {chr(0x1F380 + i)}" for i in range(64)] * 4, 262)
    merged = encode_continuation(tokenizer, f"a {PARTY}")
    assert len(merged) < 6  # the space and the first bytes are one token
    for length in range(2, len(merged)):
        assert whole_characters(tokenizer, merged[:length]) == 1


def test_a_tokenizer_of_words_has_no_parts_of_characters(word_tokenizer: Any) -> None:
    ids = word_tokenizer("great plot")["input_ids"]
    assert whole_characters(word_tokenizer, ids) == len(ids)


@pytest.mark.parametrize("rule", ["uniform", "paper", "horizon"])
@pytest.mark.parametrize("minimum", [0, HORIZON])
def test_a_switch_inside_a_character_of_the_policy_moves_back(rule: Any, minimum: int, byte_policy: LanguageModel) -> None:
    heard: list[Request] = []

    def guide(requests: Sequence[Request]) -> list[Text]:
        heard.extend(requests)
        return [Text(" great", True) for _ in requests]

    tokenizer = byte_policy.tokenizer
    alone = run(writing(byte_policy, None, minimum=minimum), ppo())
    rollout = run(writing(byte_policy, FunctionGuide(guide), minimum=minimum), aggrevated(1.0, switch=rule))
    moved, discarded = 0, 0
    for row, index in enumerate(INDICES):
        whole = response(alone, row)
        draw = float(uniforms(11, Purpose.SWITCH, index, 1)[0])
        drawn = draw_switch(rule, POLICY, len(whole), HORIZON, draw)
        expected = drawn if drawn == HORIZON else whole_characters(tokenizer, whole[:drawn])
        assert int(rollout.switch[row]) == expected
        assert response(rollout, row)[:expected] == whole[:expected]  # the policy's own ids are never altered
        assert int((rollout.by_policy[row]).sum()) == expected
        moved += expected < drawn
        # planned switches write the drawn part only
        planned = rule == "horizon" or minimum == HORIZON
        discarded += (drawn if planned else len(whole)) - expected
    assert moved > 3
    assert rollout.counts["switches_moved"] == moved
    assert rollout.counts["discarded_tokens"] == discarded
    for request in heard:
        assert whole_characters(tokenizer, list(request.prefix_ids)) == len(request.prefix_ids)
        assert request.budget == HORIZON - len(request.prefix_ids)


@pytest.mark.parametrize("rule", ["uniform", "paper"])
def test_a_switch_inside_a_character_of_the_guide_moves_back(rule: Any, policy: LanguageModel) -> None:
    text = f" great {PARTY}{PARTY} plot"
    ids = encode_continuation(policy.tokenizer, text)[:HORIZON]
    rollout = run(writing(policy, says(text)), ppo_pp(1.0, rule))
    switches = set(rollout.switch.tolist())
    assert switches <= {length for length in range(HORIZON) if whole_characters(policy.tokenizer, ids[:length]) == length}
    assert rollout.counts["switches_moved"] > 0
    for row, switch in enumerate(rollout.switch.tolist()):
        assert response(rollout, row)[:switch] == ids[:switch]
        assert "\ufffd" not in decode(policy.tokenizer, response(rollout, row)[:switch])
        assert int(rollout.by_guide[row].sum()) == switch


def test_a_guide_that_writes_text_is_asked_for_all_of_it_whatever_the_switch(policy: LanguageModel) -> None:
    budgets: list[int] = []

    def guide(requests: Sequence[Request]) -> list[Text]:
        budgets.extend(request.budget for request in requests)
        return [Text(" a great plot", True) for _ in requests]

    rollout = run(writing(policy, FunctionGuide(guide), minimum=HORIZON), ppo_pp(1.0))
    assert budgets == [HORIZON] * len(PROMPTS)
    assert rollout.counts["guide_texts_cut"] == 0
    assert set(rollout.guide_texts) == {" a great plot"}


# what is kept


def test_the_guides_text_becomes_ids_once_and_is_never_read_again(policy: LanguageModel) -> None:
    # cut inside a word, its decoded text would be encoded with other tokens than it has
    text = "what a great"
    ids = encode_continuation(policy.tokenizer, text)
    cuts = [n for n in range(len(ids)) if encode_continuation(policy.tokenizer, decode(policy.tokenizer, ids[:n])) != ids[:n]]
    rollout = run(writing(policy, says(text)), ppo_pp(1.0))
    assert len({*rollout.switch.tolist()}) > 3
    for row, switch in enumerate(rollout.switch.tolist()):
        assert response(rollout, row)[:switch] == ids[:switch]
    begun = run(writing(policy, says(text)), aggrevated(1.0))
    alone = run(writing(policy, None), ppo())
    changed = 0
    for row, switch in enumerate(begun.switch.tolist()):
        prefix = response(alone, row)[:switch]
        changed += encode_continuation(policy.tokenizer, decode(policy.tokenizer, prefix)) != prefix
        assert response(begun, row)[:switch] == prefix
        if not bool(begun.finished[row]) or GUIDE in begun.origin[row]:
            assert response(begun, row)[switch:] == [*ids, policy.end_id][: HORIZON - switch]
    assert changed + len(cuts) > 0  # otherwise this shows nothing


def test_what_a_tokenizer_cannot_write_is_kept_and_counted(word_tokenizer: Any) -> None:
    policy = model_of(word_tokenizer, seed=1)
    prompts = [Prompt("review of : plot =>")] * 3
    texts = iter([" great acting", f" great {PARTY}", " great\nplot"])
    guide = FunctionGuide(lambda requests: [Text(next(texts), True) for _ in requests])
    algorithm = aggrevated(0.0)
    rollout = collect(writing(policy, guide), algorithm, algorithm.plan(0, 0.5), prompts, [0, 1, 2])
    assert rollout.counts["guide_texts_changed"] == 2
    assert list(rollout.guide_texts) == [" great acting", f" great {PARTY}", " great\nplot"]
    assert rollout.texts[0] == " great acting"
    rows = rollout_rows(rollout, [0.0] * 3, 0, policy.codec)
    assert [row["guide_text"] for row in rows] == list(rollout.guide_texts)
    assert [row["text"] for row in rows] == list(rollout.texts)


def test_a_cut_text_is_not_a_changed_one(policy: LanguageModel) -> None:
    rollout = run(writing(policy, says(" a great plot" * 10)), aggrevated(0.0))
    assert rollout.counts["guide_texts_cut"] == len(PROMPTS)
    assert rollout.counts["guide_texts_changed"] == 0
    assert not bool(rollout.finished.any())
    assert policy.end_id not in rollout.ids[rollout.by_guide].tolist()


def test_no_guide_text_where_no_guide_wrote_text(policy: LanguageModel) -> None:
    assert list(run(writing(policy, None), ppo()).guide_texts) == [None] * len(PROMPTS)
    spoken = run(writing(policy, ModelGuide(policy, Decoding())), aggrevated(0.5))
    assert list(spoken.guide_texts) == [None] * len(PROMPTS)
    assert spoken.counts["guide_texts_changed"] == 0
    some = run(writing(policy, says(" great")), ppo_pp(0.5))
    asked = [float(uniforms(11, Purpose.ROLLIN_COIN, index, 1)[0]) < 0.5 for index in INDICES]
    assert [text is not None for text in some.guide_texts] == asked


def test_half_a_surrogate_pair_is_written_as_unknown(policy: LanguageModel) -> None:
    assert well_formed("a \ud83c b") == "a \ufffd b"
    assert well_formed("\ud83c\udf89") == PARTY
    assert well_formed(f"\ufeffé{PARTY}") == f"\ufeffé{PARTY}"
    rollout = run(writing(policy, says(" a \ud83c")), aggrevated(0.0))
    assert rollout.counts["guide_texts_changed"] == len(PROMPTS)
    assert set(rollout.guide_texts) == {" a \ufffd"}


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


def request(prompt: str = "review of : plot =>", prefix: str = "", index: int = 0, **changes: Any) -> Request:
    made = Request(Prompt(prompt), [3, 4, 5, 6, 7], prefix, [8] * len(prefix.split()), 4, 0, index, 7)
    return replace(made, **changes)


@pytest.fixture(scope="module")
def text_guide(byte_tokenizer: Any) -> TextModelGuide:
    return TextModelGuide(model_of(byte_tokenizer, seed=3), Decoding(top_k=20))


def test_a_model_of_another_tokenizer_reads_and_writes_text(text_guide: TextModelGuide) -> None:
    tokenizer = text_guide.language_model.tokenizer
    asked = request(prefix=" great plot")
    answer = text_guide.complete([asked])[0]
    assert answer.ids is None
    assert answer.text
    # the same as the model driven by its own tokens, given the same draws
    ids = Codec(tokenizer).prompt(Prompt("review of : plot => great plot"))
    own = replace(asked, prompt_ids=ids[:-2], prefix_ids=ids[-2:], budget=60)
    spoken = ModelGuide(text_guide.language_model, text_guide.decoding).complete([replace(own, budget=64 - len(ids))])[0]
    assert decode_continuations(tokenizer, [ids], [list(spoken.ids or ())])[0].startswith(answer.text)


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
    guide = TextModelGuide(language_model, Decoding())
    length = len(Codec(byte_tokenizer).prompt(request().prompt))
    for budget, minimum in ((4, 0), (4, 4), (1, 0)):
        answer = guide.complete([request(budget=budget, minimum=minimum)])[0]
        assert not answer.finished
        assert len(answer.text) >= budget * length / 5  # a letter each
    # shortened, not refused, as long as something remains
    assert len(guide.complete([request(budget=1000)])[0].text) == 64 - length
    last = "a" * (63 - length)
    ids = Codec(byte_tokenizer).prompt(Prompt(request().prompt.text + last))
    assert len(ids) == 63
    assert len(guide.complete([request(prefix=last)])[0].text) == 1
    with pytest.raises(RunError, match="the guide reads 64 tokens"):
        ask(guide, [request(prefix=last + "a")])


def test_its_text_ends_with_a_whole_character_or_is_finished(byte_tokenizer: Any) -> None:
    guide = TextModelGuide(forced(model_of(byte_tokenizer, seed=3), byte_ids(byte_tokenizer, "a\u00e9")), Decoding())
    texts = [answer.text for answer in guide.complete([request(index=index) for index in range(40)])]
    assert any("\u00e9" in text for text in texts)
    first = byte_ids(byte_tokenizer, "\u00e9")[0]
    for index, text in enumerate(texts):
        assert not text.endswith("\ufffd") or encode_continuation(byte_tokenizer, text)[-1] != first, index
    silent = TextModelGuide(forced(model_of(byte_tokenizer, seed=3), [byte_tokenizer.eos_token_id]), Decoding())
    assert ask(silent, [request(), request(prompt="")]) == [Text("", True)] * 2


def test_a_guide_of_another_tokenizer_begins_and_finishes(byte_tokenizer: Any, word_tokenizer: Any) -> None:
    policy = model_of(word_tokenizer, seed=1)
    text_guide = TextModelGuide(model_of(byte_tokenizer, seed=3, context=256), Decoding(top_k=20))
    for algorithm in (ppo_pp(1.0), aggrevated(0.8)):
        rollout = run(writing(policy, text_guide), algorithm)
        assert rollout.counts["guide_requests"] > 10
        assert rollout.counts["guide_texts_changed"] > 0  # 40 words cannot write what bytes spell
        assert all(text is None or isinstance(text, str) for text in rollout.guide_texts)
        for row in range(len(PROMPTS)):
            assert len(response(rollout, row)) <= HORIZON


# naming a model


def test_a_run_is_a_guide_once_it_has_a_policy(tmp_path: Path) -> None:
    assert guide_model_path("model:some/where") == "some/where"
    assert guide_model_path("references") is None
    with pytest.raises(UserError, match="holds no run"):
        guide_model_path(f"run:{tmp_path}")
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(UserError, match="has no policy yet"):
        guide_model_path(f"run:{tmp_path}")
    (tmp_path / "policy").mkdir()
    assert guide_model_path(f"run:{tmp_path}") == str(tmp_path / "policy")


SMALL = [
    ("task.options", {"slots": 2, "train_prompts": 64, "held_out_prompts": 16}), ("task.max_new_tokens", 5),
    ("task.min_new_tokens", 0), ("model.layers", 1), ("model.width", 16), ("model.heads", 2), ("sft.steps", 3),
    ("sft.batch_size", 8), ("ppo.iterations", 2), ("ppo.texts_per_iteration", 8), ("ppo.minibatch_size", 4),
    ("evaluation.prompts", 4), ("evaluation.final_prompts", 8), ("runtime.trackers", []), ("algorithm.name", "lols"),
]  # fmt: skip


def test_a_model_of_any_tokenizer_guides_a_run_and_that_run_another(tmp_path: Path, byte_tokenizer: Any) -> None:
    model_of(byte_tokenizer, seed=3, context=256).save(tmp_path / "model")
    config = override(quickstart(), [*SMALL, ("guide.spec", f"model:{tmp_path / 'model'}")])
    trainer = train(config, tmp_path / "run", tmp_path / "stages")
    assert isinstance(trainer.parts.guide, TextModelGuide)
    rows = read_complete_lines(tmp_path / "run" / "rollouts.jsonl")
    asked = [row for row in rows if row["guide_text"] is not None]
    assert sum(row["guide_texts_changed"] for row in read_complete_lines(tmp_path / "run" / "metrics.jsonl")) > 0
    assert 0 < len(asked) < len(rows)
    for row in rows:
        assert row["guide_text"] is not None or {span["author"] for span in row["spans"]} <= {"policy"}
    # the policy of that run speaks this one's tokens
    other = override(config, [("guide.spec", f"run:{tmp_path / 'run'}")])
    guide = prepare(other, tmp_path / "stages").guide
    assert isinstance(guide, ModelGuide)
    assert not isinstance(guide, TextModelGuide)
    for weight, saved in zip(guide.language_model.model.parameters(), trainer.parts.models.policy.model.parameters()):
        assert torch.equal(weight, saved)
    for missing in ("nowhere", str(tmp_path)):
        with pytest.raises(UserError, match="holds no run"):
            prepare(override(config, [("guide.spec", f"run:{missing}")]), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_short_guide_of_the_policys_tokenizer_is_refused(tmp_path: Path, word_tokenizer: Any) -> None:
    model_of(word_tokenizer, seed=3, context=16).save(tmp_path / "model")
    config = override(quickstart(), [*SMALL, ("guide.spec", f"model:{tmp_path / 'model'}")])
    with pytest.raises(UserError, match="reads 16 tokens"):
        prepare(config, tmp_path / "stages")
