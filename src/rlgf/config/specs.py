"""User-defined objects, named `python:module:name`."""

import importlib
import sys
from pathlib import Path
from typing import Any

from rlgf.errors import ConfigError


def load_object(spec: str, kind: str) -> Any:
    """Return the object named `python:module:name`; the working directory is searched too."""
    parts = spec.split(":")
    if len(parts) != 3 or not all(parts):
        raise ConfigError(f"{kind} '{spec}' is not of the form python:module:name.")
    _, module, name = parts
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind} '{spec}' cannot be loaded ({error}): check the module's and the function's names.") from None
