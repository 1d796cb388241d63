"""Optional packages, and the error that names the extra to install."""

import importlib.util

from rlgf.errors import ConfigError


def require_extra(what: str, extra: str, *modules: str) -> None:
    """Raise `ConfigError` unless all these modules are installed."""
    if any(importlib.util.find_spec(module) is None for module in modules):
        raise ConfigError(f"{what} needs the extra '{extra}': pip install 'rlgf[{extra}]'.")
