"""Availability of the Hugging Face Hub, tested once to avoid retries of half a minute."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import constants

# suffixes that no name on the Hub has
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".txt")


@cache
def hub_is_reachable() -> bool:
    """Return whether the Hub can be reached, tested once per process.

    Without a connection its client retries each file for half a minute.
    """
    from huggingface_hub.utils import get_session  # slow to import, with its HTTP client

    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # no connection or offline mode: only the local cache is left
        return False
    return True


def is_local_name(name: str) -> bool:
    """Return whether a name cannot be a Hub name.

    Names on the Hub are NAME or OWNER/NAME; a name with `://` is a URL.
    """
    return "://" not in name and (name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith(FILES))


def path_exists(name: str) -> bool:
    """Return whether there is a file or folder of that name."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # the name is too long, or `~user` does not exist
        return False


def load_failure_reason(name: str, error: BaseException) -> str:
    """Return in one line why a Hub name or local path could not be loaded."""
    if not path_exists(name):
        if is_local_name(name):
            return "there is no such file or folder"
        if not hub_is_reachable():
            return "there is no such file or folder, and the Hugging Face Hub is unreachable"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def offline_if_unreachable() -> Generator[None]:
    """Put the Hub's clients in offline mode during the block if it is unreachable."""
    # imported here because it takes a second
    settings: Any = import_module("datasets").config
    before = constants.HF_HUB_OFFLINE, settings.HF_HUB_OFFLINE
    if not hub_is_reachable():
        constants.HF_HUB_OFFLINE = settings.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, settings.HF_HUB_OFFLINE = before
