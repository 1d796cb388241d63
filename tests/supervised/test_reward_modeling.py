"""Reward modeling: new heads, the gradient of pairs, what is learned, and adapters."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from helpers import PAIRS
from rlgf.config.sections import ModelConfig, PreferenceConfig, RewardLoraConfig, SupervisedConfig
from rlgf.models.loading import new_language_model
from rlgf.rewards.reward_model import is_reward_model, load_reward_model
from rlgf.supervised.reward_modeling import new_reward_model, pairs_backward, train_reward_model

TRAINING = SupervisedConfig(steps=30, batch_size=16, learning_rate=3e-3)


def test_the_head_is_a_function_of_the_seed(causal_folder: Path):
    heads = [new_reward_model(str(causal_folder), PreferenceConfig(), seed).classifier.score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert float(heads[0].detach().std()) == pytest.approx(1 / math.sqrt(33), rel=0.5)


def test_the_gradient_of_a_batch_is_that_of_the_mean_whatever_the_micro_batches(causal_folder: Path):
    gradients: list[torch.Tensor] = []
    for budget in (10**6, 30):
        reward = new_reward_model(str(causal_folder), PreferenceConfig(), 0)
        prompts = [pair.prompt for pair in PAIRS.train[:6]]
        sides = [reward.encode(prompts, [getattr(pair, side) for pair in PAIRS.train[:6]]) for side in ("chosen", "rejected")]
        loss = pairs_backward(reward, list(zip(*sides)), budget)
        scores = [reward(prompts, [getattr(pair, side) for pair in PAIRS.train[:6]]) for side in ("chosen", "rejected")]
        by_hand = sum(math.log1p(math.exp(r - c)) for c, r in zip(*scores)) / 6
        assert loss == pytest.approx(by_hand, abs=1e-5)
        gradients.append(reward.classifier.score.weight.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


@pytest.mark.integration
def test_a_reward_model_learns_what_is_preferred_on_posts_it_has_not_seen(causal_folder: Path):
    reward = new_reward_model(str(causal_folder), PreferenceConfig(), 0)
    before = train_reward_model(reward, PAIRS, PreferenceConfig(training=SupervisedConfig()), 0, 2048)  # no step
    assert before["steps"] == 0
    measured = train_reward_model(reward, PAIRS, PreferenceConfig(training=TRAINING), 0, 2048)
    assert measured["accuracy"] == 1.0
    assert measured["loss"] < 0.3
    assert (measured["trained_pairs"], measured["trained_posts"]) == (64, 32)
    assert (measured["held_out_pairs"], measured["held_out_posts"]) == (16, 8)
    longer = [len(pair.chosen) - len(pair.rejected) for pair in PAIRS.test]
    assert measured["length_baseline"] == sum((d > 0) + 0.5 * (d == 0) for d in longer) / 16
    assert measured["completions_truncated"] == measured["held_out_completions_truncated"] == 0


@pytest.mark.integration
def test_adapters_and_head_are_saved_and_loaded_by_peft_and_by_us(causal_folder: Path, tmp_path: Path):
    from peft import AutoPeftModelForSequenceClassification

    config = PreferenceConfig(training=TRAINING, lora=RewardLoraConfig(rank=4, alpha=8))
    reward = new_reward_model(str(causal_folder), config, 0)
    frozen = {name: p.detach().clone() for name, p in reward.model.named_parameters() if not p.requires_grad}
    assert 0 < sum(p.numel() for p in reward.model.parameters() if p.requires_grad) < sum(p.numel() for p in frozen.values())
    train_reward_model(reward, PAIRS, config, 0, 2048)
    for name, parameter in reward.model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    prompts, texts = [pair.prompt for pair in PAIRS.test], [pair.chosen for pair in PAIRS.test]
    scores = reward(prompts, texts)
    assert len(set(scores)) > 1
    reward.save(tmp_path / "reward")
    assert is_reward_model(str(tmp_path / "reward"))
    assert load_reward_model(str(tmp_path / "reward"))(prompts, texts) == pytest.approx(scores, abs=1e-4)
    again: Any = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "reward", num_labels=1).eval()
    words: Any = AutoTokenizer.from_pretrained(tmp_path / "reward")
    for prompt, text, value in list(zip(prompts, texts, scores))[:4]:
        with torch.no_grad():
            logits = again(**words(prompt.text + text + words.eos_token, return_tensors="pt")).logits
        assert logits.item() == pytest.approx(value, abs=1e-4)


def test_a_reward_model_goes_on_from_itself(causal_folder: Path, tmp_path: Path):
    first = new_reward_model(str(causal_folder), PreferenceConfig(), 0)
    first.save(tmp_path / "reward")
    again = new_reward_model(str(tmp_path / "reward"), PreferenceConfig(), 5)
    assert torch.equal(again.classifier.score.weight, first.classifier.score.weight)
    assert len(again.tokenizer) == len(first.tokenizer)


def test_a_token_that_never_ends_a_text_serves_as_padding(tmp_path: Path, pair_tokenizer: Any):
    own = copy.deepcopy(pair_tokenizer)
    own.add_special_tokens({"unk_token": "great"})
    new_language_model(ModelConfig(layers=1, width=16, heads=2, max_length=16), own, 0).save(tmp_path / "model")
    reward = new_reward_model(str(tmp_path / "model"), PreferenceConfig(), 0)
    assert reward.tokenizer.pad_token == "great"
    assert len(reward.tokenizer) == len(own)
