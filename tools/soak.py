"""Train the smallest run for 2,000 iterations and check that nothing grows: `python tools/soak.py`.

After every iteration the resident memory, the open handles and the threads of the process are read,
and its wall and CPU time since the iteration before, in which metrics, rollouts, trackers and
checkpoints are written. The run is LOLS with two critics and a guide of its own, so that all of the
training loop is in it. The first tenth is left out. Each quantity is summed up by the medians of
blocks of iterations; its growth is the Theil–Sen slope over the blocks times their number, so that
a single slow block decides nothing. The exit status is 1 if a growth exceeds its limit.

`docs/results/soak/` gets `soak.json` and `soak.png` (`--out` names another folder).
"""

import argparse
import datetime
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "results" / "soak"
ITERATIONS, BLOCKS, WARM_UP = 2000, 45, 0.1
LIMITS = {  # the largest growth over the run that counts as none
    "memory_mb": (0.02, "of the median"), "handles": (1.0, "handle"), "threads": (1.0, "thread"),
    "seconds": (0.1, "of the median"), "cpu_seconds": (0.1, "of the median"),
}  # fmt: skip
SMALLEST: dict[str, Any] = {
    "task.options": {"slots": 2, "train_prompts": 64, "held_out_prompts": 16}, "task.max_new_tokens": 4,
    "task.min_new_tokens": 0, "model.layers": 1, "model.width": 16, "model.heads": 2, "guide.model.layers": 1,
    "guide.model.width": 16, "guide.model.heads": 2, "sft.steps": 2, "guide.sft.steps": 2, "algorithm.name": "lols",
    "ppo.completions_per_iteration": 8, "ppo.minibatch_size": 8, "ppo.epochs": 1, "ppo.learning_rate": 1e-5,
    "evaluation.every": 100, "evaluation.prompts": 4, "evaluation.final_prompts": 4, "runtime.threads": 1,
}  # fmt: skip


@dataclass
class Samples:
    """The readings of a run, one for each iteration."""

    memory_mb: list[float] = field(default_factory=list[float])
    handles: list[float] = field(default_factory=list[float])
    threads: list[float] = field(default_factory=list[float])
    seconds: list[float] = field(default_factory=list[float])
    cpu_seconds: list[float] = field(default_factory=list[float])
    last: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        """Start the clocks."""
        self.last = time.perf_counter(), time.process_time()

    def read(self) -> None:
        """Read this process, and the times since the last reading."""
        now = time.perf_counter(), time.process_time()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory_mb.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        self.handles.append(len(os.listdir("/proc/self/fd")))
        self.threads.append(len(os.listdir("/proc/self/task")))
        self.seconds.append(now[0] - self.last[0])
        self.cpu_seconds.append(now[1] - self.last[1])
        self.start()


def main() -> int:
    """Train, write the result and the plot, and return whether anything grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--iterations", type=int, default=ITERATIONS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    options = parser.parse_args()
    began = time.perf_counter()
    samples = run(options.iterations)
    result = {
        **about(), "note": options.note, "iterations": options.iterations, "run_seconds": time.perf_counter() - began,
        "settings": SMALLEST, **summarize(samples),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "soak.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    draw(result, options.out / "soak.png")
    print(printed(result))
    return int(not result["flat"])


def run(iterations: int) -> Samples:
    """Train the smallest run as the command line does, and return the readings."""
    import rlgf
    from rlgf.cli.console import configure_runtime

    config = rlgf.override(rlgf.recipe("quickstart"), [*SMALLEST.items(), ("ppo.iterations", iterations)])
    configure_runtime(config)
    samples = Samples()
    with tempfile.TemporaryDirectory() as folder:
        samples.start()
        rlgf.train(config, Path(folder) / "run", Path(folder) / "stages", on_progress=lambda progress: note(samples, progress))
    return samples


def note(samples: Samples, progress: Any) -> None:
    """Read this process after an iteration, and say every hundredth."""
    samples.read()
    if progress.iteration % 100 == 0:
        print(f"{progress.iteration:,} of {progress.iterations:,} iterations", file=sys.stderr, flush=True)


def about() -> dict[str, Any]:
    """Return the commit, the date and the machine."""
    from rlgf.runs.machine import describe_machine

    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"commit": commit, "date": now, "machine": describe_machine(), "load": os.getloadavg()[0]}


def summarize(samples: Samples) -> dict[str, Any]:
    """Return the block medians, the growth and the verdict of each quantity."""
    found: dict[str, Any] = {}
    for name, (limit, unit) in LIMITS.items():
        blocks = block_medians(getattr(samples, name)[int(WARM_UP * len(samples.seconds)) :])
        scale = statistics.median(blocks) if unit == "of the median" else 1.0
        growth = total_growth(blocks) / scale
        found[name] = {"growth": growth, "limit": limit, "unit": unit, "flat": growth < limit, "block_medians": blocks}
    return {"flat": all(row["flat"] for row in found.values()), "quantities": found}


def block_medians(values: Sequence[float], blocks: int = BLOCKS) -> list[float]:
    """Return the medians of consecutive blocks of equal size."""
    size = max(1, len(values) // blocks)
    return [statistics.median(values[start : start + size]) for start in range(0, len(values) - size + 1, size)]


def total_growth(blocks: Sequence[float]) -> float:
    """Return the median slope over all pairs of blocks, times the steps between them."""
    slopes = [(late - early) / (j - i) for (i, early), (j, late) in itertools.combinations(enumerate(blocks), 2)]
    return statistics.median(slopes) * (len(blocks) - 1) if slopes else 0.0


def printed(result: Mapping[str, Any]) -> str:
    """Return the verdict as printed text."""
    lines = [
        f"{name}: median {statistics.median(row['block_medians']):.4g}, growth {row['growth']:+.3g} {row['unit']} "
        f"(limit {row['limit']:g}): {'flat' if row['flat'] else 'GROWS'}"
        for name, row in result["quantities"].items()
    ]
    return "\n".join([f"{result['iterations']:,} iterations in {result['run_seconds']:.0f} s", *lines])


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw the block medians of each quantity from zero, so that flat looks flat."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {
        "memory_mb": "resident memory, MB", "handles": "open handles", "threads": "threads", "seconds": "seconds an iteration",
        "cpu_seconds": "CPU seconds an iteration",
    }  # fmt: skip
    figure, axes = pyplot.subplots(2, 3, figsize=(12, 5), layout="constrained")
    first, last = WARM_UP * result["iterations"], result["iterations"]
    for place, (name, title) in zip(axes.flat, titles.items()):
        blocks = result["quantities"][name]["block_medians"]
        step = (last - first) / len(blocks)
        place.plot([first + (number + 0.5) * step for number in range(len(blocks))], blocks)
        place.set(title=title, ylim=(0, 1.25 * max(blocks)), xlim=(0, last), xlabel="iteration")
    axes.flat[-1].axis("off")
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
