"""Runs and stages that a signal stops: what is kept, what is said, and that they end as if nothing had been."""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import SMALL, small
from rlgf.cli import app
from rlgf.config.loading import dump
from rlgf.config.schema import Config
from rlgf.data.files import read_complete_lines
from rlgf.errors import Interrupted
from rlgf.interrupts import handle_signals
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.run import train

TIMES = ("seconds", "tokens_per_second")
CHANGES: list[tuple[str, object]] = [
    ("algorithm.name", "ppo_pp"), ("reward.normalize", True), ("kl.controller", "adaptive"), ("evaluation.every", 2),
    ("ppo.iterations", 4), ("runtime.checkpoint_every", 100),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, next to its stages."""
    folder = tmp_path_factory.mktemp("whole")
    train(small(*CHANGES), folder / "run", folder / "stages")
    return folder


def signal_at(
    monkeypatch: pytest.MonkeyPatch, place: str, call: int, number: int = signal.SIGTERM, then: Callable[[], None] | None = None
) -> None:
    """Send a signal to this process when `module:attribute` is called for the nth time."""
    module, _, path = place.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), list[int]()

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == call:
            os.kill(os.getpid(), number)
            if then is not None:
                then()
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, counted)


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in read_complete_lines(path)]


def assert_same_run(run: Path, other: Path) -> None:
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl"):
        assert timeless(run / name) == timeless(other / name), name
    for name in ("checkpoints/iteration-000004/tensors.safetensors", "best-policy/model.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


PLACES = {  # in which call the signal comes, the iterations that are kept, and those with an evaluation
    "while completions are collected": ("rlgf.trainer:collect_rollout", 4, 3, [1]),
    "while rewards are computed": ("rlgf.trainer:make_experience", 3, 3, [1]),
    "during an update": ("rlgf.rl.update:Updater.update", 1, 1, []),
    "during an evaluation": ("rlgf.trainer:evaluate_policy", 1, 2, []),
    "during the last evaluation": ("rlgf.trainer:evaluate_policy", 2, 4, [1]),
    "while lines are written": ("rlgf.runs.recorder:rollout_rows", 2, 2, [1]),
    "while results are computed": ("rlgf.pipeline.run:final_results", 1, 4, [1, 3]),
}  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("place", PLACES)
def test_a_run_keeps_its_iterations_and_ends_as_one_that_was_left_alone(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    where, call, kept, evaluated = PLACES[place]
    config, run = small(*CHANGES), tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, where, call)
        with pytest.raises(
            Interrupted, match=f"interrupted by SIGTERM; {run} holds a checkpoint after {kept} of 4 iter"
        ) as caught:
            train(config, run, whole / "stages")
    assert not caught.value.lost
    assert [path.name for path in (run / "checkpoints").iterdir()] == [f"iteration-00000{kept}"]
    rows = read_complete_lines(run / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == list(range(kept))
    assert [row["iteration"] for row in rows if "evaluation" in row] == evaluated
    assert not (run / "results.json").exists()
    train(config, run, whole / "stages")
    assert_same_run(run, whole / "run")


@pytest.mark.integration
def test_after_the_grace_the_sentence_says_what_is_lost(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = small(*CHANGES, ("runtime.checkpoint_every", 2), ("runtime.grace_seconds", 0.05)), tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, "rlgf.rl.update:Updater.update", 4, then=lambda: time.sleep(30))
        with pytest.raises(Interrupted) as caught:
            train(config, run, whole / "stages")
    assert str(caught.value) == (
        "interrupted by SIGTERM; lost: iteration 4 of 4 and 1 finished iteration before it; "
        f"{run} holds a checkpoint after 2 of 4 iterations: the same command resumes from there."
    )
    train(config, run, whole / "stages")
    assert_same_run(run, whole / "run")


@pytest.mark.integration
def test_what_is_half_done_when_the_grace_ends_is_not_kept(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The running scale of rewards has moved by then."""
    config, run = small(*CHANGES, ("runtime.checkpoint_every", 1), ("runtime.grace_seconds", 0.05)), tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(patch, "rlgf.trainer:make_experience", 3, then=lambda: time.sleep(30))
        with pytest.raises(Interrupted, match=r"lost: iteration 3 of 4; .* after 2 of 4 iterations"):
            train(config, run, whole / "stages")
    train(config, run, whole / "stages")
    assert_same_run(run, whole / "run")


STAGED = small(
    ("guide.spec", "trained"), ("algorithm.name", "ppo_pp"), ("distill.num_completions", 8), ("distill.steps", 3),
    ("distill.batch_size", 4), ("sft.warmup_steps", 2),
)  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("place", [(2, "sft", 2), (3, "sft", 3), (5, "guide", 2), (8, "distill", 2)])
def test_a_stage_goes_on_from_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: tuple[int, str, int], staged: Path
) -> None:
    call, stage, step = place
    stages = tmp_path / "stages"
    with monkeypatch.context() as patch:
        signal_at(patch, "rlgf.supervised.loop:nll_backward", call, signal.SIGUSR1)
        words = rf"interrupted by SIGUSR1; step {step} of the stage {stage}-\w+ is kept: the same command goes on from there\."
        with pytest.raises(Interrupted, match=words), handle_signals():
            prepare(STAGED, stages)
    assert len(list(stages.glob(f".{stage}-*.stopped-*"))) == 1
    lines = list[str]()
    prepare(STAGED, stages, lines.append)
    assert [line for line in lines if "going on" in line] == [f"going on after step {step} of 3"]
    assert sorted(path.name for path in stages.iterdir()) == sorted(path.name for path in staged.iterdir())
    for folder in staged.glob("*-*"):
        for name in ("model.safetensors", "weights.safetensors"):
            if (folder / name).is_file():
                assert (stages / folder.name / name).read_bytes() == (folder / name).read_bytes(), folder.name


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stages of `STAGED` that nothing interrupts."""
    folder = tmp_path_factory.mktemp("staged")
    prepare(STAGED, folder)
    return folder


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["rlgf", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    return int(stopped.value.code or 0)


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_the_command_line_ends_with_128_and_the_number(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    (tmp_path / "config.yaml").write_text(dump(small(*CHANGES)))
    signal_at(monkeypatch, "rlgf.trainer:collect_rollout", 2, number)
    command = ["train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run"), "--stages", str(whole / "stages")]
    assert run_command(monkeypatch, *command) == 128 + number
    told = capsys.readouterr().err
    assert f"error: interrupted by {signal.Signals(number).name}; {tmp_path / 'run'} holds a checkpoint after 1 of 4" in told
    assert "Traceback" not in told


@pytest.mark.integration
def test_commands_that_train_nothing_end_with_a_sentence_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    signal_at(monkeypatch, "rlgf.pipeline.run:evaluate_policy_on_test", 1, signal.SIGHUP)
    assert run_command(monkeypatch, "evaluate", "quickstart", "--stages", str(tmp_path)) == 129
    told = capsys.readouterr().err
    assert "error: interrupted by SIGHUP; finished work is kept, and the same command resumes." in told


@pytest.mark.integration
def test_a_stage_command_says_which_step_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(dump(small()))
    command = ["sft", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "model"), "--stages", str(tmp_path / "stages")]
    with monkeypatch.context() as patch:
        signal_at(patch, "rlgf.supervised.loop:nll_backward", 1)
        assert run_command(patch, *command) == 143
    assert "interrupted by SIGTERM; step 1 of the stage model is kept: the same command goes on" in capsys.readouterr().err
    assert run_command(monkeypatch, *command) == 0
    assert "going on after step 1 of 3" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "model"]


def start(*arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "rlgf", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def changes_of(config: Config | None = None, *changes: tuple[str, object]) -> list[str]:
    import json

    return [f"{key}={json.dumps(value)}" for key, value in [*SMALL, *changes]]


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 120
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("to_group", [False, True])
def test_the_processes_of_a_comparison_are_stopped_with_it_and_go_on(tmp_path: Path, to_group: bool) -> None:
    """As by Ctrl-C at a terminal, or by a scheduler that signals every process."""
    arguments = ["compare", "quickstart", *changes_of(None, ("ppo.iterations", 60)), "--algorithms", "ppo,ppo_pp"]
    arguments += ["--no-controls", "--jobs", "2", "--out", str(tmp_path / "out")]
    runs = [tmp_path / "out" / "runs" / name for name in ("ppo-seed0", "ppo_pp-seed0")]
    with start(*arguments) as process:
        wait_until(lambda: all((run / "metrics.jsonl").is_file() for run in runs), process)
        (os.killpg if to_group else os.kill)(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143
        assert process.stderr is not None
        told = process.stderr.read()
    assert "error: interrupted by SIGTERM; stopped ppo-seed0, ppo_pp-seed0: the same command resumes" in told
    for run in runs:
        assert "interrupted by SIGTERM" in (run / "log.txt").read_text().splitlines()[-1]
        assert len(list((run / "checkpoints").iterdir())) >= 1
        assert not (run / ".lock").exists()
    with start(*arguments) as process:
        assert process.wait(300) == 0
    assert len(read_complete_lines(runs[0] / "metrics.jsonl")) == 60
