"""Imports go one way: a module imports only from those above it in the published order."""

import ast
import subprocess
import sys
from pathlib import Path

import rlgf

PACKAGE = Path(rlgf.__file__).parent

LAYERS = """
    errors display types randomness schedules native ops algorithms config budget hub data prompting preferences plugins
    tokens packing processes lanes adapters kernels offload forward models supervised sampling guides ngram denoising scoring
    tasks reward_model rewards shaping judge rollout experience metrics evaluate best_of update profiling runs tracking trainer
    stages preference_stage refusals recipes entries finals pipeline check tables figures report compare terminal console cli
"""
"""From what depends on nothing to what depends on all. A folder is one module; FOLDERS orders the files within it."""

ORDER = LAYERS.split()

FOLDERS = {
    "guides": ["base", "local", "cache", "human", "answers", "server", "tokenizing", "remote", "prefetch", "__init__"],
    "scoring": [
        "worker",
        "extras",
        "java",
        "jars",
        "captions",
        "rouge",
        "bertscore",
        "diversity",
        "concepts",
        "functions",
        "score",
        "__init__",
    ],
    "tasks": ["base", "commongen", "embedded", "imdb", "prompts", "tldr", "__init__"],
}


def module_of(path: Path) -> str:
    """The entry of ORDER that a file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports_of(path: Path) -> list[tuple[str, int]]:
    """The modules of this package that a file imports, anywhere in it, as dotted names after `rlgf.`, with lines."""
    found: list[tuple[str, int]] = []
    package = ["rlgf", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from rlgf import ops` names a module, `from rlgf.ops import gae` names what is in one
            inside = PACKAGE.joinpath(*module.split(".")[1:]).is_dir() if module.split(".")[0] == "rlgf" else False
            names = [f"{module}.{alias.name}" for alias in node.names] if inside else [module]
        else:
            continue
        found += [
            (name.removeprefix("rlgf."), node.lineno)
            for name in names
            if name.startswith("rlgf.") and name != "rlgf.__version__"
        ]
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem not in ("__init__", "__main__"))


def test_every_module_has_a_place_in_the_order() -> None:
    assert {module_of(path) for path in FILES} - set(ORDER) == set()
    assert len(ORDER) == len(set(ORDER))
    for folder, names in FOLDERS.items():
        assert sorted(names) == sorted(path.stem for path in (PACKAGE / folder).glob("*.py"))


def test_a_module_imports_only_from_those_above_it() -> None:
    wrong: list[str] = []
    for path in FILES:
        place = ORDER.index(module_of(path))
        for name, line in imports_of(path):
            imported = name.split(".")[0]
            if imported != module_of(path) and (imported not in ORDER or ORDER.index(imported) >= place):
                wrong.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert wrong == []


def test_within_a_folder_imports_go_one_way_too() -> None:
    wrong: list[str] = []
    for folder, names in FOLDERS.items():
        for path in (PACKAGE / folder).glob("*.py"):
            for name, line in imports_of(path):
                parts = name.split(".")
                if parts[0] == folder:
                    inner = parts[1] if len(parts) > 1 and parts[1] in names else "__init__"
                    if names.index(inner) >= names.index(path.stem):
                        wrong.append(f"{folder}/{path.name}:{line} imports {name}")
    assert wrong == []


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, rlgf; assert not {'torch', 'transformers', 'rlgf.config'} & set(sys.modules); rlgf.Config"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_arithmetic_knows_no_model_and_the_words_no_other_module() -> None:
    assert {name.split(".")[0] for name, _ in imports_of(PACKAGE / "ops.py")} == {"types", "native"}
    for alone in ("errors.py", "types.py", "randomness.py", "schedules.py", "native.py"):
        assert imports_of(PACKAGE / alone) == []
