"""From a config to a finished run, and the errors that are raised before any work."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import get_ident

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import small
from rlgf import __main__ as entry
from rlgf.cli import app, options
from rlgf.cli.console import ProgressReporter, print_plan, profile_summary
from rlgf.cli.diagnose import check_reward
from rlgf.config.loading import dump, override
from rlgf.config.recipes import quickstart
from rlgf.data.checksums import read_checked_json, write_checked_json, write_manifest
from rlgf.data.files import read_complete_lines
from rlgf.errors import CheckpointError, ConfigError, DataError, TrainingError
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.run import train
from rlgf.runs.checkpoints import load_state
from rlgf.tasks.base import Task
from rlgf.trainer import Progress, Trainer
from rlgf.types import Prompt

TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


def timeless(path: Path) -> list[dict]:
    rows = read_complete_lines(path)
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in rows]


def test_a_run_leaves_every_part_of_the_contract(tmp_path: Path, stages: Path):
    train(small(("algorithm.name", "d2lols"), ("runtime.trackers", ["tensorboard"])), tmp_path / "run", stages)
    run = tmp_path / "run"
    for name in ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl", "results.json", "policy", "checkpoints"):
        assert (run / name).exists(), name
    assert list(run.glob("trackers/**/events*"))
    assert len(read_complete_lines(run / "metrics.jsonl")) == 3
    rows = read_complete_lines(run / "rollouts.jsonl")
    assert len(rows) == 24
    for row in rows:
        assert "".join(span["text"] for span in row["spans"]) == row["text"]
        assert {span["origin"] for span in row["spans"]} <= {"policy", "guide"}
    assert AutoModelForCausalLM.from_pretrained(run / "policy").config.vocab_size == 42


def test_every_metric_is_explained(tmp_path: Path, stages: Path):
    changes = [("algorithm.name", "lols"), ("ppo.mle_coefficient", 0.1)]
    train(small(*changes), tmp_path / "run", stages)
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for row in read_complete_lines(tmp_path / "run" / "metrics.jsonl"):
        for key in [*row, *row.get("evaluation", {})]:
            assert f"`{key}`" in text, key


@pytest.mark.parametrize("algorithm", ["ppo", "ppo_pp", "aggrevated", "lols", "d2lols"])
def test_the_golden_run_is_bit_identical_twice(tmp_path: Path, stages: Path, algorithm: str):
    config = small(("algorithm.name", algorithm), ("algorithm.options.d2lols.switch_iteration", 1))
    for name in ("one", "two"):
        train(config, tmp_path / name, stages)
    assert timeless(tmp_path / "one" / "metrics.jsonl") == timeless(tmp_path / "two" / "metrics.jsonl")
    assert timeless(tmp_path / "one" / "rollouts.jsonl") == timeless(tmp_path / "two" / "rollouts.jsonl")
    first, second = (load_state(tmp_path / name / "checkpoints" / "iteration-000003") for name in ("one", "two"))
    for name, value in first["loop"]["updater"]["policy"].items():
        assert torch.equal(value, second["loop"]["updater"]["policy"][name]), name


def test_a_run_goes_on_from_its_last_checkpoint(tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch):
    config = small(("algorithm.name", "ppo_pp"), ("kl.controller", "adaptive"), ("reward.normalize", True))
    train(config, tmp_path / "whole", stages)
    from rlgf import trainer

    original = trainer.Trainer.update

    def breaks(self, experience, iteration):
        if iteration == 2:
            raise KeyboardInterrupt
        return original(self, experience, iteration)

    monkeypatch.setattr(trainer.Trainer, "update", breaks)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "parts", stages)
    monkeypatch.setattr(trainer.Trainer, "update", original)
    train(config, tmp_path / "parts", stages)
    assert timeless(tmp_path / "whole" / "metrics.jsonl") == timeless(tmp_path / "parts" / "metrics.jsonl")


def test_files_of_another_format_version_are_refused(tmp_path: Path):
    config, run = small(("runtime.checkpoint_every", 1)), tmp_path / "run"
    train(config, run, tmp_path / "stages")
    (stage,) = tmp_path.glob("stages/sft-*/stage.json")
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


def test_a_complete_run_is_reused(tmp_path: Path, stages: Path):
    config = small()
    train(config, tmp_path / "run", stages)
    before = (tmp_path / "run" / "results.json").stat().st_mtime_ns
    train(config, tmp_path / "run", stages)
    assert (tmp_path / "run" / "results.json").stat().st_mtime_ns == before


def test_stages_are_reused_when_they_match_and_not_otherwise(tmp_path: Path):
    lines: list[str] = []
    prepare(small(), tmp_path, lines.append)
    prepare(small(), tmp_path, lines.append)
    prepare(small(("sft.steps", 4)), tmp_path, lines.append)
    sft = [line for line in lines if line.startswith("sft:")]
    assert [line.split()[1] for line in sft] == ["making", "reusing", "making"]


def test_a_run_can_be_run_again_from_its_config(tmp_path: Path, stages: Path):
    config = small(("algorithm.name", "ppo_pp"))
    train(config, tmp_path / "run", stages)
    again = options.read_config(str(tmp_path / "run" / "config.yaml"))
    assert again == config
    assert dump(again) == dump(config)


def test_a_guide_that_fails_while_training_leaves_a_checkpoint(tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "late_guide.py").write_text(
        "calls = 0\n"
        "def guide(requests):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    return ['great acting'] * len(requests) if calls < 3 else None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    config = small(
        ("algorithm.name", "ppo_pp"), ("guide.spec", "python:late_guide:guide"), ("algorithm.options.ppo_pp.beta", 1.0)
    )
    with pytest.raises(TrainingError, match="guide"):
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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "quickstrat"], "did you mean 'quickstart'"),
        (["train", "quickstart", "--algorithm", "pp"], "did you mean 'ppo'"),
        (["train", "quickstart", "--guide", "refrences"], "did you mean 'references'"),
        (["train", "quickstart", "ppo.epoch=3"], "did you mean 'ppo.epochs'"),
        (["train", "quickstart", "epochs=3"], "ppo.epochs"),
        (["train", "quickstart", "task.options.slot=3"], "slots"),
        (["train", "quickstart", "task.name=imbd"], "did you mean 'imdb'"),
        (["train", "quickstart", "--beta", "1.5"], r"\[0, 1\]"),
        (["train", "quickstart", "--algorithm", "d2lols", "--alpha", "0.5"], "whole number"),
        (["train", "quickstart", "--alpha", "0.5"], "lols"),
        (["train", "quickstart", "ppo.epochs=many"], "ppo.epochs"),
        (["train", "quickstart", "ppo"], "section.field=value"),
        (["train", "quickstart", "--guide", "references", "--algorithm", "aggrevated"], "cannot continue a prefix"),
        (["train", "quickstart", "runtime.trackers=[tensorbord]"], "did you mean 'tensorboard'"),
        (["train", "imdb-small"], "needs data"),
        (["train", "imdb-small", "--data", "nowhere"], "nowhere"),
        (["train", "quickstart", "--policy", "nowhere"], "nowhere"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", "quickstart", "--out", "file/run"], r"file/run cannot be created \(Not a directory\): choose another --out"),
        (["train", "quickstart", "--stages", "file/stages"], "file/stages cannot be created .*another --stages"),
        (["compare", "quickstart", "--out", "file/runs"], "file/runs cannot be created .*another --out"),
        (["sft", "quickstart", "--out", "file/sft/model"], "file/sft cannot be created .*another --out"),
        (
            ["evaluate", "quickstart", "--policy", "nowhere", "--json", "file/metrics.json"],
            "file/metrics.json cannot be written",
        ),
        (["compare", "quickstart", "--algorithms", "ppo,lol"], "did you mean 'lols'"),
        (["compare", "quickstart", "--seeds", "0,a"], "whole numbers"),
        (["samples", "nowhere"], "is not a run"),
        (["evaluate", "nowhere"], "neither a run"),
        (["show", "ppo+"], "did you mean 'ppo"),
        (["check", "task", "toy_review"], "did you mean 'toy_reviews'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr("sys.argv", ["rlgf", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    import re

    assert re.search(words, captured.err), captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.glob("runs/*/config.yaml"))


def test_an_output_folder_that_holds_another_run_is_refused(tmp_path: Path, stages: Path):
    train(small(), tmp_path / "run", stages)
    with pytest.raises(ConfigError, match="another run"):
        train(small(("seed", 1)), tmp_path / "run", stages)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not a run"):
        train(small(), tmp_path / "other", stages)


def test_a_folder_that_cannot_be_made_is_not_taken_for_a_full_disk(tmp_path: Path):
    """As under /proc, where there is no space either."""
    with pytest.raises(ConfigError, match="cannot be created"):
        train(small(), "/proc/no-such-folder/run", tmp_path / "stages")
    assert not list(tmp_path.iterdir())


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["rlgf", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    return int(stopped.value.code or 0)


def test_interrupted_it_says_where_the_same_command_goes_on_and_finished_that_it_is(
    tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(dump(small(("runtime.checkpoint_every", 2))))
    command = ["train", str(tmp_path / "config.yaml"), "--out", str(run), "--stages", str(stages)]
    shown = ProgressReporter.__call__

    def interrupt_after(iterations: int) -> None:
        def watch(self: ProgressReporter, step: Progress) -> None:
            shown(self, step)
            if step.iteration == iterations:
                raise KeyboardInterrupt

        monkeypatch.setattr(ProgressReporter, "__call__", watch)

    interrupt_after(1)
    assert run_command(monkeypatch, *command) == 130
    told = capsys.readouterr().err
    assert "1/3 iterations" in told
    assert f"interrupted; there is no checkpoint in {run} yet (runtime.checkpoint_every=2)" in told
    interrupt_after(2)
    assert run_command(monkeypatch, *command) == 130
    told = capsys.readouterr().err
    assert f"interrupted; {run} holds a checkpoint after 2 of 3 iterations: the same command resumes from there." in told
    interrupt_after(0)
    assert run_command(monkeypatch, *command) == 0
    first = capsys.readouterr()
    assert "is finished" not in first.err
    assert run_command(monkeypatch, *command) == 0
    again = capsys.readouterr()
    assert f"{run} is finished: these are its results" in again.err
    assert again.out == first.out
    assert "reusing" not in again.err  # nothing is loaded for that


def test_ctrl_c_while_libraries_are_imported_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    class Impatient:
        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> None:
            if name == "rlgf.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "rlgf.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Impatient, *sys.meta_path])
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    assert stopped.value.code == 130
    assert not capsys.readouterr().err


def test_no_disk_space_is_refused_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(10, 10, 0))
    with pytest.raises(ConfigError, match="free some space"):
        train(small(), tmp_path / "run", tmp_path / "stages")
    assert not (tmp_path / "stages").exists()


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="exceeds the model's context"):
        prepare(small(("model.max_length", 8)), tmp_path)


def test_a_model_without_an_end_token_is_refused(tmp_path: Path, stages: Path):
    parts = prepare(small(), stages)
    language_model = parts.models.policy
    language_model.save(tmp_path / "model")
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


def test_ten_lines_of_python_train_and_return_the_policy(tmp_path: Path, stages: Path):
    trainer = train(small(("algorithm.name", "aggrevated")), tmp_path / "run", stages)
    policy = trainer.components.models.policy
    prompt = policy.tokenizer("review of : plot cast =>", return_tensors="pt")["input_ids"]
    assert policy.model.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] <= prompt.shape[1] + 3


def test_the_loop_can_be_written_by_hand(stages: Path):
    from rlgf.trainer import Trainer

    trainer = Trainer(prepare(small(("algorithm.name", "lols")), stages))
    for iteration in range(2):
        rollout = trainer.collect_rollout(iteration)
        experience = trainer.make_experience(rollout, iteration)
        stats = trainer.update(experience, iteration)
        assert stats["first_ratio_error"] < 1e-4


def test_logged_texts_with_every_kind_of_line_end_are_read_back(tmp_path: Path):
    from rlgf.data.files import to_line

    rows = [{"iteration": number, "text": "a\x85b\u2028c\u2029d\re\nf\x0cg"} for number in range(3)]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(map(to_line, rows)) + '{"iteration": 3, "te', encoding="utf-8", newline="")
    assert read_complete_lines(path) == rows


@pytest.mark.parametrize(
    "change", [("task.options.slots", 2), ("evaluation.sampling.greedy", True), ("task.options.right_aspect", 0.5)]
)
def test_a_setting_that_was_taken_away_makes_another_run(tmp_path: Path, change: tuple[str, object]):
    from rlgf.runs.directory import RunDirectory

    plain = quickstart()
    changed = override(plain, [change])
    RunDirectory(tmp_path, changed).create(changed)
    with pytest.raises(ConfigError, match="another run"):
        RunDirectory(tmp_path, plain)


def test_a_reward_that_fails_while_evaluating_leaves_the_iteration_and_a_checkpoint(
    tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch
):
    from rlgf import trainer

    def fails(self, prompts):
        raise TrainingError("the reward failed")

    monkeypatch.setattr(trainer.Trainer, "evaluate", fails)
    with pytest.raises(TrainingError):
        train(small(), tmp_path / "run", stages)
    assert len(read_complete_lines(tmp_path / "run" / "metrics.jsonl")) == 2
    assert (tmp_path / "run/checkpoints/iteration-000002").is_dir()


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


def test_rewards_may_be_numbers_of_numpy_and_torch():
    import numpy as np

    from rlgf.rewards.base import score

    for values in (np.array([0.5, 1.0]), torch.tensor([0.5, 1.0]), [np.float32(0.5), np.int64(1)], (0.5, 1)):
        assert score(lambda prompts, texts, values=values: values, [], ["a", "b"]) == [0.5, 1.0]
    with pytest.raises(TrainingError):
        score(lambda prompts, texts: [True, False], [], ["a", "b"])


def test_a_profile_says_what_an_iteration_spends_its_time_on(tmp_path: Path, stages: Path):
    train(small(("runtime.profile", True)), tmp_path, stages)
    rows = read_complete_lines(tmp_path / "metrics.jsonl")
    assert ["profile" in row for row in rows] == [False, True, False]
    shares = list(rows[1]["profile"].values())
    assert shares == sorted(shares, reverse=True)
    assert 0 < sum(shares) <= 1
    line = profile_summary(rows[1])
    assert line.startswith("profile of iteration 1: ")
    assert all(name in line for name in ("rollout", "experience", "update", *rows[1]["profile"]))
    assert json.loads((tmp_path / "profile" / "trace.json").read_text())["traceEvents"]
    assert "Self CPU" in (tmp_path / "profile" / "operations.txt").read_text()


def test_four_bits_are_refused_where_they_cannot_be_trained_through(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"lora\.load_in_4bit needs a GPU"):
        train(small(("lora.rank", 2), ("lora.load_in_4bit", True)), tmp_path)


def test_targets_that_score_nothing_are_told_to_be_noisy_demonstrations_or_a_mistake():
    prompts = [Prompt(f"review {i}", (" good plot",), (" good plot",)) for i in range(4)]
    found = check_reward(Task("t", prompts, prompts, prompts), lambda prompts, texts: [0.0] * len(texts))
    warned = "targets (0.000) do not outscore empty texts (0.000): expected of noisy demonstrations"
    assert any(finding.level == "warning" and finding.text.startswith(warned) for finding in found)


def test_a_plan_knows_the_size_of_an_encoder_decoder_and_of_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def told(*changes: tuple[str, object]) -> dict[str, str]:
        config = small(("algorithm.name", "ppo"), *changes)
        print_plan(config, config.algorithm.build())
        lines = [line.strip().split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
        return {line[0]: line[1] for line in lines if len(line) == 2}

    wide = ("model.width", 256), ("model.layers", 4), ("model.vocabulary", 8192)
    assert "unknown" not in told(("model.architecture", "t5"))["parameters"]
    whole, adapted = (
        told(*wide, ("critic.kind", kind), ("lora.rank", rank))["memory"] for kind, rank in (("value_head", 0), ("lora", 2))
    )
    assert megabytes(whole) - megabytes(adapted) == pytest.approx(4 * 4 * 5.3, abs=2)  # gradients, moments and a reference


def megabytes(line: str) -> int:
    return int(line.removeprefix("about ").partition(" MB")[0].replace(",", ""))


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
