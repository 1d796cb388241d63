"""Scratch folders, in which a stage is built next to its target.

A scratch folder is hidden, and its name has the target's name, the fingerprint of the inputs and
the machine. One that a signal left with a step of training in it is named `stopped`, and whoever
builds the target next renames it to its own; so two processes never use the same one, also where a
network file system has no locks.
"""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from rlgf.data.lock import LOCK, FileLock, wait_for_lock

STEP = "step"  # the folder in a scratch folder that has the state of the training
FOREIGN_SECONDS = 86400.0  # age at which a scratch folder of another machine counts as abandoned
MAKING, STOPPED = ".making-", ".stopped-"


def stage_lock(target: Path, report: Callable[[str], None]) -> AbstractContextManager[None]:
    """Return a context manager that waits for the lock of a stage and holds it."""
    return wait_for_lock(_lock_path(target), target.name, report)


@contextmanager
def scratch_folder(target: Path, fingerprint: str) -> Generator[Path]:
    """Yield a scratch folder for a target whose lock is held.

    It has the last step of an interrupted build with the same fingerprint, if there is one. Scratch
    folders that killed processes left are deleted. After an error the folder is deleted, unless it
    has a step.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = _claim(target, fingerprint)
    try:
        yield scratch
    except BaseException:
        if not _keep_step(scratch, _stopped(target, fingerprint)):
            shutil.rmtree(scratch, ignore_errors=True)
        raise


def target_of(scratch: Path) -> str:
    """Return the name of the target of a scratch folder."""
    return scratch.name[1:].partition(MAKING)[0]


def _claim(target: Path, fingerprint: str) -> Path:
    """Create a scratch folder, continuing an abandoned one's step, and delete abandoned ones."""
    prefix = f".{target.name}{MAKING}{fingerprint}-"
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{prefix}{socket.gethostname()}-"))
    dead = [path for path in _abandoned(target) if path != scratch]
    unfinished = [path for path in dead if path.name.startswith(prefix) and (path / STEP).is_dir()]
    for path in (_stopped(target, fingerprint), *unfinished):
        with suppress(OSError):  # not there, or another process was first
            os.rename(path, scratch)
            break
    for path in dead:
        shutil.rmtree(path, ignore_errors=True)
    for path in target.parent.glob(f"{_escaped(f'.{target.name}{STOPPED}')}*"):
        if path.name != _stopped(target, fingerprint).name:  # of other inputs
            shutil.rmtree(path, ignore_errors=True)
    return scratch


def _abandoned(target: Path) -> list[Path]:
    """Return the scratch folders of a target whose processes have ended."""
    found: list[Path] = []
    for path in target.parent.glob(f".*{MAKING}*"):
        name, _, rest = path.name[1:].partition(MAKING)
        host = rest.partition("-")[2].rpartition("-")[0]
        if host != socket.gethostname() and time.time() - _last_change(path) < FOREIGN_SECONDS:
            continue
        lock = FileLock(_lock_path(target.with_name(name)))
        if name == target.name:
            found.append(path)
        elif lock.acquire():
            found.append(path)
            lock.release()
    return found


def _keep_step(scratch: Path, stopped: Path) -> bool:
    """Keep a scratch folder that holds a training step; return False without one."""
    if not (scratch / STEP).is_dir():
        return False
    with suppress(OSError):
        for path in scratch.iterdir():
            if path.name != STEP:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.rmtree(stopped, ignore_errors=True)
        os.rename(scratch, stopped)
    return True


def _last_change(folder: Path) -> float:
    times = [0.0]
    for path in (folder, *folder.rglob("*")):
        with suppress(OSError):
            times.append(path.stat().st_mtime)
    return max(times)


def _stopped(target: Path, fingerprint: str) -> Path:
    return target.with_name(f".{target.name}{STOPPED}{fingerprint}")


def _lock_path(target: Path) -> Path:
    return target.with_name(f".{target.name}{LOCK}")


def _escaped(text: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in text)
