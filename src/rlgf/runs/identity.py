"""The identity of a run: everything that affects its numbers, and a comparison of identities."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from rlgf.data.checksums import DamagedError, content_identity, fingerprint, read_checked_json
from rlgf.data.source_hash import spec_hash
from rlgf.errors import ConfigError, DataError

IDENTITY = "identity.json"
PATHS = (  # settings that may name a local file or folder
    "policy", "model.path", "guide.model.path", "critic.path", "task.data", "preferences.data", "preferences.path",
    "reward.path", "judge.template",
)  # fmt: skip
SPECS = ("guide.spec", "judge.spec")  # settings whose part after the colon may name one
OPTIONS = ("task.options.", "guide.options.", "reward.options.", "evaluation.metric_options.")
LIBRARIES = ("rlgf", "torch", "transformers", "tokenizers")
MODEL_KINDS = ("model", "run")
WEIGHT = "weight of reward "  # begins the key of a weight whose reward is a local folder
DERIVED = ("content of ", "source of ", "version of ", WEIGHT)  # begin keys that no setting has
MISSING = object()


def with_contents(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with local files and user-defined code replaced by their contents.

    A file or folder at another path with the same content is the same. Keys of contents begin with
    'content of', those of code with 'source of'; versions of libraries are added.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        parts = cast("list[Any]", list(value)) if isinstance(value, list | tuple) else [value]
        names = [_path_in(key, part) for part in parts]
        contents = [content_identity(name) for name in names]
        content = contents if isinstance(value, list | tuple) else contents[0]
        if contents == names:
            found[key] = value
        elif key.startswith("reward.weights."):
            found[WEIGHT + fingerprint({"files": content})] = value
        else:
            found[f"content of {key}"] = fingerprint({"files": content})
    for key, spec in _python_specs(settings).items():
        found[f"source of {key}"] = spec_hash(spec)
    return found | {f"version of {name}": _version(name) for name in LIBRARIES}


def _path_in(key: str, value: Any) -> str | None:
    """Return the path that a setting may name, or None."""
    if key.startswith("reward.weights."):  # the name is in the key
        return key.removeprefix("reward.weights.")
    if not isinstance(value, str):
        return None
    if key in SPECS:
        kind, _, name = value.partition(":")
        if kind == "run" and name:
            return str(Path(name).expanduser() / "policy")
        return name if kind in MODEL_KINDS and name else None
    if key.rpartition(".")[2] == "chat_template":  # a file of any name, or the template itself
        return None if "{" in value else value
    if key.startswith(OPTIONS):
        return value if "/" in value or "." in value else None
    return value if key in PATHS else None


def _python_specs(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings that name user-defined code, each with its spec."""
    specs = {key: str(settings.get(key)) for key in ("reward.path", "guide.spec", "task.name")}
    specs |= {f"reward {key}": key.removeprefix("reward.weights.") for key in settings if key.startswith("reward.weights.")}
    return {key: spec for key, spec in specs.items() if spec.startswith("python:") and spec.count(":") == 2}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def find_differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each entry in which two identities differ."""
    keys = [*after, *(key for key in before if key not in after)]
    phrases: list[str] = []
    for key in keys:
        old, new = before.get(key, MISSING), after.get(key, MISSING)
        if old == new:
            continue
        if key.startswith(("content of ", "source of ")):
            named = (old is MISSING or new is MISSING) and key.partition(" of ")[2] in before.keys() | after.keys()
            phrases += [] if named else [f"the {key} has changed"]
        else:
            phrases.append(f"{key} is {_shown(old)} there, {_shown(new)} here")
    return phrases


def find_setting_differences(identity: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """Return the differences of an identity from settings, except those compared by content."""
    before = {key: value for key, value in identity.items() if not key.startswith(DERIVED)}
    after = {key: value for key, value in settings.items() if f"content of {key}" not in identity}
    if any(key.startswith(WEIGHT) for key in identity):
        before, after = ({k: v for k, v in values.items() if not k.startswith("reward.weights.")} for values in (before, after))
    return find_differences(before, after)


def _shown(value: Any) -> str:
    if value is MISSING:
        return "not given"
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:80]}…"


def read_history(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Load the identities of a run and the checksums of its config.

    Raises `DataError` if config or identity is damaged.
    """
    if not (folder / IDENTITY).is_file():
        raise ConfigError(f"{folder} holds a run of an earlier rlgf, without {IDENTITY}: choose another --out.")
    try:
        found = read_checked_json(folder / IDENTITY)
    except DamagedError as error:
        raise DataError(f"{error}: restore it, or choose another --out.") from None
    history, checksums = _listed(found.get("history")), _listed(found.get("config_sha256"))
    if not checksums or not history or not all(map(_is_identity, history)):
        raise DataError(f"{folder / IDENTITY} does not hold the identities of a run: restore it, or choose another --out.")
    if hashlib.sha256((folder / "config.yaml").read_bytes()).hexdigest() not in checksums:
        raise DataError(
            f"{folder / 'config.yaml'} is not as the run wrote it: restore it (to change a setting, give it on the command "
            "line), or choose another --out."
        )
    return history, checksums


def _listed(value: Any) -> list[Any]:
    """Return a value if it is a list, otherwise an empty list."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def _is_identity(entry: Any) -> bool:
    """Return whether a value is an identity in the history of a run."""
    if not isinstance(entry, dict):
        return False
    found = cast("dict[str, Any]", entry)
    return isinstance(found.get("identity"), dict) and isinstance(found.get("fingerprint"), str)
