"""Conversion of errors of files and of memory into sentences."""

import errno
import os
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from rlgf.errors import ConfigError, RlgfError, TrainingError, is_out_of_memory
from rlgf.untrusted_text import shorten

AGAIN = "run the same command again: finished work is kept"
HINTS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or raise the quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "make it writable",
    errno.EACCES: "make it accessible",
    errno.EPERM: "make it accessible",
    errno.ENOENT: "it was deleted or moved while it was in use",
    errno.ESTALE: "it was deleted or moved while it was in use",
    errno.ENOTDIR: "a file has the name of a folder: move it away",
    errno.EISDIR: "a folder has the name of a file: move it away",
    errno.EEXIST: "something else has that name: move it away",
    errno.ENOTEMPTY: "another process wrote to it",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.EIO: "see to the disk",
    errno.ENOMEM: "free some memory",
}
# Libraries in Rust and torch's writer raise errors of their own, with the system's in the message.
CODE = re.compile(r"(?:os error |code: )(\d+)")
FAILED_WRITE = re.compile(r"PytorchStreamWriter failed writing|unexpected pos \d+ vs \d+|No space left on device")
SHOWN = 160  # characters of the message of a library


@contextmanager
def as_sentences() -> Generator[None]:
    """Raise errors of the file system and of memory in the block as `TrainingError`.

    That of a name that no file can have is a `ConfigError`. The first error is its cause. Other
    errors are raised unchanged, and so is that of a closed pipe.
    """
    try:
        yield
    except RlgfError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            place = shorten(str(error.filename2 or error.filename), 80)
            raise ConfigError(
                f"{place} cannot be used ({error.strerror}): choose another --out, or another name of what is to be read."
            ) from error
        sentence = describe_failure(error)
        if sentence is None:
            raise
        raise TrainingError(sentence) from error


def describe_failure(error: Exception) -> str | None:
    """Return an error of files or memory as a sentence, or None for another error."""
    if is_out_of_memory(error):
        return (
            "memory ran out: set runtime.token_budget or ppo.completions_per_iteration lower, choose a smaller model, or end "
            f"other programs; then {AGAIN}."
        )
    if isinstance(error, BrokenPipeError):
        return None
    if isinstance(error, OSError):
        return _describe_file(error.errno, error.filename2 or error.filename, error.strerror or str(error))
    text = str(error)
    if found := CODE.search(text):
        return _describe_file(int(found[1]), None, os.strerror(int(found[1])))
    if type(error).__name__ == "SafetensorError":  # of a file that was read; not imported, as that takes torch's time
        return f"a file of weights is damaged ({text.strip().splitlines()[0][:SHOWN]}): restore it, or make it again."
    if FAILED_WRITE.search(text):
        return _describe_file(errno.ENOSPC, None, text.strip().splitlines()[0][:SHOWN])
    return None


def _describe_file(number: int | None, name: object, problem: str) -> str:
    """Describe a file error in one sentence."""
    place = os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else "a file"
    hint = HINTS.get(number or 0)
    return f"{place} cannot be used ({problem}): {f'{hint}, and {AGAIN}' if hint else AGAIN}."


def require_space(folder: Path, needed: int) -> None:
    """Raise if the disk of `folder` has fewer than `needed` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"the disk under {folder} has {free / 1e6:,.0f} MB free, and the run needs about {needed / 1e6:,.0f} MB: "
            "free some space or choose another --out."
        )
