"""Rewards by sequence classifiers."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from rlgf.errors import ConfigError
from rlgf.models.configs import UNLIMITED, max_length
from rlgf.models.loading import from_pretrained, load_tokenizer
from rlgf.types import Prompt


class SequenceClassifier:
    """A Hugging Face sequence classifier as reward: the probability of one of its labels.

    `label` is the name or the number of the label; without one, the classifier must call exactly
    one of its labels POSITIVE or POS. It takes text, so it may have any tokenizer. A text longer
    than its context is truncated at the end and counted in `num_truncated`.
    """

    def __init__(self, path: str, label: str | None = None, batch_size: int = 32) -> None:
        from transformers import AutoModelForSequenceClassification

        self.model: Any = from_pretrained(AutoModelForSequenceClassification, path, "sequence classifier").eval()
        self.tokenizer: Any = load_tokenizer(path)
        pads = None not in (self.tokenizer.pad_token_id, getattr(self.model.config, "pad_token_id", None))
        self.path, self.batch_size, self.num_truncated = path, batch_size if pads else 1, 0
        self.empty = self._empty_text()
        self.label = choose_label(self.model.config, path, label)
        self.max_length = min(max_length(self.model.config), self.tokenizer.model_max_length or UNLIMITED)

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Return the probability of the label for each text."""
        values: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            part = list(texts[start : start + self.batch_size])
            lengths = map(len, self.tokenizer(part)["input_ids"])
            part = [text if length else self.empty for text, length in zip(part, lengths)]
            pads = self.batch_size > 1
            batch = self.tokenizer(part, padding=pads, return_tensors="pt")
            if batch["input_ids"].shape[1] > self.max_length:
                self.num_truncated += int((batch["attention_mask"].sum(1) > self.max_length).sum())
                batch = self.tokenizer(part, padding=pads, return_tensors="pt", truncation=True, max_length=self.max_length)
            with torch.no_grad():
                logits = self.model(**batch).logits
            independent = self.model.config.problem_type == "multi_label_classification"
            values += (logits.sigmoid() if independent else logits.softmax(1))[:, self.label].tolist()
        return values

    def _empty_text(self) -> str:
        """Return the substitute input for a text without tokens."""
        marks = (self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.unk_token, " ")
        for text in ("", *(mark for mark in marks if mark)):
            if self.tokenizer(text)["input_ids"]:
                return text
        raise ConfigError(
            f"classifier '{self.path}' has no token for an empty text, which a completion can be: choose another."
        )

    def describe(self) -> str:
        """Describe the reward in words."""
        return f"the probability of '{self.model.config.id2label[self.label]}' by the classifier '{self.path}'"


def check_classifier(path: str, label: str | None) -> None:
    """Raise `ConfigError` if a model is no classifier, or its label is not named."""
    from transformers import AutoConfig

    config = from_pretrained(AutoConfig, path, "sequence classifier")
    if not any("SequenceClassification" in str(name) for name in config.architectures or []):
        kind = ", ".join(map(str, config.architectures or [])) or "none"
        raise ConfigError(
            f"'{path}' is no sequence classifier (its architecture is {kind}), and a new head would score at random: give a "
            "classifier or a reward model."
        )
    choose_label(config, path, label)


def read_label(path: str, options: object) -> str | None:
    """Return the label in the options of a classifier; raise `ConfigError` for other options."""
    given = {} if options is None else options
    if not isinstance(given, Mapping) or any(key != "label" for key in cast("Mapping[Any, Any]", given)):
        raise ConfigError(f"reward.options of the classifier '{path}' must be a mapping with the key 'label' alone.")
    label = cast("Mapping[str, Any]", given).get("label")
    return None if label is None else str(label)


def choose_label(config: Any, path: str, label: str | None) -> int:
    """Return the number of the label whose probability is the reward.

    Raises `ConfigError` if it is neither given nor named as the positive one: labels such as
    LABEL_1 do not tell their meaning.
    """
    labels = {int(number): str(name) for number, name in cast("Mapping[Any, Any]", config.id2label).items()}
    setting = f"reward.options={{{path}: {{label: NAME}}}}"
    shown = ", ".join(labels.values())
    if len(labels) < 2:
        raise ConfigError(
            f"classifier '{path}' has one label ('{shown}'), whose probability means nothing: give a reward model."
        )
    if label is not None:
        for number, name in labels.items():
            if label.lower() in (name.lower(), str(number)):
                return number
        raise ConfigError(f"classifier '{path}' has no label '{label}', but {shown}: set {setting}.")
    positive = [number for number, name in labels.items() if name.upper() in ("POSITIVE", "POS")]
    if len(positive) == 1:
        return positive[0]
    raise ConfigError(
        f"classifier '{path}' has the labels {shown}, which do not say whose probability is the reward: name one with "
        f"{setting}."
    )
