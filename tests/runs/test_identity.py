"""The identity of a run: what it holds, and what happens when it changes."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import FinishedRun, config_of, small
from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.config.variants import build_variants, plan_comparison
from rlgf.data.checksums import read_checked_json
from rlgf.data.files import read_complete_lines
from rlgf.errors import ConfigError, DataError
from rlgf.experiments.compare import compare
from rlgf.pipeline.run import train
from rlgf.runs.directory import IDENTITY, RunDirectory, identifying_settings
from rlgf.runs.identity import find_differences, with_contents

RULE = "from rule import score\n\ndef reward(prompts, texts):\n    return [score(text) for text in texts]\n"


@pytest.fixture
def reward_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A reward in a module that imports its rule from a module beside it."""
    (tmp_path / "own_reward.py").write_text(RULE)
    (tmp_path / "rule.py").write_text("def score(text):\n    return float(len(text))\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "python:own_reward:reward"
    for name in ("own_reward", "rule"):
        sys.modules.pop(name, None)


def change_rule(folder: Path) -> None:
    (folder / "rule.py").write_text("def score(text):\n    return -float(len(text))\n")
    for name in ("own_reward", "rule"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


def open_run(folder: Path, config: Config, **options: Any) -> RunDirectory:
    directory = RunDirectory(folder, config, **options)
    directory.check_identity()
    directory.create(config)
    return directory


def rows_in(tmp_path: Path, name: str, text: str) -> Path:
    path = tmp_path / name / "rows.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("task.options.chat_template", "template"), ("guide.options.chat_template", "template"),
        ("task.options.files", ["./template", "other"]), ("evaluation.metric_options.a", ["./template"]),
    ],
)  # fmt: skip
def test_files_in_options_are_compared_by_their_bytes(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert with_contents({key: value})[key] == value
    Path("template").write_text("a")
    before = with_contents({key: value})
    assert f"content of {key}" in before
    Path("template").write_text("b")
    assert find_differences(before, with_contents({key: value})) == [f"the content of {key} has changed"]


def test_data_are_compared_by_their_bytes_and_not_by_their_place(tmp_path: Path) -> None:
    data = rows_in(tmp_path, "here", '{"prompt": "a"}\n')
    open_run(tmp_path / "run", config_of(task__data=str(data)))
    open_run(tmp_path / "run", config_of(task__data=str(rows_in(tmp_path, "there", '{"prompt": "a"}\n'))))
    status = data.stat()
    data.write_text('{"prompt": "b"}\n')
    with pytest.raises(ConfigError, match=r"holds another run \(the content of task\.data has changed\).*--accept-changes"):
        open_run(tmp_path / "run", config_of(task__data=str(data)))
    assert data.stat().st_size == status.st_size


def test_a_model_folder_and_a_template_are_compared_by_their_bytes(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"1")
    (tmp_path / "template.txt").write_text("{prompt}")
    changes = {"policy": str(tmp_path / "model"), "judge__template": str(tmp_path / "template.txt")}
    settings = identifying_settings(config_of(**changes, guide__spec=f"model:{tmp_path / 'model'}"))
    before = with_contents(settings)
    (tmp_path / "model" / "weights").write_bytes(b"2")
    assert find_differences(before, with_contents(settings)) == [
        "the content of policy has changed", "the content of guide.spec has changed",
    ]  # fmt: skip
    (tmp_path / "template.txt").write_text("{prompt}!")
    assert "the content of judge.template has changed" in find_differences(before, with_contents(settings))


def test_a_reward_is_compared_with_what_it_imports_from_its_folder(tmp_path: Path, reward_path: str) -> None:
    config = config_of(reward__path=reward_path)
    open_run(tmp_path / "run", config)
    open_run(tmp_path / "run", config)
    change_rule(tmp_path)
    with pytest.raises(ConfigError, match=r"the source of reward\.path has changed"):
        open_run(tmp_path / "run", config)


def test_another_version_of_a_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_run(tmp_path / "run", config_of())
    monkeypatch.setattr("rlgf.runs.identity.version", lambda name: "0.0.1")
    with pytest.raises(ConfigError, match=r"version of torch is '2.*' there, '0\.0\.1' here"):
        open_run(tmp_path / "run", config_of())


def test_accepted_changes_are_recorded_with_where_they_began(tmp_path: Path) -> None:
    first = open_run(tmp_path / "run", config_of(kl__coefficient=0.1))
    first.save_checkpoint(2, {"n": 2})
    second = open_run(tmp_path / "run", config_of(kl__coefficient=0.2), accept_changes=True)
    assert second.load_checkpoint() == (2, {"n": 2})
    history = read_checked_json(tmp_path / "run" / IDENTITY)["history"]
    assert [entry["after_iterations"] for entry in history] == [0, 2]
    assert history[1]["changes"] == ["kl.coefficient is 0.1 there, 0.2 here"]
    open_run(tmp_path / "run", config_of(kl__coefficient=0.2))  # the config is the new one
    with pytest.raises(ConfigError, match=r"kl\.coefficient is 0\.2 there, 0\.1 here"):
        open_run(tmp_path / "run", config_of(kl__coefficient=0.1))


def test_the_machine_may_be_another(tmp_path: Path) -> None:
    open_run(tmp_path / "run", config_of(runtime__threads=1))
    open_run(tmp_path / "run", config_of(runtime__threads=2, guide__endpoint__retries=1))


@pytest.mark.parametrize("name", ["config.yaml", IDENTITY])
def test_a_damaged_config_or_identity_is_refused(tmp_path: Path, name: str) -> None:
    open_run(tmp_path / "run", config_of())
    file = tmp_path / "run" / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    with pytest.raises(DataError, match=name):
        open_run(tmp_path / "run", config_of())


def test_a_run_without_an_identity_is_refused(tmp_path: Path) -> None:
    open_run(tmp_path / "run", config_of())
    (tmp_path / "run" / IDENTITY).unlink()
    with pytest.raises(ConfigError, match=r"of an earlier rlgf, without identity\.json"):
        RunDirectory(tmp_path / "run", config_of())


def test_a_run_that_was_killed_between_its_two_first_files_begins_again(tmp_path: Path) -> None:
    open_run(tmp_path / "run", config_of())
    (tmp_path / "run" / "config.yaml").unlink()
    open_run(tmp_path / "run", config_of(seed=3))


def timeless(path: Path) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second")
    return [{key: value for key, value in row.items() if not key.startswith(times)} for row in read_complete_lines(path)]


@pytest.mark.integration
def test_a_finished_run_with_another_reward_is_refused_by_train_and_compare(tmp_path: Path, reward_path: str) -> None:
    config = small(("reward.path", reward_path), ("evaluation.every", 0), ("ppo.iterations", 1))
    plan = plan_comparison(config, build_variants(config, ["ppo"], {}), [0])
    results = compare(plan, tmp_path / "all")
    assert compare(plan, tmp_path / "all")["rows"] == results["rows"]
    change_rule(tmp_path)
    with pytest.raises(ConfigError, match=r"ppo-seed0 holds another run \(the source of reward\.path"):
        compare(plan, tmp_path / "all")
    with pytest.raises(ConfigError, match=r"the source of reward\.path has changed"):
        train(config, tmp_path / "all" / "runs" / "ppo-seed0", tmp_path / "all" / "stages")


@pytest.mark.integration
def test_a_finished_run_is_trained_longer_bit_for_bit(
    finished_run: Callable[[str], FinishedRun], stages: Path, tmp_path: Path
) -> None:
    whole, parts = finished_run("d2lols"), tmp_path / "parts"
    shorter = override(whole.config, [("ppo.iterations", 2)])
    train(shorter, parts, stages)
    first = read_checked_json(parts / "results.json")
    train(whole.config, parts, stages)
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl"):
        assert timeless(parts / name) == timeless(whole.folder / name), name
    for name in ("policy", "best-policy"):
        weights = [(run / name / "model.safetensors").read_bytes() for run in (whole.folder, parts)]
        assert weights[0] == weights[1], name
    results = [read_checked_json(run / "results.json")["evaluation"] for run in (whole.folder, parts)]
    assert results[0] == results[1]
    assert read_checked_json(parts / "results-after-2-iterations.json") == first
    with pytest.raises(ConfigError, match=r"ppo\.iterations is 3 there, 2 here"):
        train(shorter, parts, stages)


def test_a_run_whose_learning_rate_decays_is_not_trained_longer(tmp_path: Path) -> None:
    open_run(tmp_path / "run", config_of(ppo__iterations=3, ppo__schedule="linear"))
    with pytest.raises(ConfigError, match=r"from 3 to 5 iterations: with ppo\.schedule=linear its learning rates depend"):
        open_run(tmp_path / "run", config_of(ppo__iterations=5, ppo__schedule="linear"))
