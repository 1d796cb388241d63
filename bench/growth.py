"""How time and memory grow: workload S, one epoch of it, with one of its numbers changed at a time (bench/README.md).

    make bench-growth            # or: python -m bench.growth

Each point is a process of its own: an iteration that is not timed, three that are, of which the fastest counts, stage by stage,
and one whose operations are counted, as `bench.floor` counts them. What is reported is how often the time of a stage doubles
for each doubling of its work between the first and the last point: 1 is as many times as the work, less is better, and more is
a stage that grows faster than it. Work is told in two ways. Multiplications of matrices alone leave out that some are done out
of the cache and some wait for memory. So beside them there is the time that all operations take at the machine's rates: the
multiplications at that of a large product, and all bytes that operations read and write, those of products too, at that of
memory. Counted are torch's own operations: what is compiled passes over memory less often.
"""

import argparse
import datetime
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.iteration import ROOT, keep, processor
from bench.workload import Workload, make

STAGES = ("write", "appraise", "update")
WAYS: dict[str, list[dict[str, int]]] = {
    "texts": [{"texts": count} for count in (16, 32, 64, 128, 256)],
    "prompt": [{"shortest_prompt": n, "longest_prompt": n, "context": n + 48} for n in (16, 64, 256, 512)],
    "new tokens": [{"new_tokens": n, "context": 64 + n} for n in (16, 48, 128, 256)],
    "vocabulary": [{"vocabulary": n} for n in (2048, 8192, 32768, 131072)],
    "width": [{"width": n, "heads": n // 64} for n in (128, 256, 512, 768)],
}


def point(changes: Mapping[str, int], folder: Path, threads: int) -> dict[str, Any]:
    """One point, in this process: seconds and operations by stage, peak memory."""

    from bench.floor import counted
    from bench.worker import peak_rss_mb
    from bench.worker_rlgf import build, set_up

    set_up(threads)
    workload = replace(Workload(), epochs=1, **changes)
    make(workload, folder)
    trainer = build(workload, folder, 5)
    trainer.step(0)
    steps = [trainer.step(1 + number)[0] for number in range(3)]
    peak = peak_rss_mb()
    ledgers = counted(trainer, 4)
    return {
        "seconds": {stage: min(step[f"seconds_{stage}"] for step in steps) for stage in STAGES},
        "gflop": {stage: ledger.total() / 1e9 for stage, ledger in ledgers.items()},
        "gigabytes": {stage: (ledger.product_bytes + ledger.bytes) / 1e9 for stage, ledger in ledgers.items()},
        "peak_rss_mb": peak,
        "parameters": sum(p.numel() for p in trainer.parts.models.policy.model.parameters()),
    }


def exponent(points: Sequence[Mapping[str, Any]], stage: str, work: str) -> float:
    """How often the seconds of a stage double for each doubling of its work, from the first point to the last."""
    first, last = points[0], points[-1]
    return math.log(last["seconds"][stage] / first["seconds"][stage]) / math.log(last[work][stage] / first[work][stage])


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All points, each in a process of its own."""
    from bench.floor import rates

    load_before = os.getloadavg()
    torch.set_num_threads(arguments.threads)
    machine_rates = rates(torch.float32)
    ways: dict[str, Any] = {}
    for name, changes in WAYS.items():
        rows: list[dict[str, Any]] = []
        for change in changes:
            command = [sys.executable, "-m", "bench.growth", "--threads", str(arguments.threads), "--point", json.dumps(change)]
            answer = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
            measured = json.loads(answer.splitlines()[-1])
            gflop, gigabytes = measured["gflop"], measured["gigabytes"]
            rates_of = machine_rates["gflops"], machine_rates["gbs_memory"]
            work = {stage: gflop[stage] / rates_of[0] + gigabytes[stage] / rates_of[1] for stage in STAGES}
            rows.append({"change": change, **measured, "work": work})
            print(name, row(rows[-1]), flush=True)
        exponents = {work: {stage: exponent(rows, stage, work) for stage in STAGES} for work in ("gflop", "work")}
        ways[name] = {"points": rows, "exponents": exponents}
        for work, found in exponents.items():
            print(name, f"exponents of {work}:", {stage: round(value, 2) for stage, value in found.items()}, flush=True)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "processor": processor(), "cores": os.cpu_count(), "threads": arguments.threads, "load_before": load_before,
            "rates": machine_rates,
        },
        "ways": ways,
    }  # fmt: skip


def row(found: Mapping[str, Any]) -> str:
    """A point for people."""
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
