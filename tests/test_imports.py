"""Imports go one way: a file imports only from those before it in the published order."""

import ast
import subprocess
import sys
from pathlib import Path

import rlgf

PACKAGE = Path(rlgf.__file__).parent

ORDER = {
    "": (
        "types errors randomness distributed kernels algorithms display hub data config plugins "
        "scoring adapters budget denoising ngram offload ops packing forward profiling "
        "prompting preferences tasks recipes entries schedules tables figures report terminal "
        "tokens models supervised experience metrics reward_model rewards sampling guides runs "
        "judge rollout evaluate best_of shaping stages preference_stage tracking refusals "
        "update trainer console finals pipeline check compare cli"
    ),
    "guides": "answers base cache human local __init__ server remote prefetch tokenizing",
    "kernels": "__init__ concurrency native modules",
    "scoring": (
        "__init__ extras diversity jars java captions bertscore concepts rouge functions score "
        "worker"
    ),
    "tasks": "base commongen embedded imdb prompts tldr __init__",
}  # fmt: skip
"""For each folder its files and folders, from what depends on nothing to what depends on all."""

MAX_FILES, MAX_LINES = 12, 400


def imports_of(path: Path) -> list[tuple[str, int]]:
    """The modules of this package that a file imports, anywhere in it, as dotted names after `rlgf.`, with lines."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # `from rlgf.algorithms import losses` names a module, `from rlgf.algorithms.losses import ppo_loss` a function
            inside = node.module.split(".")[0] == "rlgf" and PACKAGE.joinpath(*node.module.split(".")[1:]).is_dir()
            names = [f"{node.module}.{alias.name}" for alias in node.names] if inside else [node.module]
        else:
            continue
        found += [
            (name.removeprefix("rlgf."), node.lineno)
            for name in names
            if name.startswith("rlgf.") and name != "rlgf.__version__"
        ]
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ("__init__", "__main__"))
FOLDERS = sorted({path.parent for path in PACKAGE.rglob("*.py")})


def folder_of(path: Path) -> str:
    """A folder as ORDER names it."""
    return "" if path == PACKAGE else path.relative_to(PACKAGE).as_posix()


def first_difference(path: Path, imported: str) -> tuple[str, str, str] | None:
    """The innermost common folder of a file and an imported module, and which entry of it leads to either."""
    mine, parts = list(path.relative_to(PACKAGE).with_suffix("").parts), imported.split(".")
    if PACKAGE.joinpath(*parts).is_dir():
        parts.append("__init__")
    depth = 0
    while depth < min(len(mine), len(parts)) and mine[depth] == parts[depth]:
        depth += 1
    if depth in (len(mine), len(parts)):
        return None
    return "/".join(mine[:depth]), mine[depth], parts[depth]


def test_every_file_has_a_place_in_the_order() -> None:
    for folder in FOLDERS:
        names = {path.stem for path in folder.glob("*.py")} | {path.name for path in FOLDERS if path.parent == folder}
        names -= {"__init__", "__main__"} if folder == PACKAGE else set()
        listed = ORDER[folder_of(folder)].split()
        assert sorted(listed) == sorted(names), folder
    assert sorted(ORDER) == sorted(folder_of(folder) for folder in FOLDERS)


def test_a_file_imports_only_from_those_before_it() -> None:
    wrong: list[str] = []
    for path in FILES:
        for imported, line in imports_of(path):
            difference = first_difference(path, imported)
            if difference is None:
                continue
            folder, mine, other = difference
            listed = ORDER[folder].split()
            if other not in listed or listed.index(other) >= listed.index(mine):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {imported}")
    assert wrong == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, rlgf; assert not {'torch', 'transformers', 'rlgf.config'} & set(sys.modules); rlgf.Config"
    subprocess.run([sys.executable, "-c", code], check=True)
