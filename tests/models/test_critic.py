"""Critics: their initial value, what they start from, and what they refuse."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config

from helpers import asked, tiny_model
from rlgf.config.sections import PreferenceConfig
from rlgf.errors import ConfigError
from rlgf.models.critic import new_critic
from rlgf.models.forward import pad_rows, token_logits
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import load_language_model
from rlgf.supervised.reward_modeling import new_reward_model

ROWS = [[5, 9, 12, 7, 20, 33], [8, 8, 3], [40, 2, 19, 11]]


@pytest.mark.parametrize("kind", ["separate", "value_head"])
def test_a_critic_begins_with_its_initial_value_everywhere(tiny_model: LanguageModel, tmp_path: Path, kind: str):
    tiny_model.save(tmp_path)
    critic = new_critic(kind, str(tmp_path), tiny_model, 0.5)
    rows, columns = torch.tensor([0, 2]), torch.tensor([3, 1])
    _, hidden = token_logits(tiny_model, asked(pad_rows(ROWS), rows, columns))
    values = critic(asked(pad_rows(ROWS), rows, columns), "fp32", None if kind == "separate" else hidden)
    assert values.tolist() == [0.5, 0.5]


def test_a_critic_may_start_from_a_reward_model(tiny_models: dict[str, LanguageModel], tmp_path: Path):
    policy = tiny_models["gpt2"]
    config: GPT2Config = copy.deepcopy(policy.model.config)
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(1)
    judge = AutoModelForSequenceClassification.from_config(config)
    judge.save_pretrained(tmp_path)
    critic = new_critic("separate", str(tmp_path), policy, 0.0)
    mine, theirs = critic.backbone.model.state_dict(), judge.transformer.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_a_separate_critic_shares_nothing_with_the_policy(tmp_path: Path) -> None:
    policy, other = tiny_model(), tiny_model(seed=5, width=24)
    policy.save(tmp_path / "sft")
    other.save(tmp_path / "reward")
    default = new_critic("separate", str(tmp_path / "sft"), policy, 0.25)
    assert torch.equal(default.backbone.model.wte.weight, policy.model.transformer.wte.weight)
    assert default.backbone.model.wte.weight.data_ptr() != policy.model.transformer.wte.weight.data_ptr()
    elsewhere = new_critic("separate", str(tmp_path / "reward"), policy, 0.25)
    assert torch.equal(elsewhere.backbone.model.wte.weight, other.model.transformer.wte.weight)
    ids = torch.tensor([[1, 2, 3]])
    for critic in (default, elsewhere):
        assert critic(asked(ids, torch.tensor([0, 0]), torch.tensor([1, 2])), "fp32").tolist() == [0.25, 0.25]
        assert not critic.backbone.model.training  # no dropout


@pytest.mark.parametrize("size", [40, 50])
def test_a_critic_of_another_vocabulary_is_refused(size: int, tmp_path: Path) -> None:
    other = tiny_model()
    other.model.resize_token_embeddings(size)
    other.save(tmp_path / "other")
    with pytest.raises(ConfigError, match=f"{size} embeddings"):
        new_critic("separate", str(tmp_path / "other"), tiny_model(), 0.0)


def test_a_critic_may_start_from_a_reward_model_with_a_padding_token_of_its_own(causal_folder: Path, tmp_path: Path):
    new_reward_model(str(causal_folder), PreferenceConfig(), 0).save(tmp_path / "reward")
    policy = load_language_model(str(causal_folder))
    critic = new_critic("separate", str(tmp_path / "reward"), policy, 0.0)
    assert critic.backbone is not None
    assert int(critic.backbone.model.config.vocab_size) == policy.vocab_size + 1  # its padding token
