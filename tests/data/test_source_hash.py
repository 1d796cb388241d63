"""Hashes of user-defined code change with what the code does."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from rlgf.data.source_hash import source_hash, spec_hash

MODULE = """
import math
from beside import HELP

SCALE = 2.0
WORDS = {"good", "superb"}

class Counter:
    def count(self, text):
        return len(text)

def helper(text):
    return SCALE * Counter().count(text)

def reward(prompts, texts):
    return [helper(text) + HELP + math.log(2) + (text in WORDS) for text in texts]

def unused():
    return 1
"""


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModuleType]]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    number = 0

    def make(text: str = MODULE, beside: str = "HELP = 1\n") -> ModuleType:
        nonlocal number
        number += 1
        (tmp_path / "beside.py").write_text(beside)
        (tmp_path / f"functions_{number}.py").write_text(text)
        sys.modules.pop("beside", None)
        importlib.invalidate_caches()
        return importlib.import_module(f"functions_{number}")

    yield make
    for name in ["beside", *(f"functions_{i}" for i in range(1, number + 1))]:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[helper(text)", "[-helper(text)"),
        ("SCALE = 2.0", "SCALE = 3.0"),
        ("return SCALE *", "return 1 + SCALE *"),
        ("return len(text)", "return -len(text)"),
        ('"superb"', '"awful"'),
    ],
)
def test_a_change_of_what_a_function_uses_changes_its_hash(load: Callable[..., ModuleType], old: str, new: str) -> None:
    assert old in MODULE
    assert source_hash(load().reward) != source_hash(load(MODULE.replace(old, new)).reward)


def test_what_a_function_does_not_use_is_left_out(load: Callable[..., ModuleType]) -> None:
    assert source_hash(load().reward) == source_hash(load(MODULE.replace("return 1\n", "return 2\n")).reward)


def test_constants_of_another_module_and_of_a_closure_count(load: Callable[..., ModuleType]) -> None:
    assert source_hash(load().reward) != source_hash(load(beside="HELP = 2\n").reward)

    def make(bound: float) -> Callable[..., list[float]]:
        def reward(prompts: list[str], texts: list[str]) -> list[float]:
            return [bound for _ in texts]

        return reward

    assert source_hash(make(1.0)) == source_hash(make(1.0))
    assert source_hash(make(1.0)) != source_hash(make(2.0))


DECORATED = """
import functools
import re

PATTERN = re.compile("a")

def scaled(function):
    @functools.wraps(function)
    def inner(prompts, texts):
        return [2 * number for number in function(prompts, texts)]
    return inner

@functools.cache
def helper():
    return 1.0

@scaled
def reward(prompts, texts):
    return [helper() * len(PATTERN.findall(text)) for text in texts]
"""


@pytest.mark.parametrize(("old", "new"), [("2 * number", "3 * number"), ("return 1.0", "return 4.0"), ('"a"', '"b"')])
def test_decorators_cached_functions_and_patterns_count(load: Callable[..., ModuleType], old: str, new: str) -> None:
    before = source_hash(load(DECORATED).reward)
    assert before == source_hash(load(DECORATED).reward)
    assert before != source_hash(load(DECORATED.replace(old, new)).reward)


def test_a_lambda_and_an_object_have_no_source() -> None:
    assert source_hash(lambda prompts, texts: [1.0]) is None
    assert source_hash(Path()) is None
    assert source_hash(len) is None


def test_a_spec_counts_its_module_and_its_imports_from_the_same_folder(load: Callable[..., ModuleType]) -> None:
    module = load()
    before = spec_hash(f"python:{module.__name__}:reward")
    assert before is not None
    file = Path(str(module.__file__))
    (file.parent / "beside.py").write_text("HELP = 5\n")
    changed = spec_hash(f"python:{module.__name__}:reward")
    assert changed != before
    file.write_text(MODULE + "\n# a comment\n")
    assert spec_hash(f"python:{module.__name__}:reward") not in (before, changed)
    assert spec_hash("python:no_such_module_at_all:reward") is None


@pytest.mark.parametrize("is_namespace", [False, True])
@pytest.mark.parametrize("file", ["helper.py", "__init__.py", "inner/__init__.py", "inner/deep.py", "inner/beside.py"])
def test_a_spec_in_a_package_counts_what_it_imports_by_the_packages_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, is_namespace: bool
) -> None:
    folder = tmp_path / "own_package"
    sources = {
        "rule.py": "from own_package.helper import SCALE\nimport own_package.inner.deep\n",
        "helper.py": "SCALE = 1\n", "__init__.py": "", "inner/__init__.py": "", "inner/deep.py": "from .beside import X\n",
        "inner/beside.py": "X = 1\n",
    }  # fmt: skip
    if is_namespace:
        del sources["__init__.py"]
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    before = spec_hash("python:own_package.rule:reward")
    assert before is not None
    if file in sources:
        (folder / file).write_text(sources[file] + "CHANGED = 1\n")
        assert spec_hash("python:own_package.rule:reward") != before
    sys.modules.pop("own_package", None)


def script(before: str, body: str = "USED", head: str = "def reward(prompts, texts, extra=None):") -> str:
    return f"import functools, re, logging, dataclasses, enum\n{before}\n{head}\n    return {body}\n"


CHANGES = {  # a module with the value 1 in it, which counts if it is 2
    "default": script("SCALE = 1", "by", "def reward(prompts, texts, by=SCALE):"),
    "keyword_default": script("SCALE = 1", "by", "def reward(prompts, texts, *, by=SCALE):"),
    "base": script("class Base:\n    x = 1\nclass Used(Base):\n    pass", "Used().x"),
    "property": script("SCALE = 1\nclass Used:\n    @property\n    def x(self):\n        return SCALE", "Used().x"),
    "staticmethod": script("SCALE = 1\nclass Used:\n    @staticmethod\n    def x():\n        return SCALE", "Used.x()"),
    "class_value": script("SCALE = 1\nclass Used:\n    x = SCALE", "Used.x"),
    "partial": script("def scale(by):\n    return by\nUSED = functools.partial(scale, 1)"),
    "partial_of": script("def scale(by):\n    return 1\nUSED = functools.partial(scale, 3)"),
    "functions": script("def one():\n    return 1\nUSED = {'one': one}"),
    "array": script("import numpy\nUSED = numpy.array([1, 3])"),
    "tensor": script("import torch\nUSED = torch.tensor([1, 3])"),
    "instance": script("class Used:\n    def __init__(self, by):\n        self.by = by\nUSED = Used(1)"),
    "slots": script("class Used:\n    __slots__ = ('by',)\nUSED = Used()\nUSED.by = 1"),
    "dataclass": script("SCALE = 1\n@dataclasses.dataclass\nclass Used:\n    by: int = SCALE\nUSED = Used()"),
    "patterns": script("USED = [re.compile('1')]"),
    "attribute": script("def used():\n    return used.by\nused.by = 1", "used()"),
    "method": script("class Used:\n    def x(self):\n        return 1\nUSED = Used().x"),
    "lambda": script("USED = [lambda: 1]"),
    "tuple_type": script("from collections import namedtuple\nUsed = namedtuple('Used', 'x')\nUSED = Used([1])"),
    "enum": script("class Used(enum.Enum):\n    ONE = 1\n", "Used.ONE"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_what_a_function_uses_counts_in_every_form(load: Callable[..., ModuleType], kind: str) -> None:
    before = source_hash(load(CHANGES[kind]).reward)
    assert before is not None
    assert before == source_hash(load(CHANGES[kind]).reward)
    assert before != source_hash(load(CHANGES[kind].replace("1", "2")).reward)


@pytest.mark.parametrize("statement", ["import beside", "from beside import HELP", "import beside as other"])
def test_imports_within_a_function_count(load: Callable[..., ModuleType], statement: str) -> None:
    text = f"def reward(prompts, texts):\n    {statement}\n    import math\n    return []\n"
    before = source_hash(load(text).reward)
    assert before is not None
    assert before == source_hash(load(text).reward)
    assert before != source_hash(load(text, beside="HELP = 2\n").reward)


@pytest.mark.parametrize(
    "used",
    [
        "threading.Lock()", "(number for number in [1])", "open(__file__)", "{object(), reward_of}",
        "torch.nn.Linear(1, 1)", "type('Made', (), {})", "eval('lambda: 1')",
    ],
)  # fmt: skip
def test_a_function_that_uses_what_has_no_stable_value_is_without_source(load: Callable[..., ModuleType], used: str) -> None:
    module = load(script(f"import threading, torch\ndef reward_of():\n    return 1\nUSED = {used}"))
    assert source_hash(module.reward) is None
    getattr(module.USED, "close", int)()


def test_what_ordinary_functions_use_is_stable(load: Callable[..., ModuleType]) -> None:
    before = """
import collections, json, math, os, pathlib, random, typing
from collections.abc import Callable
from os import environ
import numpy as np, torch, rlgf
from torch import nn, Tensor
LOGGER, HERE, WORDS = logging.getLogger("own"), pathlib.Path(__file__).parent, collections.Counter("abc")
T, Alias, GENERATOR, LAW = typing.TypeVar("T"), dict[str, list[int]], random.Random(0), math.log
class Row(typing.NamedTuple):
    x: int = 0
class Form(typing.Protocol):
    def x(self) -> int: ...
"""
    body = (
        "[LOGGER, HERE, WORDS, T, Alias, GENERATOR, LAW, Row(), Form, json, np, torch, nn, Tensor, rlgf.Prompt, os, "
        "environ, Callable, np.float32, torch.float32]"
    )
    text = script(before, body)
    assert source_hash(load(text).reward) is not None
    assert source_hash(load(text).reward) == source_hash(load(text).reward)
