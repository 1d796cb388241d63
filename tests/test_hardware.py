"""Hardware is known to few: not to the core, and the fast paths have one door."""

import ast
import re
from pathlib import Path

import pytest

import rlgf
from helpers import parsed

PACKAGE = Path(rlgf.__file__).parent
CORE = sorted(path for folder in ("rl", "algorithms") for path in (PACKAGE / folder).rglob("*.py"))
FILES = sorted(PACKAGE.rglob("*.py"))
HARDWARE = re.compile(r"(?<![a-z])(cuda|cpu)(?![a-z])", re.IGNORECASE)
DOOR, NATIVE = "rlgf.kernels.dispatch", "rlgf_native"
IMPORTERS = ("import_module", "__import__", "find_spec")


def tree_of(source: str | Path) -> ast.Module:
    """The syntax tree of a source or a file: read, never changed."""
    return parsed(source) if isinstance(source, Path) else ast.parse(source)


def docstrings_of(tree: ast.AST) -> set[ast.AST]:
    """The nodes of all strings that stand alone as statements: docstrings of functions and of values."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}


def words_of(node: ast.AST) -> list[str]:
    """The names and strings that a node itself spells out."""
    fields = [value for _, value in ast.iter_fields(node)]
    found = [value for value in fields if isinstance(value, str)]
    return found + [value for many in fields if isinstance(many, list) for value in many if isinstance(value, str)]


def hardware_in(source: str | Path) -> list[str]:
    """Every mention of hardware in a source, with its line."""
    tree = tree_of(source)
    docstrings, found = docstrings_of(tree), list[str]()
    for node in ast.walk(tree):
        if node in docstrings:
            continue
        line = getattr(node, "lineno", 0)
        found += [f"{line}: {word}" for word in words_of(node) if HARDWARE.search(word)]
        if isinstance(node, ast.Attribute) and node.attr == "type":
            owner = node.value
            if getattr(owner, "attr", None) == "device" or getattr(owner, "id", None) == "device":
                found.append(f"{line}: device.type")
    return found


def imports_in(source: str | Path) -> list[tuple[int, str]]:
    """Every module that a source imports, and every name that it imports from one, in full."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree_of(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", None))
            found += [(node.lineno, str(node.args[0].value))] * (called in IMPORTERS)
    return found


def is_past_the_door(name: str) -> bool:
    """Return whether an import reaches into the fast paths past their door."""
    inside = name == "rlgf.kernels" or name.startswith(("rlgf.kernels.", "."))  # a relative import could lead anywhere
    return inside and name != DOOR and not name.startswith(f"{DOOR}.")


def is_native(name: str) -> bool:
    """Return whether an import is one of the C kernels."""
    return name.split(".")[0] == NATIVE


def test_the_core_mentions_no_hardware() -> None:
    assert len(CORE) > 8
    found = [f"{path.relative_to(PACKAGE)}:{place}" for path in CORE for place in hardware_in(path)]
    assert found == []


def test_nothing_imports_past_the_door_of_the_fast_paths() -> None:
    outside = [path for path in FILES if path.parent != PACKAGE / "kernels"]
    assert [
        f"{path.relative_to(PACKAGE)}:{line} imports {name}"
        for path in outside
        for line, name in imports_in(path)
        if is_past_the_door(name)
    ] == []


def test_one_file_imports_the_c_kernels() -> None:
    importers = {path.relative_to(PACKAGE).as_posix() for path in FILES for _, name in imports_in(path) if is_native(name)}
    assert importers == {"kernels/native.py"}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("x = y.cpu()", ["1: cpu"]),
        ("import torch\ntorch.cuda.synchronize()", ["2: cuda"]),
        ("device = 'cuda:0'", ["1: cuda:0"]),
        ("def f(on_cpu): ...", ["1: on_cpu"]),
        ("f(use_cpu=1)", ["1: use_cpu"]),
        ("from torch import cuda", ["1: cuda"]),
        ("global CPU_COUNT", ["1: CPU_COUNT"]),
        ("m = f'on {place} cpu'", ["1:  cpu"]),
        ("a = model.device.type == place", ["1: device.type"]),
        ("a = device.type", ["1: device.type"]),
        ('"""On a cpu."""\ndef f():\n    """Use cuda."""\n    x = 1\n    """A cpu."""  # cuda', []),
        ("a, b = x.to(y.device), node.type\noccupied = 1", []),
    ],
)
def test_mentions_of_hardware_are_found(source: str, expected: list[str]) -> None:
    assert hardware_in(source) == expected


@pytest.mark.parametrize(
    ("source", "past", "native"),
    [
        ("from rlgf.kernels import dispatch", False, False),
        ("from rlgf.kernels.dispatch import select", False, False),
        ("import rlgf.kernels.dispatch", False, False),
        ("def f():\n    from rlgf.kernels import native", True, False),
        ("from rlgf.kernels.linear import FastLinear", True, False),
        ("import rlgf.kernels", True, False),
        ("from ..kernels import native", True, False),
        ("importlib.import_module('rlgf.kernels.native')", True, False),
        ("import rlgf_native", False, True),
        ("from rlgf_native.library import call", False, True),
        ("__import__('rlgf_native')", False, True),
        ("import rlgf_native_tools", False, False),
    ],
)
def test_imports_past_the_door_are_found(source: str, past: bool, native: bool) -> None:
    found = [name for _, name in imports_in(source)]
    assert any(map(is_past_the_door, found)) == past
    assert any(map(is_native, found)) == native
