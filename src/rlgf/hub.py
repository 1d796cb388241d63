"""Whether the Hugging Face Hub can be reached, so that nothing tries for half a minute where it cannot."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session

FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".txt")  # what no name on the Hub ends with


@cache
def hub_answers() -> bool:
    """Whether the Hub can be reached, asked once: where it cannot, its client tries each file for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # no connection, offline mode: what was downloaded before is all there is
        return False
    return True


def is_local_name(name: str) -> bool:
    """Whether a name can only be that of a file or folder: on the Hub it is NAME or OWNER/NAME, elsewhere an address."""
    return "://" not in name and (name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith(FILES))


def is_there(name: str) -> bool:
    """Whether there is a file or folder of that name."""
    try:
        return Path(name).expanduser().exists()
    except (OSError, RuntimeError):  # too long a name, nobody's home
        return False


def why_not(name: str, error: BaseException) -> str:
    """Why nothing could be loaded by a name of the Hub or this machine, in one line."""
    if not is_there(name):
        if is_local_name(name):
            return "there is no such file or folder"
        if not hub_answers():
            return "there is no such file or folder, and the Hugging Face Hub does not answer"
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


@contextmanager
def asking_if_it_answers() -> Generator[None]:
    """Within it the Hub's clients take what was downloaded before, where it cannot be reached."""
    settings: Any = import_module("datasets").config  # it takes a second, and not all who load this file need it
    before = constants.HF_HUB_OFFLINE, settings.HF_HUB_OFFLINE
    if not hub_answers():
        constants.HF_HUB_OFFLINE = settings.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, settings.HF_HUB_OFFLINE = before
