"""The examples in the docstrings of the public names run, and show what they return."""

import doctest
import runpy
from pathlib import Path
from typing import Any

import pytest

import rlgf
from helpers import with_fast

NAMES = [name for name in rlgf.__all__ if name != "__version__"]
TRAINS = (
    "CheckpointError", "Experience", "Guide", "GuideError", "Interrupted", "RewardError", "Rollout", "Trainer", "TrainingError",
    "prepare", "train",
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
BEGINNING = runpy.run_path(str(ROOT / "docs" / "make.py"))["EXAMPLES_BEGIN_WITH"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stages made by one example are reused by the next."""
    return tmp_path_factory.mktemp("examples")


def examples_of(name: str) -> doctest.DocTest:
    shared: dict[str, Any] = {}
    exec(BEGINNING, shared)
    return doctest.DocTestFinder(recurse=False).find(getattr(rlgf, name), name, globs=shared)[0]


@pytest.mark.parametrize("name", with_fast(NAMES, *(name for name in NAMES if name not in TRAINS)))
def test_the_examples_of_a_public_name_run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    test, said = examples_of(name), list[str]()
    assert test.examples, f"rlgf.{name} has no example in its docstring"
    failed, _ = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not failed, "".join(said)


def test_a_wrong_example_is_found() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert doctest.DocTestRunner(verbose=False).run(wrong, out=lambda text: None).failed == 1
