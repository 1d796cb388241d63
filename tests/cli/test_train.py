"""`rlgf train`: what it says of interrupted and finished runs, and a dry run."""

from pathlib import Path

import pytest

from helpers import FEW_PROMPTS, SMALL, small
from rlgf.cli import app
from rlgf.cli.console import ProgressReporter
from rlgf.config.loading import dump
from rlgf.trainer import Progress


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["rlgf", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    return int(stopped.value.code or 0)


@pytest.mark.integration
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

    for iterations in (1, 2):  # checkpoint_every is 2
        interrupt_after(iterations)
        assert run_command(monkeypatch, *command) == 130
        told = capsys.readouterr().err
        assert f"{iterations}/3 iterations" in told
        reached = f"{run} holds a checkpoint after {iterations} of 3 iterations: the same command resumes from there."
        assert f"interrupted by SIGINT; {reached}" in told
    interrupt_after(0)
    assert run_command(monkeypatch, *command) == 0
    first = capsys.readouterr()
    assert "is finished" not in first.err
    assert run_command(monkeypatch, *command) == 0
    again = capsys.readouterr()
    assert f"{run} is finished: these are its results" in again.err
    assert again.out == first.out
    assert "reusing" not in again.err  # nothing is loaded for that


def test_a_dry_run_prints_the_plan_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    changes = [f"{key}={value}" for key, value in SMALL if key.startswith("ppo")]
    changes += FEW_PROMPTS
    monkeypatch.setattr("sys.argv", ["rlgf", "train", "quickstart", "--algorithm", "d2lols", "--dry-run", *changes])
    with pytest.raises(SystemExit):
        app.main()
    shown = capsys.readouterr().out
    for words in ("D2LOLS", "phase 0", "phase 1", "3 of 8 completions", "parameters", "memory"):
        assert words in shown
    assert not list(tmp_path.iterdir())


@pytest.mark.integration
def test_a_stopped_run_says_where_it_goes_on_and_is_removed_on_request(
    tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = tmp_path / "run"
    (tmp_path / "config.yaml").write_text(dump(small(("runtime.checkpoint_every", 1))))
    command = ["train", str(tmp_path / "config.yaml"), "--out", str(run), "--stages", str(stages)]
    shown = ProgressReporter.__call__

    def stop_after_two(self: ProgressReporter, step: Progress) -> None:
        shown(self, step)
        if step.iteration == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressReporter, "__call__", stop_after_two)
    assert run_command(monkeypatch, *command) == 130
    monkeypatch.setattr(ProgressReporter, "__call__", shown)
    (run / "mine.txt").write_text("not of the run")
    capsys.readouterr()
    changed = [*command, "ppo.epochs=3"]
    assert run_command(monkeypatch, *changed) == 2
    assert "or begin again with --overwrite" in capsys.readouterr().err
    assert run_command(monkeypatch, *command) == 0
    assert f"{run}: goes on after 2 of 3 iterations" in capsys.readouterr().err
    assert (run / "curves.png").is_file()
    assert run_command(monkeypatch, *changed, "ppo.epoch=2", "--overwrite") == 2  # a mistake removes nothing
    assert (run / "results.json").is_file()
    capsys.readouterr()
    assert run_command(monkeypatch, *changed, "--overwrite") == 2
    assert "holds files that no run writes (mine.txt)" in capsys.readouterr().err
    (run / "mine.txt").unlink()
    assert run_command(monkeypatch, *changed, "--overwrite") == 0
    told = capsys.readouterr().err
    assert f"{run}: removed the run that was there (finished)" in told
    assert "goes on after" not in told
