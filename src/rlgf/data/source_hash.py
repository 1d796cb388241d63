"""Identities of user-defined code: hashes of the sources that a function depends on."""

import ast
import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

DIGITS = 16
CONSTANTS = (bool, int, float, complex, str, bytes, type(None))


def source_hash(value: Any) -> str | None:
    """Return a short hash of a function's source, or None without one (a lambda, an object).

    Included are the functions, classes and constants that it uses from its own module and from
    modules in the same folder, as far as they can be found by name.
    """
    if not inspect.isfunction(value) or value.__name__ == "<lambda>":
        return None
    try:
        return hashlib.sha256("\n".join(_sources(value, set())).encode("utf-8", "replace")).hexdigest()[:DIGITS]
    except (OSError, TypeError):
        return None


def spec_hash(spec: str) -> str | None:
    """Return a short hash of the module or file of `python:…:name` and of what it imports.

    Imports are followed to modules in the same folder. None if the source cannot be found.
    """
    name = spec.split(":")[1]
    if name.endswith(".py"):
        path = Path(name).expanduser()
        return _files_hash(path, path.stem) if path.is_file() else None
    try:
        loaded = sys.modules.get(name)
        found = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    if found is None or not found.origin or not Path(found.origin).is_file():
        return None
    return _files_hash(Path(found.origin), name)


def _files_hash(path: Path, module: str) -> str:
    """Return a short hash of a module and its imports from its folder."""
    digest, names = hashlib.sha256(), tuple(module.split("."))
    package = names if path.name == "__init__.py" else names[:-1]
    seen = {path}
    if package:  # imported before the module
        _add_file(path.parent / "__init__.py", path.parent, package, seen)
    for file in sorted(_imported_files(path, path.parent, package, seen)):
        digest.update(file.relative_to(path.parent).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:DIGITS]


def _imported_files(path: Path, folder: Path, package: tuple[str, ...], seen: set[Path]) -> set[Path]:
    """Add the files that `path` imports from `folder` to `seen`, and those they import.

    `package` names the package that `folder` is, or is empty.
    """
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return seen
    for node in ast.walk(tree):
        places: list[Path] = []
        if isinstance(node, ast.Import):
            places = [_place(alias.name, folder, package) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _place(node.module or "", folder, package)
            if node.level:
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            places = [base, *(base / alias.name for alias in node.names)]
        for place in places:
            inner = [place, *place.parents]  # packages on the way are imported too
            for file in (place.with_suffix(".py"), *(outer / "__init__.py" for outer in inner if outer != folder)):
                _add_file(file, folder, package, seen)
    return seen


def _place(name: str, folder: Path, package: tuple[str, ...]) -> Path:
    """Return where a module of that name is in a folder, which may be its package."""
    names = tuple(name.split("."))
    return folder.joinpath(*(names[len(package) :] if names[: len(package)] == package else names))


def _add_file(file: Path, folder: Path, package: tuple[str, ...], seen: set[Path]) -> None:
    """Add a file in `folder`, if there is one, and what it imports from there."""
    if file.is_relative_to(folder) and file not in seen and file.is_file():
        seen.add(file)
        _imported_files(file, folder, package, seen)


def _sources(value: Any, seen: set[int]) -> Iterator[str]:
    """Yield the sources of a function or class and of what it names."""
    if id(value) in seen:
        return
    seen.add(id(value))
    yield inspect.getsource(value)
    if inspect.isfunction(value) and inspect.unwrap(value) is not value:  # the source above is that of the inner function
        yield inspect.getsource(value.__code__)
        yield from _named_sources(inspect.unwrap(value), seen)
    functions = [value] if inspect.isfunction(value) else [item for item in vars(value).values() if inspect.isfunction(item)]
    for function in functions:
        yield from _named_sources(function, seen)


def _named_sources(function: FunctionType, seen: set[int]) -> Iterator[str]:
    names = sorted(_names(function.__code__))
    values = {name: function.__globals__[name] for name in names if name in function.__globals__}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            values[name] = cell.cell_contents
        except ValueError:  # not yet assigned
            continue
    own = Path(inspect.getsourcefile(function) or "").parent
    for name, used in values.items():
        if not inspect.isfunction(used) and inspect.isfunction(inner := getattr(used, "__wrapped__", None)):
            used = inner  # of functools.cache
        if isinstance(used, re.Pattern):
            yield f"{name} = {used.pattern!r} {used.flags}"  # pyright: ignore[reportUnknownMemberType]
        elif _is_constant(used):
            yield f"{name} = {sorted(map(repr, used)) if isinstance(used, set | frozenset) else repr(used)}"
        elif isinstance(used, ModuleType):
            file = getattr(used, "__file__", None)
            if file and Path(file).parent == own:
                yield f"{name} = {_files_hash(Path(file), used.__name__)}"
        elif inspect.isfunction(used) or inspect.isclass(used):
            file = inspect.getsourcefile(used) if used.__module__ != "builtins" else None
            if file and Path(file).parent == own:
                yield from _sources(used, seen)


def _names(code: CodeType) -> set[str]:
    """Return the global names that a function's code uses, inner functions included."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names(constant)
    return found


def _is_constant(value: Any) -> bool:
    """Return whether a value is a constant whose representation is its content."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_constant(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return all(_is_constant(key) and _is_constant(item) for key, item in value.items())  # pyright: ignore[reportUnknownVariableType]
    return isinstance(value, CONSTANTS)
