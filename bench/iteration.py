"""One PPO iteration of rlgf beside one of TRL, on workload S: same work, one run, taking turns (bench/README.md)."""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.workload import Workload

# No torch in this process: what a child's peak memory starts from is what its parent held.

ROOT = Path(__file__).resolve().parent.parent
TORCH, TRL = "torch==2.13.0", "trl==1.12.0"


class Worker:
    """A side of the comparison: a process that does one iteration whenever it is told to."""

    def __init__(self, name: str, command: Sequence[str], threads: int, log: Path) -> None:
        self.name, self.log = name, log
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--threads", str(threads)],
                cwd=ROOT,
                env={**os.environ, **counts, **quiet},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )
        self.about = self._answer()

    def turn(self) -> dict[str, Any]:
        """One iteration, and what it took."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"the {self.name} worker died (all of its log: {self.log}):\n{tail}")
        return json.loads(line)


def trl_python(folder: Path) -> str:
    """The interpreter of TRL's environment, made first where it is not there yet."""
    python = folder / "bin" / "python"
    wanted = [TORCH, TRL]
    probe = "import importlib.metadata as m; print(m.version('torch').split('+')[0], m.version('trl'))"
    if python.exists():
        found = subprocess.run([str(python), "-c", probe], capture_output=True, text=True).stdout.split()
        if found == [name.split("==")[1] for name in wanted]:
            return str(python)
    print(f"making TRL's environment in {folder} ...", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    for requirements in ([TORCH], wanted):  # torch first and exact: an open range would pull gigabytes
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *requirements], check=True)
    return str(python)


def check(sides: Mapping[str, Sequence[Mapping[str, Any]]], expected: Mapping[str, int]) -> None:
    """Refuse to report unless every iteration of either side did exactly the work of the workload."""
    for name, turns in sides.items():
        for number, turn in enumerate(turns):
            if turn["counts"] != dict(expected):
                raise SystemExit(f"iteration {number} of {name} did other work: {turn['counts']}, not {dict(expected)}.")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(about: Mapping[str, Any], turns: Sequence[Mapping[str, Any]], expected: Mapping[str, int]) -> dict[str, Any]:
    """One side's timed iterations in numbers."""
    return {
        "seconds": spread([turn["seconds"] for turn in turns]),
        "cpu_seconds": spread([turn["cpu_seconds"] for turn in turns]),
        "stages": {name: spread([turn["stages"][name] for turn in turns]) for name in turns[0]["stages"]},
        "counts": dict(turns[0]["counts"]),
        "tokens_generated_per_second": expected["tokens_generated"]
        / statistics.median([next(iter(turn["stages"].values())) for turn in turns]),
        "peak_rss_mb": turns[-1]["peak_rss_mb"],
        **about,
    }


def processor() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Set both sides up, let them take turns, and sum up."""
    workload, folder = Workload(), arguments.work.resolve()
    load_before = os.getloadavg()
    peer = trl_python(arguments.environment.resolve())
    subprocess.run([sys.executable, "-m", "bench.workload", str(folder)], cwd=ROOT, check=True)
    turns = arguments.warmup + arguments.pairs
    common = ["--folder", str(folder), "--turns", str(turns)]
    ours = [sys.executable, "-m", "bench.worker_rlgf", *common, "--token-budget", str(arguments.token_budget)]
    workers = {"rlgf": Worker("rlgf", ours, arguments.threads, folder / "rlgf.log")}
    workers["trl"] = Worker("trl", [peer, "-m", "bench.worker_trl", *common], arguments.threads, folder / "trl.log")
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    try:
        for turn in range(turns):
            for name, worker in workers.items():
                answers[name].append(worker.turn())
            kind = "warm-up" if turn < arguments.warmup else f"pair {turn - arguments.warmup + 1}"
            print(
                f"{kind}: " + ", ".join(f"{name} {rows[-1]['seconds']:.2f} s" for name, rows in answers.items()),
                flush=True,
            )
    finally:
        for worker in workers.values():
            worker.close()
    check(answers, workload.expected)
    timed = {name: rows[arguments.warmup :] for name, rows in answers.items()}
    paired = list(zip(timed["rlgf"], timed["trl"]))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": arguments.threads,
            "cpu_capability": workers["rlgf"].about["cpu_capability"],
            "load_before": load_before,
        },
        "workload": asdict(workload),
        "pairs": arguments.pairs,
        "ratio_trl_to_rlgf": {
            "pairs": [theirs["seconds"] / ours["seconds"] for ours, theirs in paired],
            **spread([theirs["seconds"] / ours["seconds"] for ours, theirs in paired]),
            "cpu_seconds": spread([theirs["cpu_seconds"] / ours["cpu_seconds"] for ours, theirs in paired]),
        },
        "sides": {name: summary(workers[name].about, rows, workload.expected) for name, rows in timed.items()},
        "iterations": timed,
    }


def table(result: Mapping[str, Any]) -> str:
    """The result for people."""
    lines = [f"{'':<10}{'seconds (min-max)':>24}{'CPU s':>9}{'peak MB':>9}  seconds by stage"]
    for name, side in result["sides"].items():
        seconds = side["seconds"]
        whole = f"{seconds['median']:.2f} ({seconds['min']:.2f}-{seconds['max']:.2f})"
        stages = ", ".join(f"{stage} {spread['median']:.2f}" for stage, spread in side["stages"].items())
        lines.append(f"{name:<10}{whole:>24}{side['cpu_seconds']['median']:>9.1f}{side['peak_rss_mb']:>9.0f}  {stages}")
    ratio, machine = result["ratio_trl_to_rlgf"], result["machine"]
    least_most = f"{ratio['min']:.2f}-{ratio['max']:.2f} over {result['pairs']} pairs"
    counts = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in result["sides"]["rlgf"]["counts"].items())
    lines.append(
        f"TRL takes {ratio['median']:.2f} times as long ({least_most}; {ratio['cpu_seconds']['median']:.2f} in CPU time)."
    )
    lines.append(f"Each iteration of either side: {counts}.")
    lines.append(
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {machine['cpu_capability']};"
        f" load before the run {machine['load_before'][0]:.1f}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5, help="timed iterations of each side")
    parser.add_argument("--warmup", type=int, default=1, help="iterations of each side before those")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side (all cores)")
    parser.add_argument("--token-budget", type=int, default=0, help="rlgf's runtime.token_budget (0: its default)")
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "bench-trl", help="TRL's, made if missing")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-iteration", help="model, prompts and logs")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "iteration.json")
    arguments = parser.parse_args()
    result = measure(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
