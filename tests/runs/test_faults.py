"""Faults at the moments that happen: one sentence each, and nothing is lost that was written."""

import copy
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import small
from rlgf import trainer as trainer_module
from rlgf.cli import app
from rlgf.config.loading import dump
from rlgf.config.variants import build_variants, plan_comparison
from rlgf.data import files
from rlgf.data.files import read_complete_lines, to_line
from rlgf.data.lock import FolderLock
from rlgf.errors import ConfigError, TrainingError
from rlgf.experiments.compare import compare
from rlgf.pipeline import stage_cache
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.run import train
from rlgf.runs import checkpoints
from rlgf.trainer import Progress

CONFIG = small(("runtime.checkpoint_every", 1))
TIMES = ("seconds", "tokens_per_second")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without faults, next to its stages."""
    folder = tmp_path_factory.mktemp("whole")
    train(CONFIG, folder / "run", folder / "stages")
    return folder


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in read_complete_lines(path)]


def assert_goes_on(run: Path, whole: Path, report: Callable[[str], None] = print) -> None:
    """Give the same command again, without the fault, and compare the run with one that had none."""
    train(CONFIG, run, whole / "stages", report)
    for name in ("metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl"):
        assert timeless(run / name) == timeless(whole / "run" / name), name
    name = "checkpoints/iteration-000003/tensors.safetensors"
    assert (run / name).read_bytes() == (whole / "run" / name).read_bytes()


def fail_at(call: int, original: Callable[..., Any], error: Exception) -> Callable[..., Any]:
    """The function, which raises an error when it is called for the nth time."""
    calls = list[int]()

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == call:
            raise copy.copy(error)  # the file is named in it
        return original(*arguments, **options)

    return counted


TAKEN = OSError(errno.ENOTEMPTY, "Directory not empty")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
READ_ONLY = OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/mine/.config.yaml")
PLACES: dict[str, tuple[Any, str, int, Exception, str]] = {
    "disk full while a checkpoint is written": (checkpoints, "save_file", 2, FULL, "No space left .*: free some space"),
    "disk full while a checkpoint is flushed": (os, "fsync", 25, FULL, "No space left .*: free some space"),
    "disk full while lines are written": (os, "write", 3, FULL, r"s.jsonl cannot be used \(No space left .*: free some"),
    "a rename that races": (checkpoints, "replace_folder", 2, TAKEN, "another process wrote to it"),
    "a file system that turns read-only": (files.tempfile, "mkstemp", 8, READ_ONLY, "Read-only .*: make it writable"),
    "memory that runs out": (trainer_module, "collect_rollout", 2, MemoryError(), "memory ran out: set runtime.token_budget"),
    "memory that torch cannot get": (
        trainer_module, "collect_rollout", 2, RuntimeError("DefaultCPUAllocator: can't allocate memory: you"), "memory ran out"
    ),
}  # fmt: skip


@pytest.mark.integration
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_is_one_sentence_and_the_run_goes_on_later(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    owner, name, call, error, words = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_at(call, getattr(owner, name), error))
        with pytest.raises(TrainingError, match=words) as caught:
            train(CONFIG, tmp_path / "run", whole / "stages")
    assert "\n" not in str(caught.value)
    assert str(caught.value).count(". ") == 0
    assert not (tmp_path / "run" / "results.json").exists()
    assert_goes_on(tmp_path / "run", whole)


@pytest.mark.integration
@pytest.mark.parametrize("remake", [False, True])
def test_a_folder_that_is_deleted_under_the_run_ends_it(tmp_path: Path, whole: Path, remake: bool) -> None:
    run = tmp_path / "run"

    def delete(progress: Progress) -> None:
        shutil.rmtree(run)
        if remake:
            run.mkdir()

    with pytest.raises(TrainingError, match=f"{run} was deleted or replaced while this process wrote to it"):
        train(CONFIG, run, whole / "stages", on_progress=delete)
    assert not run.exists() or list(run.iterdir()) == []  # nothing of the old run is mixed into a new one
    assert_goes_on(run, whole)


@pytest.mark.integration
def test_checkpoints_that_are_a_file_are_refused_before_anything_is_trained(tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    train(CONFIG, run, whole / "stages")
    (run / "results.json").unlink()
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()
    lines = list[str]()
    with pytest.raises(ConfigError, match="checkpoints is not a folder, and checkpoints belong there: move it away"):
        train(CONFIG, run, tmp_path / "stages", lines.append)
    assert not any("making" in line for line in lines)


def cut_in_the_middle(content: bytes) -> bytes:
    """A log whose second line is torn, with whole lines behind it."""
    lines = content.split(b"\n")
    return b"\n".join([lines[0], lines[1][:40], *lines[2:]])


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "NULs at the end": (lambda content: content + b"\0" * 4096, ""),
    "a torn end": (lambda content: content + content[:50], ""),
    "not UTF-8": (lambda content: content + b"\xff\xfe\xff\n", ""),
    "a torn middle": (cut_in_the_middle, "metrics.jsonl lacks the lines of iterations 1 (from 0)"),
}


@pytest.mark.integration
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_log_costs_no_whole_line_and_stops_no_run(tmp_path: Path, whole: Path, kind: str) -> None:
    damage, missing = DAMAGE[kind]
    run, lines = tmp_path / "run", list[str]()
    shutil.copytree(whole / "run", run)
    for name in ("results.json", "evaluation.jsonl"):
        (run / name).unlink()
    before = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(damage(before))
    train(CONFIG, run, whole / "stages", lines.append)
    expected = [row for row in timeless(whole / "run" / "metrics.jsonl") if not (missing and row["iteration"] == 1)]
    assert timeless(run / "metrics.jsonl") == expected
    assert (run / "metrics.jsonl.damaged-1").stat().st_size > 0
    told = [line for line in lines if "metrics.jsonl" in line]
    assert "that are no usable lines: they are in metrics.jsonl.damaged-1 now" in told[0]
    assert [line for line in told[1:] if missing not in line] == []
    assert bool(told[1:]) == bool(missing)


@pytest.mark.integration
def test_a_second_process_is_refused_by_the_name_of_the_first(tmp_path: Path, whole: Path) -> None:
    run = tmp_path / "run"
    refused = list[str]()

    def train_again(progress: Progress) -> None:
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on .* trains {run} at this moment") as caught:
            train(CONFIG, run, whole / "stages")
        refused.append(str(caught.value))

    train(CONFIG, run, whole / "stages", on_progress=train_again)
    assert len(refused) == 3
    assert timeless(run / "metrics.jsonl") == timeless(whole / "run" / "metrics.jsonl")
    assert not (run / ".lock").exists()


def test_a_comparison_in_use_is_refused(tmp_path: Path) -> None:
    plan = plan_comparison(CONFIG, build_variants(CONFIG, ["ppo"], {}), [0])
    locked = FolderLock(tmp_path, "compares runs in", print)
    with locked.held(), pytest.raises(ConfigError, match=f"process {os.getpid()} on .* compares runs in {tmp_path} at this"):
        compare(plan, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.integration
def test_a_stage_that_another_process_has_made_meanwhile_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second waits for the lock of the first; where it does not see the lock, the first stage stays."""
    first, lines = tmp_path / "first", list[str]()
    prepare(CONFIG, first)
    (stage,) = first.glob("sft-*")
    times = {path.name: path.stat().st_mtime_ns for path in stage.iterdir()}
    stages = tmp_path / "stages"
    write = stage_cache._write_stage  # pyright: ignore[reportPrivateUsage]

    def make_meanwhile(folder: Path, *arguments: Any) -> None:
        write(folder, *arguments)
        if not (stages / stage.name).exists():
            shutil.copytree(stage, stages / stage.name)

    monkeypatch.setattr(stage_cache, "_write_stage", make_meanwhile)
    prepare(CONFIG, stages, lines.append)
    assert {path.name: path.stat().st_mtime_ns for path in (stages / stage.name).iterdir()} == times
    assert [path.name for path in stages.iterdir() if path.name.startswith(".")] == []


@pytest.mark.integration
def test_samples_of_a_damaged_log_are_shown_with_a_warning(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    content = (whole / "run" / "rollouts.jsonl").read_bytes()
    (run / "rollouts.jsonl").write_bytes(content + b"\xff\xff\n" + b"\0" * 100)
    monkeypatch.setattr("sys.argv", ["rlgf", "samples", str(run)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 0
    captured = capsys.readouterr()
    assert "iteration 2" in captured.out
    assert f"warning: {run / 'rollouts.jsonl'}: 2 damaged or incomplete lines are left out" in captured.err.replace("\n", " ")


def test_samples_of_another_form_are_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rollouts.jsonl").write_text('{"iteration": 0}\n{"question": "2 + 2"}\n')
    monkeypatch.setattr("sys.argv", ["rlgf", "samples", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "2 lines of another form are left out" in told
    assert "holds no completions yet" in told


@pytest.mark.integration
def test_the_command_line_has_no_traceback_for_a_full_disk(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(dump(CONFIG))
    monkeypatch.setattr(checkpoints, "save_file", fail_at(1, checkpoints.save_file, FULL))
    command = ["rlgf", "train", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", [*command, "--stages", str(whole / "stages")])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 3
    told = capsys.readouterr().err
    assert "error: a file cannot be used (No space left on device): free some space, and run the same command again" in told
    assert "Traceback" not in told


def test_a_line_without_a_check_is_set_aside_when_a_run_goes_on(tmp_path: Path, whole: Path) -> None:
    """A changed letter in the name of the check must not make a line valid without one."""
    run = tmp_path / "run"
    shutil.copytree(whole / "run", run)
    (run / "results.json").unlink()
    rows = read_complete_lines(run / "metrics.jsonl")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(to_line({**rows[0], "score": 99.0}))
    train(CONFIG, run, whole / "stages")
    assert timeless(run / "metrics.jsonl") == timeless(whole / "run" / "metrics.jsonl")
