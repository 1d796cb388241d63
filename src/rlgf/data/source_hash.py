"""Identities of user-defined code: hashes of the sources that a function depends on."""

import ast
import copyreg
import dis
import hashlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import CodeType, FunctionType, GetSetDescriptorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any

DIGITS = 16
MOST_VALUES = 100_000  # that a function uses; one with more counts as without source
LOADS = ("LOAD_GLOBAL", "LOAD_NAME")
MODULE_NAMES = {"__builtins__", "__file__", "__name__", "__package__", "__spec__"}  # globals that say where a module is
GENERATED = ("_abc_impl",)  # attributes of classes
BY_NAME = (type(os.environ), MemberDescriptorType, GetSetDescriptorType)  # objects whose content does not count
CONSTANTS = (bool, int, float, complex, str, bytes, type(None))


class _UnstableError(Exception):
    """A value that has neither source nor a stable content."""


def source_hash(value: Any) -> str | None:
    """Return a short hash of a function's source, or None if it has none.

    Included are the functions, classes, constants and objects that it uses, and modules that it
    imports from its folder. None also if it uses an object that has no stable value.
    """
    if not inspect.isfunction(value) or value.__name__ == "<lambda>":
        return None
    try:
        lines = _Description(value).lines
    except Exception:  # also of what users define, such as a method that is called to copy an object
        return None
    return hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()[:DIGITS]


def spec_hash(spec: str) -> str | None:
    """Return a short hash of the module or file of `python:…:name` and its imports.

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
    _add_imports(tree, path, folder, package, seen)
    return seen


def _add_imports(tree: ast.AST, path: Path, folder: Path, package: tuple[str, ...], seen: set[Path]) -> None:
    """Add the files in `folder` that a syntax tree imports, directly or indirectly."""
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


def _place(name: str, folder: Path, package: tuple[str, ...]) -> Path:
    """Return the path of a module in a folder, which may be its package."""
    names = tuple(name.split("."))
    return folder.joinpath(*(names[len(package) :] if names[: len(package)] == package else names))


def _add_file(file: Path, folder: Path, package: tuple[str, ...], seen: set[Path]) -> None:
    """Add a file in `folder`, if there is one, and what it imports from there."""
    if file.is_relative_to(folder) and file not in seen and file.is_file():
        seen.add(file)
        _imported_files(file, folder, package, seen)


class _Description:
    """The lines that describe a function: its source, and all that it uses.

    Raises `_UnstableError`, or what `inspect` raises, for what has neither source nor stable value.
    """

    def __init__(self, function: FunctionType) -> None:
        self.root = Path(inspect.getsourcefile(inspect.unwrap(function)) or "").parent  # files outside it are not read
        self.seen: dict[int, tuple[int, Any]] = {}  # with the values, as the id of a deleted one is given again
        self.lines: list[str] = []
        self.add(function)

    def add(self, value: Any) -> None:
        """Add the lines of any value."""
        if type(value) is bytes or type(value) is bytearray:
            self.lines.append(hashlib.sha256(value).hexdigest())
        elif isinstance(value, re.Pattern):
            self.lines.append(f"{value.pattern!r} {value.flags}")  # pyright: ignore[reportUnknownMemberType]
        elif isinstance(value, Path):  # a moved folder is the same folder
            self.lines.append(str(value.relative_to(self.root) if value.is_relative_to(self.root) else value))
        elif _is_constant(value):
            self.lines.append(f"{sorted(map(repr, value)) if isinstance(value, set | frozenset) else repr(value)}")
        elif id(value) in self.seen:
            self.lines.append(f"again {self.seen[id(value)][0]}")
        elif len(self.seen) >= MOST_VALUES:
            raise _UnstableError
        else:
            self.seen[id(value)] = len(self.seen), value
            self._add_new(value)

    def _add_new(self, value: Any) -> None:
        wrapped = getattr(value, "__wrapped__", None)
        if inspect.isfunction(value):
            self._add_function(value)
        elif inspect.isfunction(wrapped):  # of functools.cache
            self.add(wrapped)
        elif inspect.isclass(value):
            self._add_class(value)
        elif isinstance(value, ModuleType):
            file = getattr(value, "__file__", None)
            self.lines.append(_files_hash(Path(file), value.__name__) if file and self._is_own(file) else value.__name__)
        elif isinstance(value, staticmethod | classmethod | MethodType):
            self._add_all([value.__func__, getattr(value, "__self__", None)])  # pyright: ignore[reportUnknownMemberType]
        elif isinstance(value, property):
            self._add_all([value.fget, value.fset, value.fdel])
        elif isinstance(value, cached_property):
            self.add(value.func)  # pyright: ignore[reportUnknownMemberType]
        elif type(value) in (list, tuple):
            self._add_all(value)
        elif type(value) is dict:
            self._add_all([part for item in value.items() for part in item])  # pyright: ignore[reportUnknownVariableType]
        elif isinstance(value, BY_NAME):
            self.lines.append(str(type(value)))
        else:
            self._add_object(value)

    def _add_all(self, values: Iterable[Any]) -> None:
        listed = list(values)
        self.lines.append(f"{len(listed)} values")
        for value in listed:
            self.add(value)

    def _is_own(self, file: str | None) -> bool:
        """Return whether a file is in the function's folder, outside virtual environments."""
        if not file or not Path(file).is_relative_to(self.root):
            return False
        inner = Path(file).relative_to(self.root).parts
        return "site-packages" not in inner and not any(part.startswith(".") for part in inner)

    def _add_function(self, function: FunctionType) -> None:
        self.lines.append(function.__qualname__)
        inner = function.__dict__.get("__wrapped__")
        if inner is not None:
            self.add(inner)
        if not self._is_own(inspect.getsourcefile(function.__code__)):
            if function.__code__.co_filename.startswith("<") and self._is_own(function.__globals__.get("__file__")):
                raise _UnstableError  # made by eval or exec
            return
        self.lines.append(inspect.getsource(function.__code__))
        self._add_all([function.__defaults__, function.__kwdefaults__])
        for name, value in function.__dict__.items():
            if name != "__wrapped__" and not name.startswith("__"):
                self._add_named(name, value)
        self._add_code(function)

    def _add_code(self, function: FunctionType) -> None:
        """Add everything that a function's code uses: globals, closure variables, imports."""
        codes = list(_codes(function.__code__))
        names = {step.argval for code in codes for step in dis.get_instructions(code) if step.opname in LOADS}
        for name in sorted(names - MODULE_NAMES):
            if name in function.__globals__:
                value = function.__globals__[name]
                self._add_named(name, value)
                if isinstance(value, ModuleType):  # import package.module
                    used = {inner for code in codes for inner in code.co_names}
                    for inner in sorted(used):
                        if isinstance(vars(value).get(inner), ModuleType):
                            self._add_named(inner, vars(value)[inner])
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
            try:
                self._add_named(name, cell.cell_contents)
            except ValueError:  # not yet assigned
                continue
        path = Path(inspect.getsourcefile(function.__code__) or "")
        package = tuple(filter(None, (function.__globals__.get("__package__") or "").split(".")))
        found: set[Path] = set()
        for code in codes:
            _add_imports(ast.parse("\n".join(_imports(code))), path, path.parent, package, found)
        self.lines += [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in sorted(found)]

    def _add_named(self, name: str, value: Any) -> None:
        self.lines.append(f"{name} =")
        self.add(value)

    def _add_class(self, value: type[Any]) -> None:
        self.lines.append(value.__qualname__)
        in_cell = str(self.root / "cell") if value.__module__ == "__main__" else None  # of a notebook
        if not self._is_own(getattr(sys.modules.get(value.__module__), "__file__", in_cell)):
            return
        has_source = not (issubclass(value, Enum) or (issubclass(value, tuple) and hasattr(value, "_fields")))
        try:
            self.lines.append(inspect.getsource(value))
        except OSError:
            if has_source:  # otherwise it may be made by a call, and its values say all
                raise
        self._add_all([type(value), *value.__bases__])
        for name, item in vars(value).items():
            is_code = inspect.isfunction(item) or isinstance(item, property | staticmethod | classmethod | cached_property)
            if name in GENERATED or (name.startswith("__") and not is_code):
                continue
            made = inspect.isfunction(item) and inspect.unwrap(item).__code__.co_filename == "<string>"
            if not made:  # by a dataclass
                self._add_named(name, item)
        for name, field in getattr(value, "__dataclass_fields__", {}).items():
            self._add_named(name, [given for given in (field.default, field.default_factory) if given is not MISSING])

    def _add_object(self, value: Any) -> None:
        """Add the content that pickling an object would store."""
        kind: Any = type(value)
        self.add(kind)
        if hasattr(kind, "state_dict") or isinstance(value, set | frozenset):  # a model is too large; sets have no order
            raise _UnstableError
        if hasattr(kind, "detach") and hasattr(kind, "numpy"):  # a tensor, whose pickle holds addresses
            self._add_all([str(value.dtype), list(value.shape), value.detach().cpu().double().numpy().tobytes()])
            return
        reduce = copyreg.dispatch_table.get(kind)
        parts: Any = reduce(value) if reduce is not None else value.__reduce_ex__(4)
        if isinstance(parts, str):
            self.lines.append(parts)
            return
        self._add_all([list(part) if isinstance(part, Iterator) else part for part in parts])


def _codes(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of those within it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _imports(code: CodeType) -> Iterator[str]:
    """Yield the import statements in a function's code."""
    steps = list(dis.get_instructions(code))
    for level, names, step in zip(steps, steps[1:], steps[2:]):
        if step.opname == "IMPORT_NAME":  # after its level and the names to import
            listed = ", ".join(names.argval or ())
            yield f"from {'.' * level.argval}{step.argval} import {listed}" if listed else f"import {step.argval}"


def _is_constant(value: Any) -> bool:
    """Return whether a value is a constant whose representation is its content."""
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_constant(item) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return all(_is_constant(key) and _is_constant(item) for key, item in value.items())  # pyright: ignore[reportUnknownVariableType]
    return isinstance(value, CONSTANTS)
