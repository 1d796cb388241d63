"""Models, critics and the forward pass that scoring and training share."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config

from helpers import asked
from rlgf.config.sections import ModelConfig
from rlgf.data.hub import hub_is_reachable
from rlgf.errors import ConfigError
from rlgf.models.critic import new_critic
from rlgf.models.forward import group_by_length, iter_logits, pad_rows, token_logits
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import from_pretrained, load_language_model, max_length_of, new_language_model, wrap_model

ROWS = [[5, 9, 12, 7, 20, 33], [8, 8, 3], [40, 2, 19, 11]]


def test_logits_are_those_of_the_whole_model_at_the_asked_tokens(tiny_model: LanguageModel):
    ids = pad_rows(ROWS)
    rows, columns = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 5, 2, 3])
    logits, hidden = token_logits(tiny_model, asked(ids, rows, columns))
    whole = tiny_model.model(input_ids=ids).logits
    torch.testing.assert_close(logits, whole[rows, columns - 1], atol=5e-6, rtol=1e-5)
    assert hidden.shape[0] == 4


def test_padding_and_neighbours_change_no_logit(tiny_model: LanguageModel):
    together, _ = token_logits(
        tiny_model, asked(pad_rows([*ROWS, list(range(20))]), torch.tensor([1, 1]), torch.tensor([1, 2]))
    )
    alone, _ = token_logits(tiny_model, asked(pad_rows(ROWS[1:2]), torch.tensor([0, 0]), torch.tensor([1, 2])))
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("in_line", [True, False])
@pytest.mark.parametrize("budget", [1, 7, 12, 1000])
def test_groups_hold_every_row_once_and_keep_to_the_budget(budget: int, in_line: bool):
    lengths = torch.tensor([6, 3, 4, 6, 1, 2])
    groups = group_by_length(lengths, budget, in_line)
    assert sorted(torch.cat(groups).tolist()) == list(range(6))
    for group in groups:
        cost = int(lengths[group].sum()) if in_line else len(group) * int(lengths[group].max())
        assert len(group) == 1 or cost <= budget


@pytest.mark.parametrize("budget", [1, 12, 1000])
def test_reading_visits_each_selected_token_once_whatever_the_budget(tiny_model: LanguageModel, budget: int):
    ids = pad_rows(ROWS)
    selected = torch.zeros(ids.shape, dtype=torch.bool)
    selected[0, 2:5] = selected[2, 3] = True
    seen = torch.zeros(ids.shape)
    for batch, logits, _ in iter_logits(tiny_model, ids, torch.zeros(3, dtype=torch.int64), selected, budget, "fp32"):
        seen[batch.token_index] += logits.log_softmax(1).gather(1, ids[batch.token_index][:, None]).squeeze(1)
    whole = tiny_model.model(input_ids=ids).logits.log_softmax(2)
    expected = torch.zeros(ids.shape)
    expected[:, 1:] = whole[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    assert torch.allclose(seen, expected * selected, atol=1e-5)


def test_a_new_model_is_a_function_of_its_seed(word_tokenizer: Any):
    shape = ModelConfig(layers=1, width=16, heads=2, max_length=16)
    first, same, other = (new_language_model(shape, word_tokenizer, seed).model.state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_saved_model_is_read_back(tiny_model: LanguageModel, tmp_path: Path):
    tiny_model.save(tmp_path)
    again = load_language_model(str(tmp_path))
    assert again.eos_token_ids == tiny_model.eos_token_ids
    assert again.max_length == tiny_model.max_length == max_length_of(str(tmp_path))
    for name, value in tiny_model.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_several_end_tokens_are_known_and_impossible_ones_ignored(tiny_model: LanguageModel):
    model = copy.deepcopy(tiny_model.model)
    model.generation_config.eos_token_id = [4, 7, 50256]
    assert wrap_model(model, tiny_model.tokenizer, "m").eos_token_ids == (tiny_model.eos_token_ids[0], 4, 7)


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


def test_a_critic_of_another_vocabulary_is_refused(tiny_model: LanguageModel, word_tokenizer: Any, tmp_path: Path):
    new_language_model(ModelConfig(layers=1, width=16, heads=2), word_tokenizer, 0).save(tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"vocab_size": 42', '"vocab_size": 40')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError):
        new_critic("separate", str(tmp_path), tiny_model, 0.0)


def test_a_new_encoder_decoder_has_one_table_of_words_and_is_the_same_when_loaded(tmp_path: Path, tiny_model: LanguageModel):
    shape = ModelConfig(architecture="t5", layers=1, width=64, heads=2)
    made = new_language_model(shape, tiny_model.tokenizer, 0)
    assert made.model.lm_head.weight is made.model.shared.weight
    assert float(made.model.shared.weight.detach().std()) == pytest.approx(1 / 8, rel=0.05)
    made.save(tmp_path)
    again = load_language_model(str(tmp_path))
    inputs = {"input_ids": torch.tensor([[3, 5, 7]]), "decoder_input_ids": torch.tensor([[0, 4]])}
    assert torch.equal(again.model(**inputs).logits, made.model(**inputs).logits)


# --- the Hub ------------------------------------------------------------------------------------------------------------


def test_a_hub_that_is_not_there_is_asked_once_and_then_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its client would try each file of each model for half a minute."""
    asked_for: list[tuple[str, bool]] = []
    heads: list[str] = []

    class Nowhere:
        def head(self, url: str, timeout: float) -> None:
            heads.append(url)
            raise ConnectionError

    class Auto:
        @staticmethod
        def from_pretrained(path: str, local_files_only: bool, **options: Any) -> str:
            asked_for.append((path, local_files_only))
            return path

    hub_is_reachable.cache_clear()
    monkeypatch.setattr("huggingface_hub.utils.get_session", Nowhere)
    assert from_pretrained(Auto, str(tmp_path), "model") == str(tmp_path)
    assert not heads  # a folder needs no Hub
    from_pretrained(Auto, "gpt2", "model")
    from_pretrained(Auto, "gpt2", "tokenizer")
    assert heads == ["https://huggingface.co"]
    assert asked_for == [(str(tmp_path), True), ("gpt2", True), ("gpt2", True)]
    hub_is_reachable.cache_clear()
    monkeypatch.setattr(Nowhere, "head", lambda self, url, timeout: None)
    from_pretrained(Auto, "gpt2", "model")
    assert asked_for[-1] == ("gpt2", False)
    hub_is_reachable.cache_clear()
