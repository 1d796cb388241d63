"""The slowdown of an iteration next to a busy process, from paired runs.

    make bench-busy                          # about three minutes: bench/results/busy_machine.json
    python -m bench.busy_machine --rounds 2  # only a look; --out keeps it

The iterations are PPO++'s of the recipe quickstart (two models of 0.1 to 0.2M parameters, 128
completions of 16 tokens), in which threads synchronize often. Each side is a separate process that
waits for its turns: with `passive`, waiting threads sleep, as the command line sets it if other
processes run when it starts; with `default`, they spin for some milliseconds first, as everywhere
else; `one` uses one thread.

In every round each side runs iterations alone and next to a process that keeps one core busy, one
right after the other, in alternating order. The result is the ratio within a round; for the command
line it is `passive` next to the process over `default` alone.
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench.iteration import ROOT, keep, machine, spread
from bench.kernels import commit, interval

# No torch in this process: it would be a third one on the machine.

OUT = ROOT / "bench" / "results" / "busy_machine.json"
BUSY = "while True: pass"
TARGET = 1.5
SIDES: dict[str, dict[str, str]] = {
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "default": {},
    "one": {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
}


class Side:
    """A process that runs iterations on request."""

    def __init__(self, name: str, stages: Path) -> None:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
        environment = {**inherited, **SIDES[name], "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", "bench.busy_machine", "--work", str(stages)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about = self._answer()

    def iterate(self, count: int) -> float:
        """Run iterations and return the mean of their wall seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{count}\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a side of bench.busy_machine died: see above.")
        return json.loads(line)


@contextmanager
def busy_process() -> Iterator[None]:
    """Run a process that keeps one core busy for the duration of the block."""
    with subprocess.Popen([sys.executable, "-c", BUSY]) as process:
        try:
            time.sleep(0.2)
            yield
        finally:
            process.kill()


def pair(side: Side, iterations: int, busy_first: bool) -> dict[str, float]:
    """Return the seconds of an iteration alone and next to a busy process."""
    found: dict[str, float] = {}
    for name in ("busy", "alone") if busy_first else ("alone", "busy"):
        if name == "alone":
            found[name] = side.iterate(iterations)
        else:
            with busy_process():
                found[name] = side.iterate(iterations)
    return found


def work(stages: Path) -> None:
    """Run the iterations that stdin requests; the main function of a side's process."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import rlgf
    from rlgf.cli.console import configure_runtime

    changes: list[tuple[str, Any]] = [
        ("algorithm.name", "ppo_pp"), ("sft.steps", 2), ("guide.sft.steps", 2), ("ppo.iterations", 100_000),
        ("evaluation.every", 0),
    ]  # fmt: skip
    config = rlgf.override(rlgf.recipe("quickstart"), changes)
    configure_runtime(config)
    trainer = rlgf.Trainer(rlgf.prepare(config, stages))
    from bench.worker import machine as describe

    about = describe("rlgf", "torch", "transformers")
    done = 0
    for _ in range(2):  # not timed
        trainer.step(done)
        done += 1
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            trainer.step(done)
            done += 1
        print(json.dumps({"seconds": (time.perf_counter() - began) / int(line)}), file=answers, flush=True)


def figures(rounds: Sequence[Mapping[str, Mapping[str, float]]], name: str) -> dict[str, Any]:
    """Return the figures of one side."""
    ratios = [row[name]["busy"] / row[name]["alone"] for row in rounds]
    alone = [row[name]["alone"] / row["default"]["alone"] for row in rounds]
    return {
        "seconds_alone": spread([row[name]["alone"] for row in rounds]),
        "seconds_busy": spread([row[name]["busy"] for row in rounds]),
        "busy_over_alone": {"median": statistics.median(ratios), "interval": interval(ratios)},
        "alone_over_default_alone": {"median": statistics.median(alone), "interval": interval(alone)},
    }


def command_line(rounds: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Return the slowdown of a run of the command line, whose waiting threads then sleep."""
    ratios = [row["passive"]["busy"] / row["default"]["alone"] for row in rounds]
    return {"median": statistics.median(ratios), "interval": interval(ratios)}


def printed(result: Mapping[str, Any]) -> str:
    """Return the result as printed text."""
    lines = [f"{'':9}{'alone':>9}{'busy':>9}   busy / alone          alone / default alone"]
    for name, side in result["sides"].items():
        texts = [
            f"{side[key]['median']:.2f} [{side[key]['interval'][0]:.2f}, {side[key]['interval'][1]:.2f}]"
            for key in ("busy_over_alone", "alone_over_default_alone")
        ]
        seconds = [f"{side[key]['median']:>7.2f} s" for key in ("seconds_alone", "seconds_busy")]
        lines.append(f"{name:9}{''.join(seconds)}   {texts[0]:20}  {texts[1]}")
    whole = result["command_line_busy_over_alone"]
    lines.append(
        f"command line, busy / alone: {whole['median']:.2f} [{whole['interval'][0]:.2f}, {whole['interval'][1]:.2f}]; "
        f"target: at most {TARGET}; load before the run {result['machine']['load_before'][0]:.1f}"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=3, help="in each half of a pair")
    parser.add_argument("--out", type=Path, help="where to keep the result")
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # what a subprocess does
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as stages:
        sides: dict[str, Side] = {}
        try:
            for name in SIDES:
                sides[name] = Side(name, Path(stages))
            rounds: list[dict[str, dict[str, float]]] = []
            for number in range(options.rounds):
                names = list(SIDES)[:: 1 if number % 2 == 0 else -1]
                row = {name: pair(sides[name], options.iterations, number % 4 > 1) for name in names}
                rounds.append(row)
                told = ", ".join(f"{name} {row[name]['alone']:.2f} and {row[name]['busy']:.2f} s" for name in SIDES)
                print(f"round {number + 1} of {options.rounds}: {told}", flush=True)
        finally:
            for side in sides.values():
                side.close()
    result = {
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "note": options.note,
        "machine": machine(sides["passive"].about, sides["passive"].about["threads"], load_before),
        "versions": sides["passive"].about["versions"],
        "iterations_of_a_half": options.iterations,
        "target": TARGET,
        "sides": {name: {"threads": sides[name].about["threads"], **figures(rounds, name)} for name in SIDES},
        "command_line_busy_over_alone": command_line(rounds),
        "rounds": rounds,
    }
    print(printed(result))
    if options.out:
        keep(result, options.out)


if __name__ == "__main__":
    main()
