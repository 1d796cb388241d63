"""Runs that cannot be trained are refused before any work."""

import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from helpers import small, tiny_model
from rlgf.config.loading import override
from rlgf.config.recipes import recipe
from rlgf.errors import ConfigError
from rlgf.pipeline import preflight
from rlgf.pipeline.build_models import load_pre_sft_model
from rlgf.pipeline.preflight import check_to_train
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.run import evaluate_policy_on_test, train
from rlgf.pipeline.stage_cache import StageCache, no_report


def test_a_folder_that_cannot_be_made_is_not_taken_for_a_full_disk(tmp_path: Path):
    """As under /proc, where there is no space either."""
    with pytest.raises(ConfigError, match="cannot be created"):
        train(small(), "/proc/no-such-folder/run", tmp_path / "stages")
    assert not list(tmp_path.iterdir())


def test_no_disk_space_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(10, 10, 0))
    with pytest.raises(ConfigError, match="free some space"):
        train(small(), tmp_path / "run", tmp_path / "stages")
    assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize(
    "change",
    [
        ("guide.options.right_aspct", 0.9),
        ("guide.spec", "model:nowhere"),
        ("critic.path", "nowhere"),
        ("task.data", "anywhere"),
        ("runtime.device", "abacus"),
        ("guide.sft.steps", 0),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_made(tmp_path: Path, change: tuple[str, object]):
    with pytest.raises(ConfigError):
        prepare(small(("algorithm.name", "lols"), change), tmp_path / "stages")
    assert not (tmp_path / "stages").exists()


def test_four_bits_are_refused_where_they_cannot_be_trained_through(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"lora\.load_in_4bit needs a GPU"):
        train(small(("lora.rank", 2), ("lora.load_in_4bit", True)), tmp_path)


def test_adapters_are_not_trained_on_weights_that_are_stored_nowhere(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"model is a new one: give model\.path, or set pretrain\.steps"):
        train(small(("lora.rank", 2), ("lora.in_sft", True)), tmp_path)


def test_a_reward_model_of_an_encoder_decoder_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 4)
    config = small(
        ("reward.path", "preferences"), ("preferences.data", str(tmp_path / "pairs.jsonl")),
        ("preferences.training.steps", 2), ("model.architecture", "t5"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"start from the policy, an encoder–decoder.*give preferences\.path"):
        prepare(config, tmp_path / "stages")
    assert not list((tmp_path / "stages").glob("*sft*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("policy", "{adapter}")], "critic.kind=separate is a whole model"),
        (
            [("lora.rank", 2), ("lora.in_sft", True), ("model.path", "{base}"), ("guide.spec", "sft")],
            "critic.kind=separate is a whole model",
        ),
        ([("policy", "{adapter}"), ("critic.kind", "value_head"), ("critic.path", "{base}")], "holds no value_head"),
        ([("critic.kind", "lora"), ("lora.rank", 2), ("critic.path", "{base}")], "holds no adapter"),
        ([("reward.path", "{adapter}")], "holds an adapter of a language model"),
        ([("judge.spec", "model:{adapter}")], "holds an adapter of a language model"),
        ([("judge.spec", "model:{base}/nothing")], "there is no such file or folder"),
        ([("reward.weights", {"task": 1.0, "{base}/nothing": 1.0})], "there is no such file or folder"),
        ([("judge.spec", "model:someone/nothing")], "no reward model can be loaded from 'someone/nothing' \\(there is no such"),
        ([("evaluation.best_of", 100_000)], "choose at most"),
        ([("lora.rank", 2), ("distill.num_completions", 4), ("distill.steps", 1)], "a distilled policy is a whole model"),
        ([("policy", "{base}"), ("model.path", "{other}"), ("evaluation.output_perplexity", True)], "has another vocabulary"),
    ],
)  # fmt: skip
def test_what_could_only_fail_later_is_refused_before_any_work(
    changes: list[tuple[str, Any]], words: str, toy_folder: Path, toy_adapter: Path, other_folder: Path, tmp_path: Path
):
    filled = {"{adapter}": str(toy_adapter), "{base}": str(toy_folder), "{other}": str(other_folder)}

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {fill(name): number for name, number in value.items()}
        for name, path in filled.items():
            value = value.replace(name, path) if isinstance(value, str) else value
        return value

    with pytest.raises(ConfigError, match=words):
        prepare(small(*((name, fill(value)) for name, value in changes)), tmp_path / "work")
    assert not list((tmp_path / "work").glob("*"))


def test_a_reward_that_nobody_named_and_a_person_who_is_not_there_are_refused_from_the_config(monkeypatch: pytest.MonkeyPatch):
    rows = override(recipe("prompts"), [("task.data", str(Path(__file__)))])
    with pytest.raises(ConfigError, match="task 'prompts' has no built-in reward"):
        check_to_train(resolve(rows))
    asked = small(("guide.spec", "human"), ("algorithm.name", "ppo_pp"))
    monkeypatch.setattr(preflight, "has_no_terminal", lambda: True)
    with pytest.raises(ConfigError, match="needs a terminal, and there is none"):
        check_to_train(resolve(asked))
    check_to_train(resolve(override(asked, [("algorithm.name", "ppo")])))  # who asks nobody needs nobody


def test_nobody_types_into_the_null_device_but_a_file_may_hold_what_somebody_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "answers").write_text("one\n")
    for path, expected in ((os.devnull, True), (str(tmp_path / "answers"), False)):
        with open(path) as file:
            monkeypatch.setattr("sys.stdin", file)
            assert preflight.has_no_terminal() == expected
    assert preflight.has_no_terminal()  # closed


def test_a_policy_of_another_vocabulary_is_refused_before_anything_is_trained(tmp_path: Path, other_folder: Path):
    with pytest.raises(ConfigError, match="has another vocabulary"):
        evaluate_policy_on_test(resolve(small()), str(other_folder), StageCache(tmp_path / "stages", no_report))
    assert not (tmp_path / "stages").exists()


def test_zero_shot_is_refused_where_only_the_policy_is_given(tmp_path: Path):
    config = small(("policy", "somewhere"))
    with pytest.raises(ConfigError, match="does not say which one that was"):
        load_pre_sft_model(resolve(config).policy, tiny_model(), StageCache(tmp_path, no_report))
