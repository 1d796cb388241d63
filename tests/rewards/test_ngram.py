"""The n-gram classifier: its features by hand, its training, and storage without pickle."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlgf.data.files import write_json
from rlgf.errors import ConfigError, Interrupted
from rlgf.interrupts import handle_signals
from rlgf.randomness import Purpose, uniforms
from rlgf.rewards.ngram import PAIRS, VOCABULARY, NgramClassifier, accuracy, as_bag, features, fragments, train_ngram
from rlgf.runs.steps import StepStore
from rlgf.types import Prompt

GOOD, BAD = ["great", "lovely", "brilliant", "superb"], ["awful", "boring", "dull", "messy"]
NEUTRAL = ["the", "film", "was", "and", "its", "story", "of", "a", "man", "who", "went", "home", "with", "plot"]


def reviews(count: int, split: int) -> tuple[list[str], list[int]]:
    """Neutral words with one in four of the label's own."""
    texts: list[str] = []
    labels = [i % 2 for i in range(count)]
    for i, label in enumerate(labels):
        draws = uniforms(split, Purpose.TASK, i, 40)
        words = [
            (GOOD if label else BAD)[int(16 * draw) % 4] if draw < 0.25 else NEUTRAL[int(1000 * draw) % len(NEUTRAL)]
            for draw in draws
        ]
        texts.append(" ".join(words))
    return texts, labels


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float], list[str]]:
    folder = tmp_path_factory.mktemp("ngram")
    reports: list[str] = []
    measured = train_ngram(folder, reviews(160, 1), reviews(40, 2), epochs=4, seed=0, report=reports.append)
    return folder, measured, reports


def test_features_are_pieces_and_hashed_pairs_each_once() -> None:
    pair = VOCABULARY + (5 * 1_000_003 + 7 * 7_919) % PAIRS
    assert features(np.array([5, 7])).tolist() == [5, 7, pair]
    repeated = features(np.array([5, 7, 5, 7])).tolist()
    assert repeated == sorted({5, 7, pair, VOCABULARY + (7 * 1_000_003 + 5 * 7_919) % PAIRS})
    assert features(np.array([5])).tolist() == [5]
    assert features(np.array([], dtype=np.int64)).tolist() == []


def test_the_largest_pair_has_a_place_in_the_table() -> None:
    assert int(features(np.array([VOCABULARY - 1, VOCABULARY - 1])).max()) < VOCABULARY + PAIRS


def test_rows_become_a_bag() -> None:
    flat, offsets = as_bag([np.array([3, 4]), np.array([], dtype=np.int64), np.array([5])])
    assert flat.tolist() == [3, 4, 5]
    assert offsets.tolist() == [0, 2, 2]
    flat, offsets = as_bag([])
    assert (flat.tolist(), offsets.tolist()) == ([], [])


def test_fragments_are_runs_of_their_rows() -> None:
    rows = [np.arange(10) + 100 * i for i in range(20)] + [np.arange(3)]
    found = fragments(rows, 4, seed=0, number=0)
    for row, fragment in zip(rows, found):
        assert fragment.tolist() == list(range(int(fragment[0]), int(fragment[0]) + min(4, len(row))))
        assert set(fragment) <= set(row)
    assert len({int(fragment[0]) % 100 for fragment in found}) > 3
    again = fragments(rows, 4, seed=0, number=0)
    assert all(np.array_equal(one, other) for one, other in zip(found, again))


def test_it_learns_a_toy_set(trained: tuple[Path, dict[str, float], list[str]]) -> None:
    folder, measured, reports = trained
    assert set(measured) == {"accuracy_whole", "accuracy_48_tokens", "accuracy_80_tokens", "accuracy_112_tokens"}
    assert min(measured.values()) == 1.0
    assert len(reports) == 4
    classifier = NgramClassifier.load(folder)
    good, bad = classifier.probabilities(["a superb film and a lovely plot", "an awful film and a dull plot"])
    assert 0 <= bad < 0.5 < good <= 1
    losses = [float(line.split()[-1]) for line in reports]
    assert losses == sorted(losses, reverse=True)


def test_it_is_stored_without_pickle_and_read_back_the_same(trained: tuple[Path, dict[str, float], list[str]]) -> None:
    folder, _, _ = trained
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["ngram.json", "tokenizer.json", "weights.safetensors"]
    texts = [*reviews(10, 3)[0], "", "unseen wörds 🙂", "GREAT", "great"]
    first = NgramClassifier.load(folder)
    second_folder = folder / "again"
    second_folder.mkdir()
    first.save(second_folder)
    second = NgramClassifier.load(second_folder)
    assert first.probabilities(texts) == second.probabilities(texts)
    assert torch.equal(first.weights, second.weights)
    assert first.bias == second.bias
    probabilities = first.probabilities(texts)
    assert probabilities[-1] == probabilities[-2]  # case does not matter
    assert all(0 <= probability <= 1 for probability in probabilities)


def test_training_is_a_function_of_its_seed(trained: tuple[Path, dict[str, float], list[str]], tmp_path: Path) -> None:
    folder, measured, reports = trained
    again: list[str] = []
    assert train_ngram(tmp_path, reviews(160, 1), reviews(40, 2), epochs=4, seed=0, report=again.append) == measured
    assert again == reports
    assert torch.equal(NgramClassifier.load(tmp_path).weights, NgramClassifier.load(folder).weights)


def test_a_text_is_judged_whatever_its_neighbours_and_its_prompt(
    trained: tuple[Path, dict[str, float], list[str]],
) -> None:
    classifier = NgramClassifier.load(trained[0])
    texts = reviews(6, 4)[0]
    alone = [classifier.probabilities([text])[0] for text in texts]
    assert classifier.probabilities(texts) == pytest.approx(alone, abs=1e-6)
    assert classifier([Prompt("a")] * 6, texts) == pytest.approx(alone, abs=1e-6)
    assert classifier.probabilities([]) == []


def test_accuracy_is_the_share_on_the_right_side_of_one_half(
    trained: tuple[Path, dict[str, float], list[str]],
) -> None:
    classifier = NgramClassifier.load(trained[0])
    texts, labels = reviews(8, 5)
    rows = [np.asarray(row.ids, dtype=np.int64) for row in classifier.tokenizer.encode_batch(texts)]
    assert accuracy(classifier, rows, labels) == 1.0
    assert accuracy(classifier, rows, [1 - label for label in labels]) == 0.0
    assert accuracy(classifier, rows, [1] * 8) == 0.5


@pytest.mark.parametrize("labels", [[0, 0], [1, 1], [0, 2], [-1, 1]])
def test_other_labels_than_0_and_1_are_refused(labels: list[int], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs labels 0 and 1"):
        train_ngram(tmp_path, (["a", "b"], labels), (["a"], [0]), 1, 0, lambda line: None)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "ngram.json", {"kind": "other"})
    with pytest.raises(ConfigError, match="is not an n-gram reward"):
        NgramClassifier.load(tmp_path)


@pytest.mark.integration
@pytest.mark.parametrize("after", [1, 3, 8])
def test_a_training_that_a_signal_stops_goes_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    train, test = reviews(160, 1), reviews(40, 2)  # 640 texts with their fragments, three steps an epoch
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    measured = train_ngram(tmp_path / "whole", train, test, epochs=3, seed=0, report=print)
    calls = list[int]()

    def count(rows: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == after:
            os.kill(os.getpid(), signal.SIGTERM)
        return as_bag(rows)

    with monkeypatch.context() as patch:
        patch.setattr("rlgf.rewards.ngram.as_bag", count)
        with pytest.raises(Interrupted), handle_signals(), StepStore(tmp_path, print) as store:
            train_ngram(tmp_path / "parts", train, test, epochs=3, seed=0, report=print, store=store)
    with StepStore(tmp_path, print) as store:
        assert store.load() is not None
        assert train_ngram(tmp_path / "parts", train, test, epochs=3, seed=0, report=print, store=store) == measured
    whole, parts = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
