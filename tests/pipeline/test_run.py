"""From a config to a finished run, and the errors that are raised before any work."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from threading import get_ident
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import FinishedRun, small, tiny_model, with_fast
from rlgf.cli import options
from rlgf.cli.console import profile_summary
from rlgf.config.loading import dump, override
from rlgf.data.checksums import read_checked_json, write_checked_json, write_manifest
from rlgf.data.files import json_safe, read_complete_lines
from rlgf.errors import CheckpointError, ConfigError, DataError, TrainingError
from rlgf.pipeline.preflight import check_to_train
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.run import train
from rlgf.rl.tensors import Experience
from rlgf.runs.checkpoints import load_state
from rlgf.runs.recorder import rollout_rows
from rlgf.trainer import Trainer
from rlgf.types import Prompt

TIMES = ("seconds", "tokens_per_second")


def without_times(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


def timeless(path: Path) -> list[dict[str, Any]]:
    return without_times(read_complete_lines(path))


Finished = Callable[[str], FinishedRun]


def test_a_run_leaves_every_part_of_the_contract(finished_run: Finished):
    run = finished_run("d2lols").folder
    for name in ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl", "results.json", "policy", "checkpoints"):
        assert (run / name).exists(), name
    assert len(read_complete_lines(run / "metrics.jsonl")) == 3
    rows = read_complete_lines(run / "rollouts.jsonl")
    assert len(rows) == 24
    for row in rows:
        assert "".join(span["text"] for span in row["spans"]) == row["text"]
        assert {span["origin"] for span in row["spans"]} <= {"policy", "guide"}
    assert AutoModelForCausalLM.from_pretrained(run / "policy").config.vocab_size == 42


def test_every_metric_is_explained(finished_run: Finished):
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for row in read_complete_lines(finished_run("d2lols").folder / "metrics.jsonl"):
        for key in [*row, *row.get("evaluation", {})]:
            assert f"`{key}`" in text, key


@pytest.mark.parametrize("algorithm", with_fast(["ppo", "ppo_pp", "aggrevated", "lols", "d2lols"], "d2lols"))
def test_the_golden_run_is_bit_identical_twice(algorithm: str, finished_run: Finished, stages: Path):
    run, trainer = finished_run(algorithm), Trainer(prepare(finished_run(algorithm).config, stages))
    rows, rollouts = list[dict[str, Any]](), list[dict[str, Any]]()
    for step in trainer.iterate():
        rows.append(step.metrics)
        scores = step.experience.score.tolist()
        rollouts += rollout_rows(step.experience.rollout, scores, step.metrics["iteration"], trainer.codec)
    assert timeless(run.folder / "metrics.jsonl") == without_times(json_safe(rows))
    assert timeless(run.folder / "rollouts.jsonl") == rollouts
    first, second = (each.components.models.policy.model.state_dict() for each in (run.trainer, trainer))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.integration
def test_a_run_goes_on_from_its_last_checkpoint(
    finished_run: Finished, tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, update = finished_run("d2lols"), Trainer.update

    def breaks(self: Trainer, experience: Experience, iteration: int) -> Any:
        if iteration == 2:
            raise KeyboardInterrupt
        return update(self, experience, iteration)

    monkeypatch.setattr(Trainer, "update", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(whole.config, tmp_path / "run", stages)
    monkeypatch.setattr(Trainer, "update", update)
    train(whole.config, tmp_path / "run", stages)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert timeless(tmp_path / "run" / name) == timeless(whole.folder / name)
    first, second = (
        load_state(run / "checkpoints" / "iteration-000003")["loop"]["updater"]["policy"]
        for run in (whole.folder, tmp_path / "run")
    )
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.integration
def test_files_of_another_format_version_are_refused(finished_run: Finished, stages: Path, tmp_path: Path):
    config, run = finished_run("d2lols").config, shutil.copytree(finished_run("d2lols").folder, tmp_path / "run")
    (name,) = (line.split()[-1] for line in finished_run("d2lols").lines if line.startswith("sft: "))
    stage = shutil.copytree(stages / name, tmp_path / "stages" / name) / "stage.json"
    found = json.loads(stage.read_text())
    assert found["format_version"] == json.loads((run / "results.json").read_text())["format_version"] == 1
    write_checked_json(run / "results.json", {"evaluation": {}})
    with pytest.raises(DataError, match=r"results\.json has format version None, and this rlgf reads version 1"):
        train(config, run, tmp_path / "stages")
    (run / "results.json").unlink()
    for manifest in run.glob("checkpoints/*/manifest.json"):
        write_checked_json(manifest, {**read_checked_json(manifest), "format_version": 0})
    with pytest.raises(CheckpointError, match="has format version 0"):
        train(config, run, tmp_path / "stages")
    stage.write_text(json.dumps({**found, "format_version": 0}))
    write_manifest(stage.parent, {})
    with pytest.raises(DataError, match=r"stage\.json has format version 0"):
        train(config, tmp_path / "other", tmp_path / "stages")
    (run / "config.yaml").write_text((run / "config.yaml").read_text().partition("\n")[2])
    with pytest.raises(ConfigError, match="before format version 1"):
        train(config, run, tmp_path / "stages")


def test_a_complete_run_is_reused(finished_run: Finished, stages: Path):
    run = finished_run("d2lols")
    results = [run.folder / "results.json", *(run.folder / "policy").iterdir(), *run.folder.glob("checkpoints/*/*")]
    before = [path.stat().st_mtime_ns for path in results]
    train(run.config, run.folder, stages)
    assert [path.stat().st_mtime_ns for path in results] == before


@pytest.mark.integration
def test_stages_are_reused_when_they_match_and_not_otherwise(tmp_path: Path):
    lines: list[str] = []
    prepare(small(), tmp_path, lines.append)
    prepare(small(), tmp_path, lines.append)
    prepare(small(("sft.steps", 4)), tmp_path, lines.append)
    sft = [line for line in lines if line.startswith("sft:")]
    assert [line.split()[1] for line in sft] == ["making", "reusing", "making"]


def test_a_run_can_be_run_again_from_its_config(finished_run: Finished):
    run = finished_run("d2lols")
    again = options.read_config(str(run.folder / "config.yaml"))
    assert again == run.config
    assert dump(again) == dump(run.config)


@pytest.mark.integration
@pytest.mark.parametrize(("late", "told"), [("None", "TypeError"), ("sys.exit(0)", "SystemExit: 0")])
def test_a_guide_that_fails_while_training_leaves_a_checkpoint(
    late: str, told: str, tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch
):
    name = f"late_guide_{told[:4].lower()}"
    (tmp_path / f"{name}.py").write_text(
        "import sys\n"
        "calls = 0\n"
        "def guide(requests):\n"
        "    global calls\n"
        "    calls += 1\n"
        f"    return ['great acting'] * len(requests) if calls < 3 else {late}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = small(("algorithm.name", "ppo_pp"), ("guide.spec", f"python:{name}:guide"), ("algorithm.options.ppo_pp.beta", 1.0))
    with pytest.raises(TrainingError, match=rf"the guide failed on \d requests \({told}"):
        train(config, tmp_path / "run", stages)
    saved = [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert int(saved[0].split("-")[1]) >= 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return [0.0]", "numbers for"),
        ("return [None] * len(texts)", "finite"),
        ("return [float('nan')] * len(texts)", "finite"),
        ("raise ValueError('no')", "failed"),
    ],
)
def test_a_reward_that_fails_its_probe_is_refused(
    tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch, body: str, words: str
):
    name = f"reward_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def reward(prompts, texts):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=words):
        prepare(small(("reward.path", f"python:{name}:reward")), stages)


@pytest.mark.parametrize(
    "body", ["return None", "return ['a']*(len(requests)+1)", "raise OSError('gone')", "return [None]*len(requests)"]
)
def test_a_guide_that_fails_its_probe_is_refused(tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch, body: str):
    name = f"guide_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(f"def guide(requests):\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="probe"):
        prepare(small(("guide.spec", f"python:{name}:guide"), ("algorithm.name", "aggrevated")), stages)


def test_an_output_folder_that_holds_another_run_is_refused(finished_run: Finished, tmp_path: Path, stages: Path):
    run = finished_run("d2lols")
    with pytest.raises(ConfigError, match="another run"):
        train(override(run.config, [("seed", 1)]), run.folder, stages)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not a run"):
        train(small(), tmp_path / "other", stages)


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="exceeds the model's context"):
        prepare(small(("model.max_length", 8)), tmp_path)


def test_completions_longer_than_the_context_are_refused_before_anything_is_made():
    check_to_train(resolve(small(("task.max_new_tokens", 63), ("model.max_length", 64))))
    with pytest.raises(ConfigError, match=r"^task\.max_new_tokens is 64, .* model\.max_length = 64: lower"):
        check_to_train(resolve(small(("task.max_new_tokens", 64), ("model.max_length", 64))))


def test_a_model_without_an_end_token_is_refused(tmp_path: Path, stages: Path):
    tiny_model().save(tmp_path / "model")
    for name, keys in {
        "config.json": ("eos_token_id",),
        "generation_config.json": ("eos_token_id",),
        "tokenizer_config.json": ("eos_token",),
    }.items():
        path = tmp_path / "model" / name
        values = json.loads(path.read_text())
        for key in keys:
            values[key] = None
        path.write_text(json.dumps(values))
    special = tmp_path / "model" / "special_tokens_map.json"
    special.unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="no EOS token"):
        prepare(small(("policy", str(tmp_path / "model"))), stages)


@pytest.mark.integration
def test_ten_lines_of_python_train_and_return_the_policy(finished_run: Finished):
    policy = finished_run("aggrevated").trainer.components.models.policy
    prompt = policy.tokenizer("review of : plot cast =>", return_tensors="pt")["input_ids"]
    assert policy.model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= prompt.shape[1] + 3


@pytest.mark.integration
def test_the_loop_can_be_written_by_hand(stages: Path):
    trainer = Trainer(prepare(small(("algorithm.name", "lols")), stages))
    for iteration in range(2):
        rollout = trainer.collect_rollout(iteration)
        experience = trainer.make_experience(rollout, iteration)
        stats = trainer.update(experience, iteration)
        assert stats["first_ratio_error"] < 1e-4


@pytest.mark.integration
def test_a_reward_that_fails_while_evaluating_leaves_the_iteration_and_a_checkpoint(
    tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(self, prompts):
        raise TrainingError("the reward failed")

    monkeypatch.setattr(Trainer, "evaluate", fails)
    with pytest.raises(TrainingError):
        train(small(), tmp_path / "run", stages)
    assert len(read_complete_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    assert (tmp_path / "run/checkpoints/iteration-000002").is_dir()


@pytest.mark.integration
def test_a_profile_says_what_an_iteration_spends_its_time_on_and_trackers_are_written(tmp_path: Path, stages: Path):
    train(small(("runtime.profile", True), ("ppo.iterations", 2), ("runtime.trackers", ["tensorboard"])), tmp_path, stages)
    assert list(tmp_path.glob("trackers/**/events*"))
    rows = read_complete_lines(tmp_path / "metrics.jsonl")
    assert ["profile" in row for row in rows] == [False, True]
    shares = list(rows[1]["profile"].values())
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    line = profile_summary(rows[1])
    assert line.startswith("profile of iteration 1: ")
    assert all(name in line for name in ("rollout", "experience", "update", *rows[1]["profile"]))
    assert json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert "Self CPU" in (tmp_path / "profile" / "operations.txt").read_text()


def test_references_are_scored_beside_the_models_too(tmp_path: Path, stages: Path):
    threads = list[int]()

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        threads.append(get_ident())
        return [float(len(text)) for text in texts]

    trainer = Trainer(dataclasses.replace(prepare(small(("reward.subtract_reference", True)), stages), reward=reward))
    rollout = trainer.collect_rollout(0)
    trainer.make_experience(rollout, 0)
    assert len(threads) == 2  # the texts, and their references
    assert get_ident() not in threads
