"""Reward models: the scored position, prompts and conversations, and the policy's weights."""

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

from helpers import PAIR_WORDS, PAIRS
from rlgf.config.sections import (
    LoraConfig,
    PreferenceConfig,
    RewardConfig,
    RewardLoraConfig,
    SupervisedConfig,
)
from rlgf.data.conversations.template import ChatTemplate
from rlgf.errors import ConfigError
from rlgf.evaluation.evaluate import mean_reward_gain
from rlgf.models.loading import load_language_model
from rlgf.models.lora import adapter_names as adapter_names
from rlgf.models.lora import add as add_adapter
from rlgf.rewards.base import score
from rlgf.rewards.build import build_reward
from rlgf.rewards.reward_model import RewardModel, is_reward_model, load_reward_model
from rlgf.supervised.reward_modeling import new_reward_model, train_reward_model
from rlgf.tasks.base import Task
from rlgf.types import Prompt


def test_scores_are_those_of_transformers_classifier_on_the_same_text(causal_folder: Path, tmp_path: Path):
    new_reward_model(str(causal_folder), PreferenceConfig(), 0).save(tmp_path / "reward")
    reward = load_reward_model(str(tmp_path / "reward"))
    prompts = [Prompt("about the plot:"), Prompt("a"), Prompt("about the cast and the music:")]
    texts = [" great plot", " dull", ""]
    plain: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    words: Any = AutoTokenizer.from_pretrained(tmp_path / "reward")
    assert plain.config.num_labels == 1
    assert plain.config.pad_token_id == words.pad_token_id != words.eos_token_id
    whole = [prompt.text + text + words.eos_token for prompt, text in zip(prompts, texts)]
    with torch.no_grad():
        expected = plain(**words(whole, return_tensors="pt", padding=True)).logits[:, 0]
    assert reward(prompts, texts) == pytest.approx(expected.tolist(), abs=1e-5)
    assert len({round(value, 4) for value in reward(prompts, texts)}) == 3


def test_a_score_does_not_hang_on_the_texts_beside_it(causal_folder: Path):
    reward = new_reward_model(str(causal_folder), PreferenceConfig(), 0)
    prompts, texts = [pair.prompt for pair in PAIRS.train], [pair.chosen for pair in PAIRS.train]
    together = reward(prompts, texts)
    reward.token_budget = 20
    assert reward(prompts, texts) == pytest.approx(together, abs=1e-5)
    assert reward(prompts[5:6], texts[5:6]) == pytest.approx(together[5:6], abs=1e-5)
    assert reward([], []) == []


def test_adapters_are_found_where_their_base_was_moved_with_them(causal_folder: Path, tmp_path: Path):
    (tmp_path / "stages").mkdir()
    shutil.copytree(causal_folder, tmp_path / "stages" / "sft-1")
    reward = new_reward_model(str(tmp_path / "stages" / "sft-1"), PreferenceConfig(lora=RewardLoraConfig(rank=2)), 0)
    reward.save(tmp_path / "stages" / "reward-1")
    prompts = [Prompt("about the plot:")]
    scores = reward(prompts, [" great"])
    (tmp_path / "stages").rename(tmp_path / "moved")
    assert load_reward_model(str(tmp_path / "moved" / "reward-1"))(prompts, [" great"]) == pytest.approx(scores, abs=1e-5)


def test_a_long_text_loses_part_of_its_prompt_but_not_what_ends_it_and_is_counted(causal_folder: Path):
    reward = new_reward_model(str(causal_folder), PreferenceConfig(), 0)
    prompt, text = Prompt(" ".join(["plot"] * 80) + "\n\nTL;DR:"), " great plot"
    (ids,) = reward.encode([prompt], [text])
    whole = reward.tokenizer(prompt.text)["input_ids"]
    rest = [*reward.tokenizer(text)["input_ids"], reward.tokenizer.eos_token_id]
    assert len(ids) == reward.max_length == 48 or reward.max_length > 10**6  # llama without a learned position table reads on
    assert ids[-len(rest) :] == rest
    kept = ids[: len(ids) - len(rest)]
    assert kept == ([*whole[: len(kept) - 8], *whole[-8:]] if len(kept) < len(whole) else whole)
    assert reward.tokenizer.decode(ids).endswith("\n\nTL;DR: great plot<|endoftext|>")
    assert reward.num_truncated == (len(whole) + len(rest) > reward.max_length)
    word = len(reward.tokenizer(" plot")["input_ids"])
    (ids,) = reward.encode([prompt], [" plot" * (44 // word)])  # so long that there is hardly room for more
    room = reward.max_length - 44 // word * word - 1
    assert 0 < room < 8 or reward.max_length > 10**6
    assert ids[:room] == whole[-room:] or reward.max_length > 10**6


def test_a_response_that_is_too_long_by_itself_is_an_error_in_pairs_and_scored_by_its_beginning(causal_folder: Path):
    reward = new_reward_model(str(causal_folder), PreferenceConfig(), 0)
    texts = [" ".join(["plot"] * count) for count in (80, 90)]
    with pytest.raises(Exception, match=r"a response has \d+ tokens, but the context of the reward model .* is 48"):
        reward.encode([Prompt("about:")], texts[:1])
    first, second = score(reward, [Prompt("about:")] * 2, texts)
    assert first == pytest.approx(second, abs=1e-6)
    assert reward.num_truncated == 2


def test_a_classifier_of_two_texts_reads_prompt_and_response_as_a_pair(tmp_path: Path):
    vocabulary = {token: place for place, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ":", *PAIR_WORDS])}
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    words = BertTokenizerFast(vocab=vocabulary)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "bert")
    words.save_pretrained(tmp_path / "bert")
    reward = load_reward_model(str(tmp_path / "bert"))
    assert not reward.scores_last_state
    prompts, texts = [Prompt("plot :"), Prompt("cast music script :")], ["great plot", "dull"]
    pairs = words([prompt.text for prompt in prompts], texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = model(**pairs).logits[:, 0].tolist()
    assert reward(prompts, texts) == pytest.approx(expected, abs=1e-5)
    (ids,) = reward.encode([Prompt("plot cast music script sound story " * 3)], ["great superb"])
    assert len(ids) == 16
    assert words.decode(ids).endswith("[SEP] great superb [SEP]")
    assert reward.num_truncated == 1


def test_a_conversation_is_read_by_the_reward_models_own_template(causal_folder: Path):
    reward = new_reward_model(str(causal_folder), PreferenceConfig(), 0)
    asked = ({"role": "user", "content": "the plot?"},)
    prompt = Prompt("<|user|>the plot?<|assistant|>", messages=asked)
    bare = reward.tokenizer("<|user|>the plot?<|assistant|> great")["input_ids"]
    assert reward.encode([prompt], [" great"]) == [[*bare, reward.tokenizer.eos_token_id]]  # it has none: the policy's text
    reward.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    assert reward.tokenizer.decode(reward.encode([prompt], ["great"])[0]) == "user=the plot?;assistant=great;"
    begun = Prompt("…", messages=(*asked, {"role": "assistant", "content": "a great"}))
    assert reward.tokenizer.decode(reward.encode([begun], [" plot"])[0]) == "user=the plot?;assistant=a great plot;"


def test_a_reward_of_one_label_is_a_reward_model_and_reads_the_prompt(causal_folder: Path, tmp_path: Path):
    new_reward_model(str(causal_folder), PreferenceConfig(), 0).save(tmp_path / "reward")
    task = Task("t", [], [], [])
    reward = build_reward(RewardConfig(path=str(tmp_path / "reward")), task, {})
    assert isinstance(reward, RewardModel)
    assert reward([Prompt("about the plot:")], [" great"]) != reward([Prompt("about the cast:")], [" great"])
    made_here = build_reward(RewardConfig(path="preferences"), task, {"preferences": tmp_path / "reward"})
    assert isinstance(made_here, RewardModel)


def test_what_is_no_reward_model_is_refused(causal_folder: Path, tmp_path: Path):
    assert not is_reward_model(str(causal_folder))
    with pytest.raises(ConfigError, match="no reward model can be loaded"):
        load_reward_model(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="is a classifier of 2 labels"):
        load_reward_model(str(causal_folder))


def test_an_evaluation_says_how_far_above_the_references_texts_score(causal_folder: Path):
    reward = new_reward_model(str(causal_folder), PreferenceConfig(), 0)
    prompts = [Prompt("about the plot:", (" dull plot", " other")), Prompt("about the cast:"), Prompt("a", (" great",))]
    first, third = reward([prompts[0], prompts[2]], [" dull plot", " great"])
    assert mean_reward_gain(reward, prompts, [1.0, 5.0, 3.0]) == pytest.approx((1.0 - first + 3.0 - third) / 2, abs=1e-5)
    assert math.isnan(mean_reward_gain(reward, prompts[1:2], [1.0]))


@pytest.mark.integration
def test_on_the_policys_weights_it_scores_as_merged_into_its_own(causal_folder: Path, tmp_path: Path):
    settings = PreferenceConfig(
        training=SupervisedConfig(steps=5, batch_size=8, learning_rate=0.05), lora=RewardLoraConfig(rank=2)
    )
    trained = new_reward_model(str(causal_folder), settings, 0)
    train_reward_model(trained, PAIRS, settings, 0, 512)
    trained.save(tmp_path / "reward")
    policy = load_language_model(str(causal_folder)).freeze()
    add_adapter(policy.model, "policy", LoraConfig(rank=2), 0)
    alone = load_reward_model(str(tmp_path / "reward"))
    shared = load_reward_model(str(tmp_path / "reward"), backbone=policy)
    assert shared.model.backbone.owner is policy.model
    assert set(adapter_names(policy.model)) == {"policy", "reward"}
    pairs = PAIRS.test[:6]
    prompts, texts = [pair.prompt for pair in pairs], [pair.chosen for pair in pairs]
    assert shared(prompts, texts) == pytest.approx(alone(prompts, texts), abs=1e-5)
    assert shared(prompts, texts) == shared(prompts, texts)
    elsewhere = tmp_path / "elsewhere"
    load_language_model(str(causal_folder)).save(elsewhere)
    other = load_language_model(str(elsewhere)).freeze()
    assert load_reward_model(str(tmp_path / "reward"), backbone=other).classifier is not other.model  # not its base
    assert adapter_names(other.model) == []


def test_a_reply_whose_opening_the_policy_wrote_is_not_opened_twice(causal_folder: Path):
    reward = new_reward_model(str(causal_folder), PreferenceConfig(), 0)
    opening = "{% if add_generation_prompt %}<assistant>{% endif %}"
    reward.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>\n{{ m.content }};{% endfor %}" + opening
    prompt = Prompt("<user>\nthe plot?;<assistant>", messages=({"role": "user", "content": "the plot?"},))
    written = ChatTemplate(reward.tokenizer).reply(prompt.messages or (), "great")
    assert written == "\ngreat"
    assert reward.tokenizer.decode(reward.encode([prompt], [written])[0]) == prompt.text + "\ngreat;"
    other = dataclasses.replace(prompt, reply_prefix="<think></think>\n")  # that of a policy with another template
    assert reward.encode([other], ["<think></think>\ngreat"]) == reward.encode([prompt], [written])
