"""A small sentiment classifier: logistic regression on hashed subwords and their pairs.

It takes text and is stored without pickle. It is trained on whole reviews and on random fragments
of them, because the completions that it scores are short.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from rlgf.data.checksums import verify_folder
from rlgf.data.files import read_json, write_json
from rlgf.errors import ConfigError
from rlgf.interrupts import Steps, deferred
from rlgf.randomness import Purpose, permutation, uniforms
from rlgf.types import Prompt

VOCABULARY = 4096
PAIRS = 2**18
FRAGMENTS = (48, 80, 112)
KIND = "rlgf-ngram"


class NgramClassifier:
    """A classifier of texts by the subwords, and pairs of subwords, that they contain."""

    def __init__(self, tokenizer: Any, weights: torch.Tensor, bias: float) -> None:
        self.tokenizer, self.weights, self.bias = tokenizer, weights, bias

    @classmethod
    def load(cls, folder: Path) -> "NgramClassifier":
        """Load a classifier from a folder written by `rlgf reward`."""
        verify_folder(str(folder))
        found: Any = read_json(folder / "ngram.json")
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise ConfigError(f"{folder}/ngram.json is not an n-gram reward made by `rlgf reward`.")
        tensors = load_file(folder / "weights.safetensors")
        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")), tensors["weights"], float(tensors["bias"]))

    def save(self, folder: Path) -> None:
        """Write tokenizer, weights and a marker file."""
        self.tokenizer.save(str(folder / "tokenizer.json"))
        save_file({"weights": self.weights, "bias": torch.tensor(self.bias)}, folder / "weights.safetensors")
        write_json(folder / "ngram.json", {"kind": KIND, "vocabulary": VOCABULARY, "pairs": PAIRS})

    def probabilities(self, texts: Sequence[str]) -> list[float]:
        """Return the probability of the positive class for each text."""
        encoded = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return self._of_features([features(np.asarray(row.ids, dtype=np.int64)) for row in encoded])

    def _of_features(self, rows: Sequence[NDArray[np.int64]]) -> list[float]:
        flat, offsets = as_bag(rows)
        logits = torch.nn.functional.embedding_bag(flat, self.weights[:, None], offsets, mode="sum").squeeze(1) + self.bias
        return torch.sigmoid(logits).tolist()

    def __call__(self, prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        """Return the reward of each text, which does not depend on its prompt."""
        return self.probabilities(texts)


def features(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the distinct subwords and hashed adjacent pairs of a text."""
    pairs = VOCABULARY + (ids[:-1] * 1_000_003 + ids[1:] * 7_919) % PAIRS
    return np.unique(np.concatenate([ids, pairs]))


def as_bag(rows: Sequence[NDArray[np.int64]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows of feature ids as flat ids and row offsets, for `embedding_bag`."""
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    flat = np.concatenate(rows) if len(rows) else np.zeros(0, dtype=np.int64)
    return torch.from_numpy(flat), torch.from_numpy(np.cumsum(sizes) - sizes)


def train_ngram(
    folder: Path,
    train: tuple[list[str], list[int]],
    test: tuple[list[str], list[int]],
    epochs: int,
    seed: int,
    report: Callable[[str], None],
    store: Steps | None = None,
) -> dict[str, float]:
    """Train a classifier on texts with labels 0 and 1 and save it to `folder`.

    Returns test accuracies on whole texts and on fragments.
    """
    if set(train[1]) != {0, 1}:
        raise ConfigError(f"a sentiment reward needs labels 0 and 1; the training texts have {sorted(set(train[1]))}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(  # pyright: ignore[reportCallIssue]
        vocab_size=VOCABULARY, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    order = permutation(seed, Purpose.SUPERVISED, 0, len(train[0]))
    tokenizer.train_from_iterator([train[0][i] for i in order[:8000]], trainer)
    encoded = [np.asarray(row.ids, dtype=np.int64) for row in tokenizer.encode_batch(train[0], add_special_tokens=False)]
    rows = [features(ids) for ids in encoded]
    labels = list(train[1])
    for number, size in enumerate(FRAGMENTS):
        rows += [features(ids) for ids in fragments(encoded, size, seed, number)]
        labels += train[1]
    classifier = NgramClassifier(tokenizer, torch.zeros(VOCABULARY + PAIRS), 0.0)
    _fit(classifier, rows, torch.tensor(labels, dtype=torch.float32), epochs, seed, report, store)
    classifier.save(folder)
    held_out = [np.asarray(row.ids, dtype=np.int64) for row in tokenizer.encode_batch(test[0], add_special_tokens=False)]
    metrics = {"accuracy_whole": accuracy(classifier, held_out, test[1])}
    for number, size in enumerate(FRAGMENTS):
        metrics[f"accuracy_{size}_tokens"] = accuracy(classifier, fragments(held_out, size, seed, 10 + number), test[1])
    return metrics


def fragments(rows: Sequence[NDArray[np.int64]], size: int, seed: int, number: int) -> list[NDArray[np.int64]]:
    """Return `size` consecutive ids of each row, from a random start."""
    numbers = uniforms(seed, Purpose.TASK, 100 + number, len(rows))
    starts = [int(u * max(1, len(row) - size + 1)) for u, row in zip(numbers, rows)]
    return [row[start : start + size] for row, start in zip(rows, starts)]


def accuracy(classifier: NgramClassifier, rows: Sequence[NDArray[np.int64]], labels: Sequence[int]) -> float:
    """Return the fraction of rows classified correctly at a threshold of one half."""
    guesses = classifier._of_features([features(row) for row in rows])  # pyright: ignore[reportPrivateUsage]
    return float(np.mean([(guess > 0.5) == bool(label) for guess, label in zip(guesses, labels)]))


def _fit(
    classifier: NgramClassifier, rows: list[NDArray[np.int64]], labels: torch.Tensor, epochs: int, seed: int,
    report: Callable[[str], None], store: Steps | None,
) -> None:  # fmt: skip
    """Train the weights of a classifier; `store` lets an interrupted training resume."""
    table = torch.nn.EmbeddingBag(VOCABULARY + PAIRS, 1, mode="sum", sparse=True)
    torch.nn.init.zeros_(table.weight)
    bias = torch.nn.Parameter(torch.zeros(1))
    batch, losses = 256, 0.0
    sparse = torch.optim.SparseAdam(table.parameters(), lr=0.002)
    dense = torch.optim.Adam([bias], lr=0.002)
    step, batches, order = 0, math.ceil(len(rows) / batch), np.zeros(0, dtype=np.int64)

    def state() -> dict[str, Any]:
        optimizers = [sparse.state_dict(), dense.state_dict()]
        return {"step": step, "losses": losses, "weights": [table.weight.data, bias.data], "optimizers": optimizers}

    if store is not None:
        if (found := store.load()) is not None:
            step, losses = found["step"], found["losses"]
            for parameter, weight in zip((table.weight, bias), found["weights"], strict=True):
                parameter.data.copy_(weight)
            for optimizer, values in zip((sparse, dense), found["optimizers"], strict=True):
                optimizer.load_state_dict(values)
        store.capture = state
    while step < epochs * batches:
        epoch, place = divmod(step, batches)
        if place == 0 or not len(order):
            order = permutation(seed, Purpose.SUPERVISED, 1 + epoch, len(rows))
        with deferred(f"step {step + 1} of {epochs * batches}"):
            members = order[place * batch : (place + 1) * batch]
            flat, offsets = as_bag([rows[i] for i in members])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                table(flat, offsets).squeeze(1) + bias, labels[torch.from_numpy(members)]
            )
            loss.backward()
            losses = float(loss.detach()) * len(members) + (losses if place else 0.0)
            for optimizer in (sparse, dense):
                optimizer.step()
                optimizer.zero_grad()
            step += 1
        if place + 1 == batches:
            report(f"epoch {epoch + 1}/{epochs} · loss {losses / len(rows):.3f}")
    classifier.weights = table.weight.detach().squeeze(1).clone()
    classifier.bias = float(bias.detach())
