"""Names and docstrings: no old name is left, and every docstring reads like a sentence."""

import ast
import inspect
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rlgf
from helpers import parsed

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "native" / "src").rglob("*.py")])
SCRIPTS = sorted(path for folder in ("bench", "tools", "docs", "examples") for path in (ROOT / folder).rglob("*.py"))
DOCUMENTS = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "Makefile", ROOT / "bench" / "README.md",
    ROOT / "native" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "results").rglob("README.md")),
]  # fmt: skip
RENAMED = tomllib.loads((ROOT / "tools" / "renamed.toml").read_text(encoding="utf-8"))

FORBIDDEN = {
    "What", "Whether", "Who", "Whom", "Whose", "Where", "Which", "How", "Within", "That", "Those", "Nothing",
}  # fmt: skip
"""Words that no docstring begins with: they make a clause, not a sentence."""
NOT_VERBS = {"The", "A", "An", "This", "These", "It", "Its", "Everything", "All", "Some", "Each", "One", "Same"}
MAX_WORDS = 15  # a name in backticks counts as one


def docstrings(path: Path) -> list[tuple[str, ast.AST, str]]:
    """Return place, node and first line of every docstring in a file."""
    found: list[tuple[str, ast.AST, str]] = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                name = getattr(node, "name", "module")
                found.append((f"{path.relative_to(ROOT)}:{name}", node, text.splitlines()[0]))
    return found


def problem(node: ast.AST, line: str) -> str | None:
    """Return what is wrong with the first line of a docstring, or None."""
    first = re.sub(r"\W+$", "", line.split()[0])
    if first in FORBIDDEN:
        return f"begins with {first}"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and first in NOT_VERBS:
        return f"begins with {first} instead of a verb"
    if len(re.findall(r"\w[\w'’-]*", re.sub(r"`[^`]*`", "x", line))) > MAX_WORDS:
        return "is a long first sentence"
    return None


def test_every_docstring_begins_as_a_sentence() -> None:
    wrong = [
        f"{place}: {line!r} {what}"
        for path in SOURCES
        for place, node, line in docstrings(path)
        if (what := problem(node, line))
    ]
    assert wrong == []


def test_no_docstring_of_the_scripts_begins_as_a_clause() -> None:
    wrong = [
        f"{place}: {line!r}"
        for path in SCRIPTS
        for place, _, line in docstrings(path)
        if re.sub(r"\W+$", "", line.split()[0]) in FORBIDDEN
    ]
    assert wrong == []


def public_callables() -> dict[str, tuple[Callable[..., Any], str]]:
    """Return the public functions and methods, and the docstrings that describe their parameters."""
    found: dict[str, tuple[Callable[..., Any], str]] = {}
    for name in rlgf.__all__:
        thing = getattr(rlgf, name)
        if inspect.isfunction(thing):
            found[name] = thing, ""
        elif inspect.isclass(thing):
            methods = {key: value for key, value in vars(thing).items() if inspect.isfunction(value) and key[0] != "_"}
            found |= {f"{name}.{key}": (method, thing.__doc__ or "") for key, method in methods.items()}
    return found


@pytest.mark.parametrize("name", public_callables())
def test_a_public_function_says_what_it_takes_and_returns(name: str) -> None:
    function, of_class = public_callables()[name]
    text = function.__doc__ or ""
    signature = inspect.signature(function)
    taken = [parameter for parameter in signature.parameters if parameter != "self"]
    assert [p for p in taken if not re.search(rf"`{p}`|^ +{p}: ", text + of_class, re.MULTILINE)] == []
    if signature.return_annotation not in (None, "None"):
        assert re.match("Return|Build", text) or re.search(r"^ *(Returns|Yields):", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Return the mean.", None),
        ("Whether it is so.", "begins with Whether"),
        ("The mean of values.", "begins with The instead of a verb"),
        (" ".join(["word"] * 16), "is a long first sentence"),
    ],
)
def test_the_check_of_docstrings_tells_good_from_bad(line: str, expected: str | None) -> None:
    assert problem(ast.parse("def f(): ...").body[0], line) == expected


ATTRIBUTES = {"algorithm.credit"}
"""Old config keys that are attributes of objects today."""


NAMES_OF_OTHERS = ("hints.py", "test_hints.py")
"""Files of names that people type, old ones among them."""


def old_names() -> list[tuple[str, re.Pattern[str]]]:
    """Return every old name that is not also a word of today, with a pattern that finds it."""
    names: list[tuple[str, re.Pattern[str]]] = []
    for old in RENAMED["config"]:
        if "." in old and old not in ATTRIBUTES:
            names.append((old, re.compile(rf"(?<![\w./-]){re.escape(old)}(?![\w])")))
    for old in RENAMED["config_values"]:
        names.append((old, re.compile(rf"(?<![\w.]){re.escape(old)}(?!\w)")))
    for old in RENAMED["metrics"]:
        if "_" in old:
            names.append((old, re.compile(rf"(?<!\w){old}(?!\w)")))
    for old in RENAMED["commands"]:
        names.append((f"rlgf {old}", re.compile(rf"\brlgf {old}\b")))
    for old in RENAMED["public"]:
        if "." in old or "_" in old:
            names.append((old, re.compile(rf"(?<![\w.]){re.escape(old)}(?!\w)")))
    return names


def test_no_old_name_is_left() -> None:
    found, names = list[str](), old_names()
    for path in [*SOURCES, *SCRIPTS, *DOCUMENTS]:
        if path.name in NAMES_OF_OTHERS:
            continue
        text = path.read_text(encoding="utf-8")
        found += [f"{path.relative_to(ROOT)}: {name}" for name, pattern in names if name in text and pattern.search(text)]
    assert found == []
