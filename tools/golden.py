"""Compare two commits of rlgf bit for bit on short training runs: `python tools/golden.py BASE`.

The runs are five algorithms with a causal model, an encoder–decoder and LoRA adapters, five
iterations each, with `kernels=off` and one thread. Compared are token ids, their origins,
log-probabilities, advantages, returns, weights and metrics. BASE is any commit since this file
exists; the working tree is compared with it. `tools/renamed.toml` has the keys that were renamed in
between.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
RENAMED = ROOT / "tools" / "renamed.toml"
CACHE = ROOT / "build" / "golden"  # recordings, so that a base is trained once
ALGORITHMS = ("ppo", "ppo_pp", "aggrevated", "lols", "d2lols")
ITERATIONS = 5
CHANGING = ("seconds", "tokens_per_second")  # measured times, which differ between any two runs

COMMON: dict[str, Any] = {
    "task.max_new_tokens": 12, "task.min_new_tokens": 3, "sft.steps": 15, "guide.spec": "sft",
    "guide.sampling.top_k": 20, "guide.sampling.top_p": 0.9, "sampling.top_k": 25, "sampling.temperature": 0.9,
    "ppo.iterations": ITERATIONS, "ppo.completions_per_iteration": 16, "ppo.minibatch_size": 8,
    "ppo.mle_coefficient": 0.1, "ppo.mle_batch": 4, "ppo.learning_rate": 3e-4, "kl.coefficient": 0.05,
    "algorithm.options.ppo_pp.beta": 0.7, "algorithm.options.lols.beta_guide": 0.7,
    "algorithm.options.d2lols.beta_guide": 0.7, "algorithm.options.aggrevated.beta": 0.8,
    "algorithm.options.lols.beta_policy": 0.8, "algorithm.options.d2lols.beta_policy": 0.8,
    "algorithm.options.d2lols.switch_iteration": 2,
    "evaluation.final_prompts": 8, "runtime.kernels": "off",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "causal": {},
    "t5": {"model.architecture": "t5"},
    "lora": {"lora.rank": 4, "critic.kind": "lora", "model.architecture": "llama"},
}


def main() -> int:
    """Run both commits and print what differs; the exit status is 0 where nothing does."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", nargs="?", help="the commit to compare the working tree with")
    parser.add_argument("--record", metavar="DIR", help=argparse.SUPPRESS)  # what a subprocess does
    parser.add_argument("--only", default="", help="run only the cases that begin with this")
    options = parser.parse_args()
    if options.record:
        record(Path(options.record), options.only)
        return 0
    if not options.base:
        parser.error("name a commit to compare with")
    base, head = record_base(options.base), CACHE / "head"
    shutil.rmtree(head, ignore_errors=True)
    record_all(
        ROOT, head, [name for name in MODELS if options.only.startswith(name) or name.startswith(options.only)], options.only
    )
    return compare(base, head, options.base)


def record_base(commit: str) -> Path:
    """Return the folder with a commit's recording, made once per version of this file."""
    sha = subprocess.run(["git", "-C", str(ROOT), "rev-parse", commit], check=True, capture_output=True, text=True).stdout
    mark = hashlib.sha256(Path(__file__).read_bytes() + sha.encode()).hexdigest()[:12]
    folder = CACHE / mark
    if (folder / "complete").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        tree = Path(scratch) / "tree"
        subprocess.run(["git", "-C", str(ROOT), "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            record_all(tree, folder, list(MODELS), "")
        finally:
            subprocess.run(["git", "-C", str(ROOT), "worktree", "remove", "--force", str(tree)], check=True)
    (folder / "complete").touch()
    return folder


def record_all(tree: Path, out: Path, models: list[str], only: str) -> None:
    """Record cases with the rlgf of a source tree, one process per model."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    out.mkdir(parents=True)

    def run(name: str) -> int:
        command = [sys.executable, __file__, "--record", str(out), "--only", only if only.startswith(name) else name]
        return subprocess.run(command, env=environment, cwd=out).returncode

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if any(pool.map(run, models)):
            sys.exit("golden: a run failed; nothing was compared")


def renamed() -> dict[str, dict[str, Any]]:
    """Return the table of renamed keys, old to new by kind; empty before it exists."""
    return tomllib.loads(RENAMED.read_text(encoding="utf-8")) if RENAMED.is_file() else {}


def record(out: Path, only: str) -> None:
    """Train every case with the importable rlgf and write what it computed to `out`."""
    import torch

    import rlgf

    torch.set_num_threads(1)
    for name, settings in MODELS.items():
        for algorithm in ALGORITHMS:
            case = f"{name}-{algorithm}"
            if case.startswith(only):
                changes = [*COMMON.items(), *settings.items(), ("algorithm.name", algorithm)]
                record_case(rlgf, changes, out, case)


def record_case(rlgf: Any, changes: list[tuple[str, Any]], out: Path, case: str) -> None:
    """Train one case; write tensors and metrics."""
    import torch
    from safetensors.torch import save_file

    config = configure(rlgf, changes)
    trainer = rlgf.Trainer(rlgf.prepare(config, stages=out / f"stages-{case.partition('-')[0]}"))
    components = getattr(trainer, "components", None) or trainer.parts
    tensors: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for iteration in range(ITERATIONS):
        metrics, experience = trainer.step(iteration)
        rows.append(metrics)
        rollout = experience.rollout
        for field in ("ids", "origin", "log_probs", "full_log_probs"):
            tensors[f"{iteration}.rollout.{field}"] = getattr(rollout, field)
        for field in ("old_log_probs", "reference_log_probs", "values", "returns", "advantages"):
            tensors[f"{iteration}.experience.{field}"] = getattr(experience, field)
    models = components.models
    tensors |= {f"policy.{name}": value for name, value in models.policy.model.state_dict().items()}
    for origin, critic in models.critics.items():
        tensors |= {f"critic.{int(origin)}.{name}": value for name, value in critic.state_dict().items()}
    evaluation = trainer.evaluate(components.task.test[:8])[0]
    rows.append({f"evaluation.{key}": value for key, value in evaluation.items()})
    whole = {name: torch.as_tensor(value).clone().contiguous() for name, value in tensors.items()}
    save_file(whole, out / f"{case}.safetensors")
    (out / f"{case}.json").write_text(json.dumps(rows, default=str), encoding="utf-8")


def configure(rlgf: Any, changes: list[tuple[str, Any]]) -> Any:
    """Apply settings, with old names and values where this rlgf lacks the new ones."""
    valid = valid_keys(type(rlgf.recipe("quickstart")))
    old_keys = {
        new: old
        for old, several in renamed().get("config", {}).items()
        for new in ([several] if isinstance(several, str) else several)
    }
    free_form = tuple(f"{key}." for key, hint in valid.items() if get_origin(hint) is dict)
    known: list[tuple[str, Any]] = []
    for key, value in changes:
        options = get_args(valid.get(key))
        value = OLD_VALUES.get((key, value), value) if options and value not in options else value
        known.append((key if key in valid or key.startswith(free_form) else old_keys[key], value))
    return rlgf.override(rlgf.recipe("quickstart"), known)


# Values that this file uses and older commits call otherwise.
OLD_VALUES = {("runtime.kernels", "off"): "plain", ("critic.kind", "lora"): "adapter"}


def valid_keys(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Return every key of a config dataclass, with its type."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        found[prefix + name] = hint
        if dataclasses.is_dataclass(hint):
            found |= valid_keys(hint, f"{prefix}{name}.")
    return found


def compare(base: Path, head: Path, commit: str) -> int:
    """Print each difference of two recordings; return 1 where there is any."""
    wrong: list[str] = []
    cases = sorted(path.stem for path in head.glob("*.json"))
    tensors = numbers = 0
    for case in cases:
        wrong += [f"{case}: {line}" for line in compare_tensors(base, head, case)]
        found = compare_metrics(base / f"{case}.json", head / f"{case}.json")
        wrong += [f"{case}: {line}" for line in found[0]]
        numbers += found[1]
        tensors += count_tensors(base / f"{case}.safetensors")
    print("\n".join(wrong[:40]))
    verdict = "identical" if not wrong else f"{len(wrong)} differences"
    print(f"golden: {len(cases)} cases, {tensors} tensors, {numbers} metric values against {commit}: {verdict}")
    return int(bool(wrong) or not cases)


def count_tensors(path: Path) -> int:
    """Return the number of tensors in a file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return len(file.keys())


def compare_tensors(base: Path, head: Path, case: str) -> list[str]:
    """Return a line for each tensor that is missing or not equal to the bit."""
    from safetensors.torch import load_file

    old, new = (load_file(folder / f"{case}.safetensors") for folder in (base, head))
    lines = [f"tensor {name} is missing" for name in old.keys() ^ new.keys()]
    for name in sorted(old.keys() & new.keys()):
        a, b = old[name], new[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"tensor {name} is {tuple(a.shape)} {a.dtype}, was {tuple(b.shape)} {b.dtype}")
        elif a.numpy().tobytes() != b.numpy().tobytes():
            lines.append(f"tensor {name} differs by up to {(a.double() - b.double()).abs().max():.3g}")
    return lines


def compare_metrics(base: Path, head: Path) -> tuple[list[str], int]:
    """Return a line for each metric that differs or is missing, and how many agree."""
    table = renamed().get("metrics", {})
    lines: list[str] = []
    equal = 0
    for number, (old, new) in enumerate(zip(json.loads(base.read_text()), json.loads(head.read_text()), strict=True)):
        for key, value in old.items():
            if key.startswith(CHANGING):
                continue
            name = rename(key, table)
            if name not in new and key not in new:
                lines.append(f"metrics {number}: {key} is missing (expected as {name})")
            elif not same(value, new.get(name, new.get(key))):
                lines.append(f"metrics {number}: {key} was {value!r}, is {new.get(name, new.get(key))!r}")
            else:
                equal += 1
    return lines, equal


def rename(key: str, table: dict[str, str]) -> str:
    """Return the new name of a metric, whose part after `evaluation.` is renamed by itself."""
    prefix, separator, rest = key.rpartition("evaluation.")
    return f"{prefix}{separator}{table.get(rest, rest)}"


def same(a: Any, b: Any) -> bool:
    """Return whether two metric values are equal, NaN equal to itself."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b):
        return True
    return a == b


if __name__ == "__main__":
    sys.exit(main())
