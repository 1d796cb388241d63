"""Combination lock: completions until solved: `python -m bench.lock --out docs/results/theory`.

The reward is 1 for the whole key of n tokens out of 4 each. The guide chooses each token correctly
with probability .9. Policy and critics are tabular; everything else is the library's own. "Solved"
means that the policy's exact value is at least .9.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tests.theory.tabular import LEARNING, solve_lock

from rlgf.algorithms import registry
from rlgf.algorithms.base import Algorithm
from rlgf.config.sections import PPOConfig

MAKERS: dict[str, Callable[[], Algorithm]] = {
    "PPO": lambda: registry.ppo().build(),
    "PPO++ (β = .5)": lambda: registry.ppo_pp(0.5).build(),
    "D2LOLS (switch at 10)": lambda: registry.d2lols(0.5, 0.8, 10, credit="td").build(),
}


def measure(
    lengths: Sequence[int], seeds: Sequence[int], longest_ppo: int, cap: int, guided_cap: int, ppo: PPOConfig
) -> list[dict[str, Any]]:  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name, make in MAKERS.items():
        for length in lengths:
            if name == "PPO" and length > longest_ppo:
                continue
            most = cap if name == "PPO" else guided_cap
            began = time.process_time()
            texts = [solve_lock(length, make(), seed, most, ppo)[0] for seed in seeds]
            counted = sorted(most if t is None else t for t in texts)
            row = {
                "algorithm": name, "length": length, "cap": most, "texts": texts,
                "solved": sum(t is not None for t in texts), "median": statistics.median(counted),
                "least": counted[0], "most": counted[-1], "cpu_seconds": round(time.process_time() - began, 1),
            }  # fmt: skip
            rows.append(row)
            print(row, flush=True)
    return rows


def plot(rows: Sequence[dict[str, Any]], seeds: int, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, marker in zip(MAKERS, "osD"):
        mine = [row for row in rows if row["algorithm"] == name]
        lengths = [row["length"] for row in mine]
        (line,) = axes.plot(lengths, [row["median"] for row in mine], marker=marker, label=name)
        least, most = [row["least"] for row in mine], [row["most"] for row in mine]
        axes.fill_between(lengths, least, most, color=line.get_color(), alpha=0.15)
        for row in mine:
            if row["solved"] < seeds:
                text = f"{row['solved']}/{seeds} solved"
                place = (row["length"], row["median"])
                axes.annotate(text, place, textcoords="offset points", xytext=(0, 9), ha="center", fontsize=8)
    axes.set(yscale="log", xlabel="length of the key", ylabel="texts until solved")
    axes.set_title("Combination lock, 4 tokens, guide right with p = .9")
    axes.margins(x=0.08)
    axes.set_xticks(sorted({row["length"] for row in rows}))
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    note = f"median of {seeds} seeds, band from least to most; unsolved runs count as their cap"
    figure.text(0.5, 0.005, note, ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="+", default=[3, 4, 5, 6, 8, 10, 12])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--longest-ppo", type=int, default=8)
    parser.add_argument("--cap", type=int, default=30_000, help="completions after which PPO gives up")
    parser.add_argument("--guided-cap", type=int, default=15_000, help="the same for the others")
    parser.add_argument("--learning-rate", type=float, default=LEARNING.learning_rate)
    parser.add_argument("--name", default="lock", help="of the files that are written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    ppo = dataclasses.replace(LEARNING, learning_rate=arguments.learning_rate)
    began, clock = time.process_time(), time.monotonic()
    rows = measure(arguments.lengths, arguments.seeds, arguments.longest_ppo, arguments.cap, arguments.guided_cap, ppo)
    packages = ("rlgf", "torch", "transformers", "numpy")
    settings = ("completions_per_iteration", "epochs", "learning_rate", "gae_lambda", "clip_range", "whiten_advantages")
    result = {
        "what": "texts until the policy's exact value is at least .9; null: not within the cap",
        "machine": f"{platform.machine()}, {platform.system()}, 1 thread",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "seeds": arguments.seeds,
        "guide": 0.9,
        "ppo": {key: getattr(ppo, key) for key in settings},
        "cpu_seconds": round(time.process_time() - began, 1),
        "seconds": round(time.monotonic() - clock, 1),
        "rows": rows,
    }
    text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    (arguments.out / f"{arguments.name}.json").write_text(text, encoding="utf-8")
    plot(rows, len(arguments.seeds), arguments.out / f"{arguments.name}.png")


if __name__ == "__main__":
    main()
