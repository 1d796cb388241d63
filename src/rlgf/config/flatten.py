"""Config dataclasses as nested and flat dicts."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one flat dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(cast("Mapping[str, Any]", value), f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownArgumentType]
    return flat


def to_dict(config: Any) -> dict[str, Any]:
    """Return the config as nested plain dicts, as written to `config.yaml`."""
    return dataclasses.asdict(config)
