"""Scratch folders: those of dead processes go, those of live ones stay, and steps are taken over."""

import os
import socket
from pathlib import Path

import pytest

from rlgf.data.lock import FileLock
from rlgf.data.scratch import FOREIGN_SECONDS, STEP, scratch_folder, stage_lock, target_of


def left_by(folder: Path, target: str, fingerprint: str = "f1", host: str | None = None, with_step: bool = False) -> Path:
    """A scratch folder that a killed process left."""
    scratch = folder / f".{target}.making-{fingerprint}-{host or socket.gethostname()}-abc_1234"
    (scratch / (STEP if with_step else "model")).mkdir(parents=True)
    return scratch


def build(target: Path, fingerprint: str = "f1") -> list[str]:
    """Build a stage of one file, and return what its scratch folder had at the beginning."""
    with stage_lock(target, print), scratch_folder(target, fingerprint) as scratch:
        found = sorted(path.name for path in scratch.iterdir())
        assert target_of(scratch) == target.name
        for path in scratch.iterdir():
            path.rmdir()
        (scratch / "weights").touch()
        scratch.rename(target)
    return found


def fail_to_build(target: Path, *files: str, error: BaseException | None = None) -> None:
    """Begin to build a stage, and leave these folders and files by an error."""
    raised = error or KeyboardInterrupt()
    with pytest.raises(type(raised)), stage_lock(target, print), scratch_folder(target, "f1") as scratch:
        _write_and_raise(scratch, files, raised)


def _write_and_raise(scratch: Path, files: tuple[str, ...], error: BaseException) -> None:
    for name in files:
        (scratch / name).mkdir() if name == STEP else (scratch / name).touch()
    raise error


def test_scratch_of_killed_processes_goes_when_the_next_is_made(tmp_path: Path) -> None:
    own, other = left_by(tmp_path, "sft-1"), left_by(tmp_path, "reward-2")
    assert build(tmp_path / "sft-1") == []
    assert not own.exists()
    assert not other.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["sft-1"]  # no lock is left either


def test_scratch_of_a_live_process_stays(tmp_path: Path) -> None:
    live = left_by(tmp_path, "reward-2")
    with stage_lock(tmp_path / "reward-2", print):
        build(tmp_path / "sft-1")
        assert live.is_dir()
    build(tmp_path / "sft-3")
    assert not live.exists()


def test_scratch_of_another_machine_goes_after_a_day(tmp_path: Path) -> None:
    """Its lock may not be seen here."""
    fresh, old = left_by(tmp_path, "reward-2", host="elsewhere"), left_by(tmp_path, "reward-3", host="else-where.org")
    before = os.stat(old).st_mtime - FOREIGN_SECONDS - 60
    for path in (old, *old.iterdir()):
        os.utime(path, (before, before))
    build(tmp_path / "sft-1")
    assert fresh.is_dir()
    assert not old.exists()


@pytest.mark.parametrize(("fingerprint", "found"), [("f1", [STEP]), ("f2", [])])
def test_the_step_of_an_interrupted_build_is_taken_over_if_its_inputs_are_the_same(
    tmp_path: Path, fingerprint: str, found: list[str]
) -> None:
    target = tmp_path / "model"
    fail_to_build(target, STEP, "half a file")
    assert [path.name for path in tmp_path.iterdir()] == [".model.stopped-f1"]
    assert build(target, fingerprint) == found
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_step_of_another_target_stays_for_it(tmp_path: Path) -> None:
    fail_to_build(tmp_path / "sft-1", STEP)
    build(tmp_path / "reward-2")
    assert build(tmp_path / "sft-1") == [STEP]


def test_a_resumed_build_that_is_killed_keeps_the_step_that_it_began_with(tmp_path: Path) -> None:
    left_by(tmp_path, "sft-1", with_step=True)
    assert build(tmp_path / "sft-1") == [STEP]


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    fail_to_build(tmp_path / "sft-1", "half a file", error=ValueError())
    assert list(tmp_path.iterdir()) == []
    lock = FileLock(tmp_path / ".sft-1.lock")
    assert lock.acquire()
    lock.release()
