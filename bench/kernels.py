"""The time that the fast paths save: with all, without C, none, and without each."""

import argparse
import datetime
import json
import os
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.iteration import ROOT, Worker, check, cpu_info, keep, machine, processor, spread, summary
from bench.workload import WORKLOADS

# No torch in this process, as in `bench.iteration`.

RESULTS = ROOT / "bench" / "results"
MEASURED = ("S", "S-llama")
MODES = ("off", "torch", "native")
BASE = "native"  # all fast paths; the other sides are divided by it
RESAMPLES, SEED = 10_000, 0


def flags(side: str) -> list[str]:
    """Return the options of a side's worker; a side is a mode or a disabled path."""
    return ["--kernels", side] if side in MODES else ["--kernels", BASE, "--without", side]


class Rounds:
    """The finished rounds of a workload, appended to a file so that runs can resume."""

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path, self.key = path, dict(key)
        self.about: dict[str, dict[str, Any]] = {}  # what each side's worker says of itself
        self.turns: list[dict[str, Any]] = []  # for each round the answer of each side
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may be cut
        if rows and rows[0]["key"] == self.key:
            self.about, self.load_before, self.turns = rows[0]["about"], rows[0]["load_before"], rows[1:]

    def start(self, about: Mapping[str, dict[str, Any]], load_before: Sequence[float]) -> None:
        """Rewrite the file with its known rounds."""
        self.about, self.load_before = self.about or dict(about), self.load_before if self.about else load_before
        rows = [{"key": self.key, "about": self.about, "load_before": self.load_before}, *self.turns]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def append(self, turns: dict[str, Any]) -> None:
        """Add a round and write it."""
        self.turns.append(turns)
        with self.path.open("a") as file:
            file.write(json.dumps(turns) + "\n")


def measure(name: str, arguments: argparse.Namespace) -> Rounds:
    """Let all sides of a workload take turns until it has its rounds."""
    folder = arguments.work.resolve() / name
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("quick.jsonl" if arguments.quick else "rounds.jsonl")
    if arguments.quick:
        path.unlink(missing_ok=True)
    known = Rounds(path, {"commit": commit(), "processor": identity(), "threads": arguments.threads, "workload": name})
    if known.turns:
        print(f"{name}: going on after {len(known.turns)} rounds of an earlier run ({path})", flush=True)
    if len(known.turns) >= arguments.rounds:
        known.turns = known.turns[: arguments.rounds]
        return known
    load_before = os.getloadavg()
    subprocess.run([sys.executable, "-m", "bench.workload", name, str(folder)], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "bench.worker_rlgf", "--workload", name, "--folder", str(folder)]
    command += ["--turns", str(1 + arguments.rounds)]
    workers: dict[str, Worker] = {}
    try:
        workers[BASE] = Worker(BASE, [*command, *flags(BASE)], arguments.threads, folder / f"{BASE}.log")
        told = workers[BASE].about
        paths = [] if arguments.quick else [path for path in told["paths"] if path not in told["unused"]]
        sides = [*MODES, *paths]
        for side in sides:
            if side != BASE:
                workers[side] = Worker(side, [*command, *flags(side)], arguments.threads, folder / f"{side}.log")
        known.start({side: workers[side].about for side in sides}, load_before)
        for side in sides:
            check(side, [workers[side].turn()], WORKLOADS[name].expected)  # the warm-up
        for number in range(len(known.turns), arguments.rounds):
            order = sides if number % 2 == 0 else sides[::-1]
            turns = {side: workers[side].turn() for side in order}
            for side in sides:
                check(side, [turns[side]], WORKLOADS[name].expected)
            known.append(turns)
            times = ", ".join(f"{side} {turns[side]['seconds']:.2f} s" for side in sides)
            print(f"{name}, round {number + 1} of {arguments.rounds}: {times}", flush=True)
    finally:
        for worker in workers.values():
            worker.close()
    return known


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the bootstrap 95 % interval of the median."""
    draws = random.Random(SEED)
    medians = sorted(statistics.median(draws.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[RESAMPLES // 40], medians[-1 - RESAMPLES // 40]


def compared(rounds: Rounds, expected: Mapping[str, int]) -> dict[str, Any]:
    """Return the figures of every side.

    `ratio` is the median over rounds of a side's seconds over those of all fast paths in the same
    round. `saved` is 1 - 1 / ratio: the share of the side's iteration that the missing paths save.
    """
    found: dict[str, Any] = {}
    for side, about in rounds.about.items():
        turns = [turn[side] for turn in rounds.turns]
        ratios = [turn[side]["seconds"] / turn[BASE]["seconds"] for turn in rounds.turns]
        median, (low, high) = statistics.median(ratios), interval(ratios)
        cpu = spread([turn[side]["cpu_seconds"] / turn[BASE]["cpu_seconds"] for turn in rounds.turns])
        about = {key: value for key, value in about.items() if key not in ("paths", "unused")}
        found[side] = {
            "ratio": {"median": median, "interval": [low, high], "cpu_seconds": cpu},
            "saved": {"median": 1 - 1 / median, "interval": [1 - 1 / low, 1 - 1 / high]},
            **summary(about, turns, expected),
            "rounds": [turn["seconds"] for turn in turns],
        }
    return found


def result_of(measured: Mapping[str, Rounds], arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the result: machine, versions, commit, and the sides of every workload."""
    first = next(iter(measured.values()))
    return {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(first.about[BASE], arguments.threads, first.load_before),
        "versions": first.about[BASE]["versions"],
        "rounds": arguments.rounds,
        "bootstrap": {"resamples": RESAMPLES, "seed": SEED, "interval": 0.95},
        "workloads": {
            name: {
                "workload": asdict(WORKLOADS[name]),
                "unused": rounds.about[BASE]["unused"],
                "sides": compared(rounds, WORKLOADS[name].expected),
            }
            for name, rounds in measured.items()
        },
    }


def commit() -> str:
    """Return the last commit of the timed code, with `-dirty` if changed since."""
    timed = ("src", "native", "bench/worker.py", "bench/worker_rlgf.py", "bench/workload.py")
    found = _git("log", "-1", "--format=%h", "--abbrev=12", "--", *timed)
    return found + ("-dirty" if _git("status", "--porcelain", "--", *timed) else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def identity() -> str:
    """Return the processor's name with family and model, which virtual machines do not hide."""
    numbers = [f"{word} {cpu_info(field)}" for word, field in (("family", "cpu family"), ("model", "model")) if cpu_info(field)]
    return " ".join([processor(), *numbers])


def result_file() -> Path:
    """Return the path of this processor's result."""
    return RESULTS / f"kernels-{re.sub(r'[^a-z0-9]+', '-', identity().lower()).strip('-')}.json"


def percent(saved: Mapping[str, Any]) -> str:
    """Return a saved share with its interval."""
    low, high = saved["interval"]
    return f"{100 * saved['median']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def printed(result: Mapping[str, Any]) -> str:
    """Return the result as printed text."""
    lines: list[str] = []
    for name, found in result["workloads"].items():
        lines.append(f"{name:<22}{'seconds (min-max)':>22}{'CPU s':>8}{'ratio to native':>24}  saved share of the iteration")
        for side, figures in found["sides"].items():
            seconds, ratio = figures["seconds"], figures["ratio"]
            whole = f"{seconds['median']:.2f} ({seconds['min']:.2f}-{seconds['max']:.2f})"
            times = f"{ratio['median']:.3f} [{ratio['interval'][0]:.3f}, {ratio['interval'][1]:.3f}]"
            label = side if side in MODES else f"without {side}"
            share = "" if side == BASE else percent(figures["saved"])
            lines.append(f"{label:<22}{whole:>22}{figures['cpu_seconds']['median']:>8.1f}{times:>24}  {share}")
        lines += [f"{path} is left out: {reason}" for path, reason in found["unused"].items()]
        lines.append("")
    about = result["machine"]
    lines.append(
        f"{about['processor']}, family {about['cpu_family']}, model {about['cpu_model']}, {about['threads']} threads,"
        f" {about['cpu_capability']}, commit {result['commit']}, {result['rounds']} rounds; load before the run"
        f" {about['load_before'][0]:.1f}."
    )
    return "\n".join(lines)


ROWS = {"off": "all of them", "torch": "all C kernels"}


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the saved shares of all results as one table, one row per path."""
    columns = [(result["machine"], name, found) for result in results for name, found in result["workloads"].items()]
    sides = dict.fromkeys(
        side for _, _, found in columns for side in (*MODES, *found["sides"], *found["unused"]) if side != BASE
    )
    heads = [f"{about['processor']} ({about['cpu_family']}/{about['cpu_model']}), {name}" for about, name, _ in columns]
    lines = [["fast path", *heads], ["---"] * (len(heads) + 1)]
    for side in sides:
        shares = [percent(found["sides"][side]["saved"]) if side in found["sides"] else "–" for *_, found in columns]
        lines.append([ROWS.get(side, f"`{side}`"), *shares])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workloads", nargs="+", choices=MEASURED, default=list(MEASURED), help="these alone")
    parser.add_argument("--rounds", type=int, default=15, help="timed iterations of each side, after one to warm up")
    parser.add_argument("--quick", action="store_true", help="two rounds of the three modes, only printed")
    parser.add_argument("--table", action="store_true", help="measure nothing, print a table of all committed results")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each side (all cores)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-kernels", help="model, prompts, rounds and logs")
    parser.add_argument("--out", type=Path, help="default: bench/results/kernels-PROCESSOR.json; of a part: none")
    arguments = parser.parse_args()
    if arguments.table:
        print(markdown([json.loads(path.read_text()) for path in sorted(RESULTS.glob("kernels-*.json"))]))
        return
    if arguments.quick:
        arguments.rounds = 2
    measured = {name: measure(name, arguments) for name in arguments.workloads}
    result = result_of(measured, arguments)
    out = arguments.out
    if out is None and not arguments.quick and set(arguments.workloads) == set(MEASURED):  # a part does not replace the whole
        out = result_file()
    print(printed(result))
    if out is not None:
        keep(result, out)
        for rounds in measured.values():
            rounds.path.unlink()  # the next run measures anew


if __name__ == "__main__":
    main()
