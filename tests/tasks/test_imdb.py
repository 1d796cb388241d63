"""The IMDB task: its prompts and targets, on made reviews; and on the real ones, with local folders in place of Hub names."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlgf.config.loading import override
from rlgf.config.recipes import imdb as imdb_recipe
from rlgf.config.recipes import imdb_small
from rlgf.config.sections import TaskConfig
from rlgf.data.files import read_complete_lines
from rlgf.errors import INPUT_ERRORS
from rlgf.pipeline.run import train
from rlgf.pipeline.stages import train_tokenizer
from rlgf.tasks import imdb

WORDS = ["the", "film", "was", "a", "great", "joy", "and", "its", "cast", "moved", "me", "dull", "café", "😀", "naïve"]


def review(number: int, words: int = 40) -> str:
    return " ".join(WORDS[(number * 7 + i * (1 + number % 3)) % len(WORDS)] for i in range(words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reviews")
    for split, count in {"train": 40, "test": 24, "unsup": 30}.items():
        with gzip.open(folder / f"{split}.jsonl.gz", "wt") as file:
            for number in range(count):
                file.write(json.dumps({"text": review(number), "label": number % 2}) + "\n")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([review(number) for number in range(50)], 300)


def config(folder: Path, **options: Any) -> TaskConfig:
    return TaskConfig("imdb", str(folder), max_new_tokens=8, min_new_tokens=8, options=options)


def test_first_tokens_are_exactly_those_of_the_review(folder: Path, tokenizer: Any):
    task = imdb.TASK.build(config(folder, prompt="first", prompt_tokens=10), tokenizer)
    texts = {review(number) for number in range(40)}
    for prompt in task.train:
        assert prompt.ids is not None
        assert len(prompt.ids) <= 10
        assert tokenizer.decode(prompt.ids) == prompt.text
        assert "\ufffd" not in prompt.text  # a token that ends inside a character leaves the prompt
        assert prompt.text + prompt.references[0] in texts
    assert sum(len(prompt.ids or ()) == 10 for prompt in task.train) > len(task.train) / 2


def test_half_a_review_by_words_keeps_its_end(folder: Path, tokenizer: Any):
    task = imdb.TASK.build(config(folder, prompt="half", prompt_tokens=6), tokenizer)
    words = review(0).split()
    first = task.train[0]
    assert first.references[0] == " " + " ".join(words[20:])
    assert first.ids is not None
    assert 3 <= len(first.ids) <= 6  # a cut inside a character moves to its end
    assert " ".join(words[:20]).endswith(first.text)


def test_only_positive_reviews_are_targets(folder: Path, tokenizer: Any):
    task = imdb.TASK.build(config(folder, prompt="first", prompt_tokens=10), tokenizer)
    assert all(bool(prompt.sft_targets) == (prompt.columns["label"] == 1) for prompt in task.train)
    assert all(prompt.references for prompt in task.train)


def test_validation_and_test_prompts_are_apart(folder: Path, tokenizer: Any):
    task = imdb.TASK.build(config(folder, held_out_prompts=12), tokenizer)
    assert len(task.validation) == len(task.test) == 12


def test_reviews_that_are_too_short_are_counted(tmp_path: Path, tokenizer: Any):
    rows = [{"text": "great", "label": 1}] * 3 + [{"text": review(i), "label": 1} for i in range(9)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = imdb.TASK.build(config(tmp_path / "all.jsonl", prompt="first", prompt_tokens=10), tokenizer)
    assert sum(task.dropped_rows.values()) == 3
    assert len(task.train) + len(task.validation) + len(task.test) in (8, 9)  # an odd one of the held-out rows is left


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a b c", "labels": 1}], "no column 'label'"),
        ([{"text": " ", "label": 1}] * 8, "empty"),
        ([], "holds no rows"),
    ],
)
def test_unusable_reviews_are_refused(tmp_path: Path, tokenizer: Any, rows: list[dict[str, Any]], words: str):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(INPUT_ERRORS, match=words):
        imdb.TASK.build(config(tmp_path), tokenizer)


SMALL = [
    ("ppo.iterations", 1),
    ("ppo.completions_per_iteration", 4),
    ("ppo.minibatch_size", 2),
    ("ppo.epochs", 1),
    ("evaluation.every", 0),
    ("evaluation.final_prompts", 4),
    ("sft.epochs", 0.0),
    ("sft.steps", 2),
    ("sft.batch_size", 2),
    ("task.max_new_tokens", 6),
    ("task.min_new_tokens", 6),
    ("runtime.trackers", []),
]


@pytest.mark.integration
def test_imdb_small_runs_from_raw_text_to_a_table(folder: Path, tmp_path: Path):
    changes = [
        ("task.data", str(folder)), ("task.options.prompt_tokens", 8), ("model.vocabulary", 300), ("model.layers", 1),
        ("model.width", 16), ("model.heads", 2), ("model.max_length", 32), ("pretrain.steps", 2), ("pretrain.batch_size", 2),
        ("reward.epochs", 1), ("algorithm.name", "d2lols"),
    ]  # fmt: skip
    trainer = train(override(imdb_small(), [*SMALL, *changes]), tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())["evaluation"]
    assert {"score", "score_continuation", "kl", "perplexity", "output_perplexity", "distinct_2"} <= set(results)
    assert trainer.components.task.scores_full_text
    assert {path.name.split("-")[0] for path in (tmp_path / "run" / "stages").iterdir()} == {
        "tokenizer",
        "pretrain",
        "sft",
        "reward",
    }


def hub_like_folders(shared_data: Path, folder: Path) -> tuple[Path, Path]:
    """A GPT-2 and a DistilBERT sentiment classifier of tiny size, with the real tokenizers, saved as the Hub has them."""
    from transformers import (
        BertTokenizerFast,
        DistilBertConfig,
        DistilBertForSequenceClassification,
        GPT2Config,
        GPT2LMHeadModel,
        GPT2TokenizerFast,
    )

    torch.manual_seed(0)
    policy, judge = folder / "gpt2", folder / "distilbert"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2)).save_pretrained(policy)
    GPT2TokenizerFast.from_pretrained(shared_data / "tokenizers" / "gpt2").save_pretrained(policy)
    labels = {"id2label": {0: "NEGATIVE", 1: "POSITIVE"}, "label2id": {"NEGATIVE": 0, "POSITIVE": 1}}
    shape = DistilBertConfig(dim=16, n_layers=1, n_heads=2, hidden_dim=32, **labels)
    DistilBertForSequenceClassification(shape).save_pretrained(judge)
    BertTokenizerFast.from_pretrained(shared_data / "tokenizers" / "bert-base-uncased").save_pretrained(judge)
    return policy, judge


@pytest.mark.data
@pytest.mark.parametrize("algorithm", ["ppo_pp", "aggrevated"])
def test_the_papers_recipe_runs_with_local_folders_in_place_of_hub_names(shared_data: Path, tmp_path: Path, algorithm: str):
    policy, judge = hub_like_folders(shared_data, tmp_path)
    reviews = tmp_path / "imdb"
    reviews.mkdir()
    for split in ("train", "test"):
        with gzip.open(shared_data / "imdb" / f"{split}.jsonl.gz", "rt") as file:
            lines = [line for number, line in enumerate(file) if number % 250 == 0]
        (reviews / f"{split}.jsonl").write_text("".join(lines))
    changes = [
        ("task.data", str(reviews)),
        ("model.path", str(policy)),
        ("reward.path", str(judge)),
        ("algorithm.name", algorithm),
    ]
    train(override(imdb_recipe(), [*SMALL, *changes]), tmp_path / "run")
    rows = read_complete_lines(tmp_path / "run" / "rollouts.jsonl")
    assert all(0 < row["score"] < 1 for row in rows)
    assert read_complete_lines(tmp_path / "run" / "metrics.jsonl")[0]["first_ratio_error"] < 1e-4


@pytest.mark.data
def test_a_real_llama_model_is_trained_on_real_reviews(shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "short_words.py").write_text(
        "def reward(prompts, texts):\n    return [float(t.count('the')) / (1 + len(t)) for t in texts]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    changes = [
        ("task.data", str(shared_data / "imdb" / "test.jsonl.gz")), ("policy", str(shared_data / "stories260k" / "hf")),
        ("model.path", str(shared_data / "stories260k" / "hf")), ("reward.path", "python:short_words:reward"),
        ("algorithm.name", "lols"), ("task.options.prompt_tokens", 16), ("task.min_new_tokens", 0),
    ]  # fmt: skip
    train(override(imdb_recipe(), [*SMALL, *changes]), tmp_path / "run")
    metrics = read_complete_lines(tmp_path / "run" / "metrics.jsonl")[0]
    assert metrics["first_ratio_error"] < 1e-4
    assert metrics["trained_tokens"] > 0


def test_unlabeled_reviews_of_the_hub_have_another_split(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: list[str] = []

    def read_rows(source: str, split: str, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
        asked.append(split)
        return [{"text": "a review"}]

    monkeypatch.setattr(imdb, "read_rows", read_rows)
    for source in (imdb_small().task.data, str(folder)):
        assert imdb.raw_texts(TaskConfig("imdb", source), 0) == ["a review"]
    assert asked == ["unsupervised", "unsup"]
