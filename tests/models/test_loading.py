"""Models: new ones, saved and loaded ones, their end tokens, and the Hub."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from rlgf.config.sections import ModelConfig
from rlgf.data.hub import hub_is_reachable
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import from_pretrained, load_language_model, max_length_of, new_language_model, wrap_model


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
