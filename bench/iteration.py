"""One PPO iteration of rlgf against its peers: same work, one run, taking turns (bench/README.md)."""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.peers import PEERS
from bench.workload import WORKLOADS

# No torch in this process: what a child's peak memory starts from is what its parent held.

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Side:
    """One of the compared sides: its code and the options of its worker."""

    code: str  # rlgf, or a peer of `bench.peers`
    flags: tuple[str, ...] = ()


SIDES = {
    "rlgf": Side("rlgf"),
    "rlgf-bf16": Side("rlgf", ("--precision", "bf16")),
    "rlgf-shared": Side("rlgf", ("--critic", "value_head")),
    "trl": Side("trl"),
    "trl-bf16": Side("trl", ("--precision", "bf16")),
    "tril": Side("tril"),
}
SHORT = {"S": ("rlgf", "trl")}
LONG = {
    "S": ("rlgf", "rlgf-bf16", "rlgf-shared", "trl", "trl-bf16", "tril"),
    "S-llama": ("rlgf", "trl"),
    "S-t5": ("rlgf", "tril"),
    "M": ("rlgf", "trl"),
}


class Worker:
    """A side of the comparison: a process that runs one iteration on request."""

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
        """Run one iteration; return its time and counts."""
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


def check(name: str, turns: Sequence[Mapping[str, Any]], expected: Mapping[str, int]) -> None:
    """Raise unless every iteration of a side did exactly the work of the workload."""
    for number, turn in enumerate(turns):
        if turn["counts"] != dict(expected):
            raise SystemExit(f"iteration {number} of {name} did other work: {turn['counts']}, not {dict(expected)}.")


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(about: Mapping[str, Any], turns: Sequence[Mapping[str, Any]], expected: Mapping[str, int]) -> dict[str, Any]:
    """Return the figures of one side's timed iterations."""
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


def ratios(turns: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the ratio of each peer's time to each rlgf side's, per round."""
    found: dict[str, dict[str, Any]] = {}
    for theirs in (name for name in turns if SIDES[name].code != "rlgf"):
        for ours in (name for name in turns if SIDES[name].code == "rlgf"):
            both = list(zip(turns[theirs], turns[ours]))
            each = [peer["seconds"] / own["seconds"] for peer, own in both]
            cpu = spread([peer["cpu_seconds"] / own["cpu_seconds"] for peer, own in both])
            found[f"{theirs} / {ours}"] = {"rounds": each, **spread(each), "cpu_seconds": cpu}
    return found


def compare(name: str, sides: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Start all sides of a workload, let them take turns, and return the figures."""
    workload, folder = WORKLOADS[name], arguments.work.resolve() / name
    pythons = {peer: make(arguments.environments.resolve()) for peer, make in PEERS.items() if peer in sides_of(sides)}
    subprocess.run([sys.executable, "-m", "bench.workload", name, str(folder)], cwd=ROOT, check=True)
    turns = arguments.warmup + arguments.rounds
    common = ["--workload", name, "--folder", str(folder), "--turns", str(turns)]
    workers: dict[str, Worker] = {}
    answers: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    try:
        for side in sides:
            code = SIDES[side].code
            command = [pythons.get(code, sys.executable), "-m", f"bench.worker_{code}", *common, *SIDES[side].flags]
            workers[side] = Worker(side, command, arguments.threads, folder / f"{side}.log")
        for turn in range(turns):
            for side, worker in workers.items():
                answers[side].append(worker.turn())
            kind = "warm-up" if turn < arguments.warmup else f"round {turn - arguments.warmup + 1}"
            times = ", ".join(f"{side} {rows[-1]['seconds']:.2f} s" for side, rows in answers.items())
            print(f"{name}, {kind}: {times}", flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    for side, rows in answers.items():
        check(side, rows, workload.expected)
    timed = {side: rows[arguments.warmup :] for side, rows in answers.items()}
    return {
        "workload": asdict(workload),
        "ratios": ratios(timed),
        "sides": {side: summary(workers[side].about, rows, workload.expected) for side, rows in timed.items()},
        "iterations": timed,
    }


def sides_of(names: Sequence[str]) -> set[str]:
    """Return the libraries whose code the named sides run."""
    return {SIDES[name].code for name in names}


def measure(plan: Mapping[str, Sequence[str]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all workloads of a plan, and describe the machine."""
    load_before = os.getloadavg()
    workloads = {name: compare(name, sides, arguments) for name, sides in plan.items()}
    first = next(iter(next(iter(workloads.values()))["sides"].values()))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(first, arguments.threads, load_before),
        "rounds": arguments.rounds,
        "workloads": workloads,
    }


def keep(result: Mapping[str, Any], out: Path) -> None:
    """Write a result file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


def machine(about: Mapping[str, Any], threads: int, load_before: Sequence[float]) -> dict[str, Any]:
    """Describe the machine; `about` is a worker's description of itself."""
    return {
        "processor": processor(),
        "cpu_family": cpu_info("cpu family"),  # virtual machines hide the name of the model
        "cpu_model": cpu_info("model"),
        "cores": os.cpu_count(),
        "threads": threads,
        "cpu_capability": about["cpu_capability"],
        "load_before": load_before,
    }


def processor() -> str:
    """Return the name of the processor."""
    return cpu_info("model name") or platform.processor()


def cpu_info(field: str) -> str | None:
    """Return a field of the first processor in /proc/cpuinfo, or None."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    fields = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in fields if name.strip() == field), None)


def table(result: Mapping[str, Any]) -> str:
    """Return the result as a table."""
    lines: list[str] = []
    for name, found in result["workloads"].items():
        lines.append(f"{name:<13}{'seconds (min-max)':>24}{'CPU s':>9}{'peak MB':>9}  seconds by stage")
        for side, figures in found["sides"].items():
            seconds = figures["seconds"]
            whole = f"{seconds['median']:.2f} ({seconds['min']:.2f}-{seconds['max']:.2f})"
            stages = ", ".join(f"{stage} {values['median']:.2f}" for stage, values in figures["stages"].items())
            cpu, peak = figures["cpu_seconds"]["median"], figures["peak_rss_mb"]
            lines.append(f"{side:<13}{whole:>24}{cpu:>9.1f}{peak:>9.0f}  {stages}")
        for pair, ratio in found["ratios"].items():
            least_most = f"{ratio['min']:.2f}-{ratio['max']:.2f} over {result['rounds']} rounds"
            lines.append(f"{pair}: {ratio['median']:.2f} ({least_most}; {ratio['cpu_seconds']['median']:.2f} in CPU time)")
        counts = next(iter(found["sides"].values()))["counts"]
        lines.append("each: " + ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in counts.items()) + ".\n")
    machine = result["machine"]
    lines.append(
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {machine['cpu_capability']};"
        f" load before the run {machine['load_before'][0]:.1f}."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--long", action="store_true", help="all workloads and sides instead of S against TRL")
    parser.add_argument("--workload", choices=WORKLOADS, help="this one alone")
    parser.add_argument("--sides", nargs="+", choices=SIDES, help="these")
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each side")
    parser.add_argument("--warmup", type=int, default=1, help="iterations of each side before those")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side (all cores)")
    parser.add_argument("--environments", type=Path, default=ROOT / "build", help="where the peers' are, made if missing")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-iteration", help="model, prompts and logs")
    parser.add_argument(
        "--out", type=Path, help="default: bench/results/iteration.json, with --long iteration-long.json; of a part: none"
    )
    arguments = parser.parse_args()
    plan = LONG if arguments.long else SHORT
    if arguments.workload:
        plan = {arguments.workload: LONG[arguments.workload]}
    if arguments.sides:
        plan = {name: tuple(arguments.sides) for name in plan}
    result = measure(plan, arguments)
    out = arguments.out
    if out is None and not (arguments.workload or arguments.sides):  # a part does not replace the whole
        out = ROOT / "bench" / "results" / ("iteration-long.json" if arguments.long else "iteration.json")
    if out is not None:
        keep(result, out)
    print(table(result))


if __name__ == "__main__":
    main()
