"""A pytest plugin (`-p kernels_off`) that keeps the fast paths off, in a package that has none.

Configs ask for `runtime.kernels=auto` unless they say otherwise. So `dispatch.select` itself is
replaced, which `prepare` and the command line call; nothing else is.
"""

import importlib.util
import sys
from collections.abc import Collection
from typing import Any

from rlgf.kernels import dispatch

sys.modules["rlgf_native"] = None  # pyright: ignore[reportArgumentType]  # an import of it raises ImportError
_select = dispatch.select


def select_off(mode: str, without: Collection[str] = ()) -> None:
    """Select 'off', whatever is asked for."""
    _select("off", without)


def pytest_configure(config: Any) -> None:
    """Begin without fast paths, and make sure that there are none."""
    left = [name for name in ("native", "modules", "concurrency") if importlib.util.find_spec(f"rlgf.kernels.{name}")]
    assert not left, f"the package still has fast paths: {left}"
    dispatch.select = select_off
    dispatch.select("auto")
    assert dispatch.describe() == "off"


def pytest_unconfigure(config: Any) -> None:
    """Make sure that nothing switched them on."""
    assert dispatch.describe() == "off"
