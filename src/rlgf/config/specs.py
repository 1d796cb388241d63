"""Specs of guides, judges and user-defined objects, parsed once."""

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import ModuleType
from typing import Any

from rlgf.errors import USER_FAILURES, ConfigError, restored_state, unknown
from rlgf.untrusted_text import describe_failure


class GuideKind(StrEnum):
    """The kinds of guides that `guide.spec` names."""

    SFT = "sft"  # the policy's initial model
    TRAINED = "trained"  # a model trained here
    MODEL = "model"  # a model, Hub name or folder
    RUN = "run"  # the policy of a run
    SERVER = "server"
    HUMAN = "human"
    REFERENCES = "references"
    PYTHON = "python"  # a function
    PASSED = "passed"  # an object that Python code passes to `rlgf.train`


class JudgeKind(StrEnum):
    """The kinds of judges that `judge.spec` names."""

    PREFERENCES = "preferences"  # a reward model trained here
    MODEL = "model"  # a reward model, Hub name or folder
    SERVER = "server"


@dataclass(frozen=True)
class GuideSpec:
    """A parsed `guide.spec`."""

    kind: GuideKind
    name: str  # after the colon; empty without one
    text: str  # the whole spec


@dataclass(frozen=True)
class JudgeSpec:
    """A parsed `judge.spec`."""

    kind: JudgeKind
    name: str  # after the colon; empty without one
    text: str  # the whole spec


GUIDE_FORMS = ("sft", "trained", "model:PATH", "run:DIR", "server:MODEL@URL", "human", "references", "python:module:name")
JUDGE_FORMS = ("preferences", "model:PATH", "server:MODEL@URL")


def parse_guide(text: str) -> GuideSpec:
    """Parse `guide.spec`; raise `ConfigError` for an unknown kind."""
    text = complete_spec(text)
    if text.startswith("passed:"):
        return GuideSpec(GuideKind.PASSED, text.removeprefix("passed:"), text)
    kind, name = _split(text, "guide", GUIDE_FORMS)
    return GuideSpec(GuideKind(kind), name, text)


def parse_judge(text: str) -> JudgeSpec:
    """Parse `judge.spec`; raise `ConfigError` for an unknown kind."""
    kind, name = _split(text, "judge", JUDGE_FORMS)
    return JudgeSpec(JudgeKind(kind), name, text)


def _split(text: str, what: str, forms: Sequence[str]) -> tuple[str, str]:
    """Split a spec into kind and name; only forms with a colon have a name."""
    kind, colon, name = text.partition(":")
    if not any(kind == form.partition(":")[0] and colon == form.partition(":")[1] for form in forms):
        raise unknown(what, text, forms)
    return kind, name


def complete_spec(text: str) -> str:
    """Prefix 'FILE.py:name' with 'python:'; return any other spec unchanged."""
    file, _, name = text.partition(":")
    return f"python:{text}" if file.endswith(".py") and name.isidentifier() else text


def import_file(path: Path) -> ModuleType:
    """Import a Python file as the module of its name.

    Its folder is searched for what it imports.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise ImportError(f"there is no file {path.name} in {path.parent}")
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) == str(path):
        return loaded
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    name = path.stem if loaded is None else f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_object(spec: str, kind: str) -> Any:
    """Return the object named `python:module:name` or `python:FILE.py:name`.

    The working directory is searched too.
    """
    parts = spec.split(":")
    if len(parts) != 3 or not all(parts):
        raise ConfigError(f"{kind} '{spec}' is not of the form python:module:name or FILE.py:name.")
    _, module, name = parts
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        with restored_state():
            return getattr(import_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind} '{spec}' cannot be loaded ({error}): check the module's and the function's names.") from None
    except USER_FAILURES as error:  # of the module's own code
        raise ConfigError(f"{kind} '{spec}' cannot be loaded ({describe_failure(error)}): fix the module.") from error
