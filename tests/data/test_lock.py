"""Locks of folders: one process at a time, and none that a dead process left."""

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rlgf.data import lock
from rlgf.data.lock import LOCK, FileLock, FolderLock, wait_for_lock
from rlgf.errors import ConfigError, TrainingError

OWNER = f"process {os.getpid()} on {socket.gethostname()}"


def fail(line: str) -> None:
    pytest.fail(line)


def test_one_lock_at_a_time_and_its_file_goes_with_it(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "x.lock"), FileLock(tmp_path / "x.lock")
    assert first.acquire()
    assert not second.acquire()
    assert second.owner() == OWNER
    first.release()
    assert not (tmp_path / "x.lock").exists()
    assert second.acquire()
    second.release()


HOLDER = """
import sys, time
from pathlib import Path
from rlgf.data.lock import FileLock
assert FileLock(Path(sys.argv[1])).acquire()
print("locked", flush=True)
time.sleep(60)
"""


def test_the_system_releases_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        assert not FileLock(path).acquire()
        assert FileLock(path).owner() == f"process {process.pid} on {socket.gethostname()}"
        process.kill()
    assert path.exists()  # what it left is no hindrance
    own = FileLock(path)
    assert own.acquire()
    assert json.loads(path.read_text())["pid"] == os.getpid()
    own.release()


def test_a_file_that_its_owner_deletes_meanwhile_is_not_taken_for_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (FileLock(tmp_path / "x.lock") for _ in range(3))
    assert first.acquire()
    flock, calls = lock.fcntl.flock, list[int]()

    def release_before(handle: int, operation: int) -> None:
        calls.append(handle)
        if len(calls) == 1:  # between the opening and the locking of the second
            first.release()
        flock(handle, operation)

    monkeypatch.setattr(lock.fcntl, "flock", release_before)
    assert second.acquire()
    assert len(calls) == 2
    assert not third.acquire()
    second.release()


def test_a_folder_in_use_is_refused_by_the_name_of_its_process(tmp_path: Path) -> None:
    words = f"{OWNER} trains {tmp_path} at this moment: wait for it, stop it, or choose another --out"
    second = FolderLock(tmp_path, "trains", fail)
    with FolderLock(tmp_path, "trains", fail).held(), pytest.raises(ConfigError, match=words), second.held():
        pytest.fail("two at once")
    assert not (tmp_path / LOCK).exists()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_folder_that_is_deleted_under_its_process_is_noticed(tmp_path: Path, replaced: bool) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    locked = FolderLock(folder, "trains", fail)
    locked.check()  # nothing to check before it is locked
    with locked.held():
        locked.check()
        shutil.rmtree(folder)
        if replaced:
            folder.mkdir()
            (folder / LOCK).write_text("")
        with pytest.raises(TrainingError, match="was deleted or replaced while this process wrote to it"):
            locked.check()


def test_a_file_system_without_locks_is_used_with_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(handle: int, operation: int) -> None:
        raise OSError(lock.errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    lines = list[str]()
    with FolderLock(tmp_path, "trains", lines.append).held():
        pass
    assert lines == [f"the file system of {tmp_path} has no locks: only one process may use the folder at a time"]


def test_whoever_waits_says_for_whom_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    path, lines, first = tmp_path / "x.lock", list[str](), FileLock(tmp_path / "x.lock")
    assert first.acquire()
    told = threading.Event()

    def report(line: str) -> None:
        lines.append(line)
        told.set()

    def wait() -> None:
        with wait_for_lock(path, "sft-1", report):
            lines.append("made")

    thread = threading.Thread(target=wait)
    thread.start()
    assert told.wait(10)
    first.release()
    thread.join(10)
    assert lines == [f"sft-1: waiting for {OWNER}, which is making it", "made"]
