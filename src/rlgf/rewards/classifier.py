"""Rewards by sequence classifiers."""

from collections.abc import Sequence
from typing import Any

import torch

from rlgf.errors import ConfigError
from rlgf.models.loading import from_pretrained, load_tokenizer
from rlgf.types import Prompt


class SequenceClassifier:
    """A Hugging Face sequence classifier as reward: the probability of its positive class.

    It takes text, so it may have any tokenizer.
    """

    def __init__(self, path: str, batch_size: int = 32) -> None:
        from transformers import AutoModelForSequenceClassification

        self.model: Any = from_pretrained(AutoModelForSequenceClassification, path, "sequence classifier").eval()
        self.tokenizer: Any = load_tokenizer(path)
        self.path, self.batch_size = path, batch_size
        self.positive = _positive_class(self.model.config, path)
        limits = [getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        self.max_length = min(limit for limit in limits if limit)

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Return the probability of the positive class for each text.

        Raises `ValueError` for a text longer than `max_length`; nothing is truncated.
        """
        values: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(list(texts[start : start + self.batch_size]), padding=True, return_tensors="pt")
            if batch["input_ids"].shape[1] > self.max_length:
                raise ValueError(
                    f"an input has {batch['input_ids'].shape[1]} tokens, but the context of '{self.path}' is {self.max_length}"
                )
            with torch.no_grad():
                logits = self.model(**batch).logits
            chosen = logits.sigmoid()[:, 0] if logits.shape[1] == 1 else logits.softmax(1)[:, self.positive]
            values += chosen.tolist()
        return values


def _positive_class(config: Any, path: str) -> int:
    labels = {int(number): str(name).upper() for number, name in config.id2label.items()}
    for number, name in labels.items():
        if name in ("POSITIVE", "POS", "LABEL_1"):
            return number
    if len(labels) == 1:
        return 0
    raise ConfigError(f"classifier '{path}' has labels {sorted(labels.values())}: one must be named POSITIVE, POS or LABEL_1.")
