"""Imports go one way: a file imports only from those before it in the published order."""

import ast
import subprocess
import sys
from pathlib import Path

import rlgf
from helpers import parsed

PACKAGE = Path(rlgf.__file__).parent

ORDER = {
    "": (
        "randomness distributed credentials untrusted_text hints errors kernels interrupts "
        "bounds types algorithms data config models tasks text_metrics generation guides "
        "rewards supervised rl evaluation runs reports trainer pipeline experiments cli"
    ),
    "algorithms": "__init__ schedules switch_position baselines advantages losses base guided grouped registry",
    "cli": (
        "__init__ task_checks diagnose terminal options console check compare evaluate "
        "inspect train app"
    ),
    "config": (
        "__init__ base runtime specs sections validation schema loading recipes variants "
        "unread objects"
    ),
    "data": (
        "hub __init__ conversations chat tables files datasets preferences tokenization checksums source_hash "
        "lock scratch"
    ),
    "data/conversations": "__init__ messages template",
    "data/tables": "__init__ text delimited json_file",
    "evaluation": "__init__ intervals model_metrics verdicts win_rate chat_judge evaluate best_of_n",
    "experiments": "__init__ processes compare",
    "generation": (
        "__init__ base beam_search kv_cache kv_decoder general_decoder decoding_path openai "
        "sampling decoder"
    ),
    "generation/openai": (
        "__init__ cache refusals dialects responses usage retries environment messages "
        "client token_ids pool"
    ),
    "guides": "__init__ base human local remote prefetch encoding",
    "kernels": "__init__ concurrency processor native attention linear modules dispatch",
    "models": (
        "__init__ configs log_probs lora offload padding_free forward language_model "
        "input_probe loading critic memory"
    ),
    "pipeline": (
        "__init__ stage_cache resolve stages build_models final_evaluation "
        "reward_model_stage build_rewards preflight build_guide prepare run"
    ),
    "reports": "__init__ tables figures report",
    "rewards": "__init__ base signatures classifier ngram reward_model weighted_sum build",
    "rl": (
        "__init__ tensors metrics shaping experience rollout kl_controller guards optimizers "
        "update agreement model_check"
    ),
    "runs": (
        "__init__ progress machine profiling tracking checkpoints identity failures logs directory "
        "recorder steps"
    ),
    "supervised": "__init__ span_corruption examples loop reward_modeling",
    "tasks": "__init__ base commongen imdb prompts tldr toy_reviews registry",
    "text_metrics": (
        "__init__ jars optional diversity java captions bertscore concepts rouge "
        "as_rewards score worker"
    ),
}  # fmt: skip
"""For each folder its files and folders, from what depends on nothing to what depends on all."""

MAX_FILES, MAX_LINES = 12, 400


def imports_of(path: Path) -> list[tuple[str, int]]:
    """The modules of this package that a file imports, anywhere in it, as dotted names after `rlgf.`, with lines."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(parsed(path)):
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
    code = "import sys, rlgf; assert not {'torch', 'transformers', 'rlgf.config.schema'} & set(sys.modules); rlgf.Config"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_errors_load_nothing_else() -> None:
    code = (
        "import sys, rlgf; rlgf.ConfigError, rlgf.CheckpointError; "
        "own = {'rlgf', 'rlgf.errors', 'rlgf.credentials', 'rlgf.hints', 'rlgf.untrusted_text'}; "
        "assert {name for name in sys.modules if name.startswith('rlgf')} == own; "
        "assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
