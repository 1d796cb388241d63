"""The cost of guidance: PPO, PPO++ and AggreVaTeD on workload S (bench/README.md).

    make bench-guided            # or: python -m bench.guided --rounds 5

All trainers are in one process and take turns, one iteration at a time, in an order that rotates.
The result is the ratio to PPO's iteration of the same round. The guide is a second copy of the
policy's initial weights with the paper's sampling parameters (top-k 50, top-p .92), so it takes as
long as the policy. `generated`: the guide generates when it is queried, in this process. `cached`:
PPO++'s rollins, which depend on prompt and trajectory alone, were generated before the clock
started; a prefetched guide outside the process costs the same (`make bench-prefetch`). AggreVaTeD's
guide continues what the policy began, so its completions cannot be prefetched.

TRIL's PPO and PPO++ take their turns in separate processes, in each round; PPO++ is compared with
TRIL's PPO.
"""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import peers
from bench.iteration import ROOT, Worker, keep, processor, spread
from bench.worker import machine
from bench.worker_rlgf import build, set_up
from bench.workload import Workload
from rlgf.algorithms.base import Algorithm
from rlgf.algorithms.registry import aggrevated, ppo, ppo_pp
from rlgf.guides.base import Capabilities, Completion, CompletionRequest, Guide
from rlgf.guides.local import ModelGuide
from rlgf.models.critic import new_critic
from rlgf.rl.experience import Models
from rlgf.trainer import Trainer
from rlgf.types import SamplingParams

BETAS = (0.2, 0.6, 0.8, 1.0)
PPO = "PPO"
TRIL_BETAS = ("none", "0.2", "0.8")  # none: its PPO; each is a process of two gigabytes


class Clocked:
    """A guide with clocks, and with a cache of its completions if requested."""

    def __init__(self, guide: Guide, cached: bool) -> None:
        self.guide, self.cached = guide, cached
        self.answers: dict[tuple[int, int], Completion] = {}
        self.wall = self.cpu = 0.0

    @property
    def capabilities(self) -> Capabilities:
        """Return the capabilities of the guide."""
        return self.guide.capabilities

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Return the guide's completions."""
        wall, cpu = time.perf_counter(), time.process_time()
        keys = [(request.index, request.max_new_tokens) for request in requests]
        if not self.cached or any(key not in self.answers for key in keys):
            self.answers |= zip(keys, self.guide.complete(requests), strict=True)
        texts = [self.answers[key] for key in keys]
        self.wall, self.cpu = self.wall + time.perf_counter() - wall, self.cpu + time.process_time() - cpu
        if not self.cached:
            self.answers.clear()
        return texts


def trainer(workload: Workload, folder: Path, algorithm: Algorithm, cached: bool, iterations: int) -> tuple[Trainer, Clocked]:
    """Return one of the compared trainers and its guide."""
    made = build(workload, folder, iterations)
    policy = made.components.models.policy
    guide = Clocked(ModelGuide(policy.frozen_copy(), SamplingParams(top_k=50, top_p=0.92)), cached)
    critics = {origin: new_critic("separate", str(folder / "model"), policy, 0.0) for origin in algorithm.critics}
    models = Models(policy, made.components.models.reference, critics)
    return Trainer(replace(made.components, algorithm=algorithm, guide=guide, models=models)), guide


def timed(one: Trainer, guide: Clocked, iteration: int) -> dict[str, Any]:
    """Run one iteration; return wall and CPU seconds, also of the guide, and token counts."""
    if guide.cached:
        one.collect_rollout(iteration)  # the guide's completions are cached
    guide.wall = guide.cpu = 0.0
    wall, cpu = time.perf_counter(), time.process_time()
    metrics, experience = one.step(iteration)
    return {
        "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu,
        "guide_seconds": guide.wall, "guide_cpu_seconds": guide.cpu,
        "stages": {stage: metrics[f"seconds_{stage}"] for stage in ("rollout", "experience", "update")},
        "tokens": {name: int(experience.stats[f"{name}_tokens"]) for name in ("policy", "guide", "trained")},
    }  # fmt: skip


def tril_workers(arguments: argparse.Namespace, folder: Path, iterations: int) -> dict[str, Worker]:
    """Start TRIL's algorithms, each in a separate process."""
    python = peers.tril(arguments.environments.resolve())
    told = ["--workload", "S", "--folder", str(folder), "--turns", str(iterations)]
    names = {beta: f"TRIL's {PPO}" if beta == "none" else f"TRIL's PPO++ {beta}" for beta in TRIL_BETAS}
    return {
        name: Worker(
            name, [python, "-m", "bench.worker_tril", *told, "--beta", beta], arguments.threads, folder / f"tril-{beta}.log"
        )
        for beta, name in names.items()
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all trainers in turn, round by round."""
    workload, folder = Workload(), arguments.work.resolve() / "S"
    subprocess.run([sys.executable, "-m", "bench.workload", "S", str(folder)], cwd=ROOT, check=True)
    load_before, iterations = os.getloadavg(), 1 + arguments.rounds
    kinds = {PPO: (ppo().build(), False), f"{PPO} again": (ppo().build(), False)}
    for beta in BETAS:
        kinds[f"PPO++ {beta}, generated"] = (ppo_pp(beta).build(), False)
        kinds[f"PPO++ {beta}, cached"] = (ppo_pp(beta).build(), True)
        kinds[f"AggreVaTeD {beta}"] = (aggrevated(beta).build(), False)
    made = {name: trainer(workload, folder, algorithm, cached, iterations) for name, (algorithm, cached) in kinds.items()}
    theirs = tril_workers(arguments, folder, iterations)
    rounds: list[dict[str, Any]] = []
    for iteration in range(iterations):
        names = list(made)
        at = iteration * len(names) // iterations
        rounds.append({name: timed(*made[name], iteration) for name in (*names[at:], *names[:at])})
        rounds[-1] |= {name: worker.turn() for name, worker in theirs.items()}
        whole = ", ".join(f"{name} {rounds[-1][name]['seconds']:.2f}" for name in names)
        print(f"{'warm-up' if not iteration else f'round {iteration}'}: {whole}", flush=True)
    for worker in theirs.values():
        worker.close()
    rounds = rounds[1:]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load_before": load_before}
        | machine("rlgf", "torch", "transformers"),
        "rounds": arguments.rounds,
        "kinds": {name: summary(name, rounds) for name in made},
        "tril": {name: peer_summary(name, rounds) for name in theirs},
        "iterations": rounds,
    }


def summary(name: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one kind: ratios to PPO within each round, and medians."""
    rows = [row[name] for row in rounds]
    clocks = ("seconds", "cpu_seconds", "guide_seconds", "guide_cpu_seconds")
    return {
        "ratio_to_ppo": spread([row[name]["seconds"] / row[PPO]["seconds"] for row in rounds]),
        "cpu_ratio_to_ppo": spread([row[name]["cpu_seconds"] / row[PPO]["cpu_seconds"] for row in rounds]),
        **{clock: spread([row[clock] for row in rows]) for clock in clocks},
        "stages": {stage: statistics.median([row["stages"][stage] for row in rows]) for stage in rows[0]["stages"]},
        "tokens": {kind: statistics.median([row["tokens"][kind] for row in rows]) for kind in rows[0]["tokens"]},
    }


def peer_summary(name: str, rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of one of TRIL's algorithms: ratios within each round, and medians."""
    return {
        "ratio_to_trils_ppo": spread([row[name]["seconds"] / row[f"TRIL's {PPO}"]["seconds"] for row in rounds]),
        "ratio_to_ppo": spread([row[name]["seconds"] / row[PPO]["seconds"] for row in rounds]),
        **{clock: spread([row[name][clock] for row in rounds]) for clock in ("seconds", "cpu_seconds")},
        "stages": {s: statistics.median([row[name]["stages"][s] for row in rounds]) for s in rounds[0][name]["stages"]},
        "versions": peers.TRIL,
    }


def table(result: dict[str, Any]) -> str:
    """Return the result as a table."""
    lines = [f"{'':<24}{'x PPO (min-max)':>20}{'CPU s':>8}{'guide CPU s':>13}{'trained tokens':>16}  seconds by stage"]
    for name, kind in result["kinds"].items():
        ratio = kind["ratio_to_ppo"]
        whole = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in kind["stages"].items())
        cpu, guide = kind["cpu_seconds"]["median"], kind["guide_cpu_seconds"]["median"]
        lines.append(f"{name:<24}{whole:>20}{cpu:>8.1f}{guide:>13.2f}{kind['tokens']['trained']:>16.0f}  {stages}")
    for name, kind in result["tril"].items():
        ratio, own = kind["ratio_to_ppo"], kind["ratio_to_trils_ppo"]["median"]
        whole = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in kind["stages"].items())
        lines.append(f"{name:<24}{whole:>20}{kind['cpu_seconds']['median']:>8.1f}{'':>29}  {stages}; x TRIL's PPO {own:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed iterations of each")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench-iteration", help="model and prompts")
    parser.add_argument("--environments", type=Path, default=ROOT / "build", help="where TRIL's is, made if missing")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "guided.json")
    arguments = parser.parse_args()
    set_up(arguments.threads)
    result = measure(arguments)
    keep(result, arguments.out)
    print(table(result))


if __name__ == "__main__":
    main()
