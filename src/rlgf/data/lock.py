"""Locks of folders: one process at a time trains a run, or builds a stage.

A lock is a file that is locked by `flock`. The system releases it when the process ends in any way,
so the file of a killed process does not block. On one machine this always holds. On a network
file system it holds between machines where the server keeps `flock` locks: NFS of Linux does,
unless mounted with `nolock` or `local_lock`; Lustre with the option `flock`; others see only the
processes of their own machine. A file system that has no locks is used without, with a warning.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rlgf.errors import ConfigError, TrainingError

LOCK = ".lock"
POLL_SECONDS = 0.2
BUSY = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class FileLock:
    """An exclusive lock on a file that names its owner and is finally deleted."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None
        self.is_supported = True  # False: the file system has no locks

    def acquire(self) -> bool:
        """Lock the file and return True, or return False if another process has the lock."""
        while True:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in BUSY:
                    os.close(handle)
                    return False
                if error.errno not in NO_LOCKS:
                    os.close(handle)
                    raise
                self.is_supported = False
            if not self.is_supported or _is_at(handle, self.path):
                break
            os.close(handle)  # its owner deleted the file between opening and locking
        self._handle = handle
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        return True

    def owner(self) -> str:
        """Return the process that has the lock, in words."""
        try:
            found: Any = json.loads(self.path.read_text(encoding="utf-8"))
            return f"process {int(found['pid'])} on {found['host']}"
        except (OSError, ValueError, KeyError, TypeError):  # it is just being written or deleted
            return "another process"

    @property
    def is_acquired(self) -> bool:
        """Return whether this object holds the lock."""
        return self._handle is not None

    def is_in_place(self) -> bool:
        """Return whether the locked file is still at its path."""
        return self._handle is not None and _is_at(self._handle, self.path)

    def release(self) -> None:
        """Delete and unlock the file."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        if _is_at(handle, self.path):
            with suppress(OSError):  # a folder that can no longer be written to
                self.path.unlink()
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Return whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


class FolderLock:
    """The lock of a folder that one process at a time writes to.

    Args:
        folder: exists; its lock is the file `.lock` in it.
        action: describes what the process does with it, as in 'trains'.
        warn: called with a warning if the file system has no locks.
    """

    def __init__(self, folder: Path, action: str, warn: Callable[[str], None]) -> None:
        self.folder, self.action, self.warn = folder, action, warn
        self._lock = FileLock(folder / LOCK)

    @contextmanager
    def held(self) -> Generator[None]:
        """Hold the lock in the block; raise `ConfigError` if another process holds it."""
        if not self._lock.acquire():
            raise ConfigError(
                f"{self._lock.owner()} {self.action} {self.folder} at this moment: wait for it, stop it, or choose another "
                "--out."
            )
        if not self._lock.is_supported:
            self.warn(f"the file system of {self.folder} has no locks: only one process may use the folder at a time")
        try:
            yield
        finally:
            self._lock.release()

    def check(self) -> None:
        """Raise `TrainingError` if the folder was deleted or replaced while it was locked."""
        if self._lock.is_acquired and not self._lock.is_in_place():
            raise TrainingError(
                f"{self.folder} was deleted or replaced while this process wrote to it: what was in it is lost; run the same "
                "command again."
            )


@contextmanager
def wait_for_lock(path: Path, what: str, report: Callable[[str], None]) -> Generator[None]:
    """Hold the lock at a path in the block; wait while another process holds it.

    `what` names what the owner builds, for the report of the wait.
    """
    lock, is_told = FileLock(path), False
    while not lock.acquire():
        if not is_told:
            report(f"{what}: waiting for {lock.owner()}, which is making it")
            is_told = True
        time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        lock.release()
