"""Whether the Hugging Face Hub can be reached, so that nothing tries for half a minute where it cannot."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

from huggingface_hub import constants
from huggingface_hub.utils import get_session


@cache
def hub_answers() -> bool:
    """Whether the Hub can be reached, asked once: where it cannot, its client tries each file for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # no connection, offline mode: what was downloaded before is all there is
        return False
    return True


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
