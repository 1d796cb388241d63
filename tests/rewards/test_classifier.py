"""Rewards by classifiers: what the number means is named, and every completion has one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlgf.errors import ConfigError
from rlgf.rewards.classifier import SequenceClassifier, check_classifier, choose_label, read_label
from rlgf.types import Prompt


def labels(*names: str) -> Any:
    return SimpleNamespace(id2label=dict(enumerate(names)))


def test_a_label_is_named_or_asked_for() -> None:
    assert choose_label(labels("NEGATIVE", "POSITIVE"), "c", None) == 1
    assert choose_label(labels("joy", "fear"), "c", "Fear") == 1
    assert choose_label(labels("joy", "fear"), "c", "0") == 0
    for config, label, words in (
        (labels("LABEL_0", "LABEL_1"), None, "which do not say whose probability is the reward: name one with reward.options"),
        (labels("joy", "fear"), "anger", "has no label 'anger', but joy, fear"),
        (labels("LABEL_0"), None, "has one label"),
    ):
        with pytest.raises(ConfigError, match=words):
            choose_label(config, "c", label)
    assert read_label("c", {"label": 1}) == "1"
    with pytest.raises(ConfigError, match="the key 'label' alone"):
        read_label("c", {"labels": 1})


@pytest.fixture(scope="module")
def folder(word_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=len(word_tokenizer), n_layer=1, n_embd=16, n_head=2, n_positions=8, num_labels=2)
    path = tmp_path_factory.mktemp("classifier")
    GPT2ForSequenceClassification(shape).save_pretrained(path)
    word_tokenizer.save_pretrained(path)
    return path


def test_every_completion_has_a_score(folder: Path) -> None:
    """The classifier has no padding, and its tokenizer adds nothing to an empty text."""
    with pytest.raises(ConfigError, match="LABEL_0, LABEL_1"):
        check_classifier(str(folder), None)
    check_classifier(str(folder), "LABEL_1")
    reward = SequenceClassifier(str(folder), "LABEL_1")
    texts = ["", "great plot", " ".join(["great plot"] * 50), " "]
    together = reward([Prompt("")] * len(texts), texts)
    assert all(0 < value < 1 for value in together)
    assert reward.num_truncated == 1
    assert together == pytest.approx([reward([Prompt("")], [text])[0] for text in texts], abs=1e-6)
    assert "the probability of 'LABEL_1'" in reward.describe()


def test_a_language_model_is_no_classifier(toy_folder: Path) -> None:
    with pytest.raises(ConfigError, match="is no sequence classifier"):
        check_classifier(str(toy_folder), None)
