"""Growth of time and memory as one size of workload S changes at a time (bench/README.md).

    make bench-growth            # or: python -m bench.growth

Each point is a separate process: an untimed iteration, three timed ones, of which the fastest
counts for each stage, and one whose operations are counted, as `bench.floor` does. The rollout is
two stages here, prefill of the prompts and then decoding. The result is the exponent with which the
time of a stage grows with its work, from the first to the last point: at 1 both grow alike, above 1
the stage grows faster than its work. These two points are measured twice, taking turns, for the
spread.

Work is measured in two ways. The multiplications of matmuls alone ignore that some run from the
cache and some wait for memory. So the second measure is the time of all operations at the machine's
rates: multiplications at the rate of a large matmul, and all bytes that operations read and write,
those of matmuls too, at the bandwidth of memory. Torch's own operations are counted; the C kernels
pass over memory less often.
"""

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.iteration import ROOT, keep, processor
from bench.worker import replaced
from bench.workload import Workload, make

STAGES = ("read", "rollout", "experience", "update")
PAIRS = 2  # of first and last points, taking turns
LEAST = 1.5  # smallest growth of the work from which an exponent is computed
WAYS: dict[str, list[dict[str, int]]] = {
    "texts": [{"texts": count} for count in (16, 32, 64, 128, 256)],
    "prompt": [{"shortest_prompt": n, "longest_prompt": n, "context": n + 48} for n in (16, 64, 256, 512)],
    "new tokens": [{"new_tokens": n, "context": 64 + n} for n in (16, 48, 128, 256)],
    "vocabulary": [{"vocabulary": n} for n in (2048, 8192, 32768, 131072)],
    "width": [{"width": n, "heads": n // 64} for n in (128, 256, 512, 768)],
}


def point(changes: Mapping[str, int], folder: Path, threads: int) -> dict[str, Any]:
    """Measure one point in this process: seconds and operations by stage, peak memory."""

    from bench.floor import Ledger, counted
    from bench.worker import peak_rss_mb
    from bench.worker_rlgf import build, set_up

    set_up(threads)
    workload = replace(Workload(), epochs=1, **changes)
    make(workload, folder)
    trainer = build(workload, folder, 5)
    with prefills() as forward_config:
        trainer.step(0)
        steps: list[dict[str, float]] = []
        for number in range(3):
            forward_config.seconds = 0.0
            metrics = trainer.step(1 + number)[0]
            written = metrics["seconds_rollout"] - forward_config.seconds
            steps.append(
                {"read": forward_config.seconds, "rollout": written, **{s: metrics[f"seconds_{s}"] for s in STAGES[2:]}}
            )
        peak = peak_rss_mb()
        forward_config.ledger = Ledger()
        ledgers = counted(trainer, 4) | {"read": forward_config.ledger}
    gflop = {stage: ledger.total() / 1e9 for stage, ledger in ledgers.items()}
    gigabytes = {stage: (ledger.product_bytes + ledger.bytes) / 1e9 for stage, ledger in ledgers.items()}
    for found in (gflop, gigabytes):
        found["rollout"] -= found["read"]
    return {
        "seconds": {stage: min(step[stage] for step in steps) for stage in STAGES},
        "gflop": gflop,
        "gigabytes": gigabytes,
        "peak_rss_mb": peak,
        "parameters": sum(p.numel() for p in trainer.components.models.policy.model.parameters()),
    }


class Prefills:
    """The time of prefills and, with a ledger, their operations."""

    seconds = 0.0
    ledger: Any = None


@contextmanager
def prefills() -> Generator[Prefills]:
    """Time the prefills of the sampler for the duration of the block."""
    from rlgf.generation import kv_decoder

    found = Prefills()

    def watching(prefill: Any) -> Any:
        def watched(decoder: Any) -> Any:
            began = time.perf_counter()
            with found.ledger or nullcontext():
                result = prefill(decoder)
            found.seconds += time.perf_counter() - began
            return result

        return watched

    with replaced(kv_decoder.KeyValueDecoder, "prefill", watching):
        yield found


def exponent(first: Mapping[str, Any], last: Mapping[str, Any], stage: str, work: str) -> float:
    """Return the exponent of a stage's time as a function of its work, between two points."""
    return math.log(last["seconds"][stage] / first["seconds"][stage]) / math.log(last[work][stage] / first[work][stage])


def exponents(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], work: str) -> dict[str, dict[str, float]]:
    """Return the exponents of each stage whose work grows: median, minimum and maximum over pairs."""
    first, last = pairs[0]
    growing = [stage for stage in STAGES if last[work][stage] >= LEAST * first[work][stage]]
    found = {stage: [exponent(*pair, stage, work) for pair in pairs] for stage in growing}
    return {stage: {"median": median(values), "min": min(values), "max": max(values)} for stage, values in found.items()}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all points, each in a separate process."""
    from bench.floor import rates

    load_before = os.getloadavg()
    torch.set_num_threads(arguments.threads)
    machine_rates = rates(torch.float32)
    ways: dict[str, Any] = {}

    def measured(change: Mapping[str, int]) -> dict[str, Any]:
        command = [sys.executable, "-m", "bench.growth", "--threads", str(arguments.threads), "--point", json.dumps(change)]
        answer = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
        found = json.loads(answer.splitlines()[-1])
        flops, moves = machine_rates["gflops"], machine_rates["gbs_memory"]
        work = {stage: found["gflop"][stage] / flops + found["gigabytes"][stage] / moves for stage in STAGES}
        print(row({"change": change, **found}), flush=True)
        return {"change": change, **found, "work": work}

    for name, changes in WAYS.items():
        points = [measured(change) for change in changes]
        again = [(measured(changes[0]), measured(changes[-1])) for _ in range(PAIRS - 1)]
        pairs = [(points[0], points[-1]), *again]
        ways[name] = {
            "points": points,
            "again": [point for pair in again for point in pair],
            "exponents": {work: exponents(pairs, work) for work in ("gflop", "work")},
        }
        for work, found in ways[name]["exponents"].items():
            told = ", ".join(f"{s} {found[s]['median']:.2f} ({found[s]['min']:.2f}-{found[s]['max']:.2f})" for s in found)
            print(f"{name}, exponents of {work}: {told}", flush=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(), "cores": os.cpu_count(), "threads": arguments.threads, "load_before": load_before,
            "rates": machine_rates,
        },
        "ways": ways,
    }  # fmt: skip


def row(found: Mapping[str, Any]) -> str:
    """Return a point as printed text."""
    seconds = ", ".join(
        f"{stage} {found['seconds'][stage]:.2f} s / {found['gflop'][stage]:.0f} GFLOP, {found['gigabytes'][stage]:.1f} GB"
        for stage in STAGES
    )
    return f"{found['change']}: {seconds}, {found['peak_rss_mb']:.0f} MB, {found['parameters'] / 1e6:.1f}M parameters"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-growth", help="model and prompts")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "growth.json")
    arguments = parser.parse_args()
    if arguments.point is not None:
        print(json.dumps(point(arguments.point, arguments.work, arguments.threads)))
        return
    result = measure(arguments)
    keep(result, arguments.out)


if __name__ == "__main__":
    main()
