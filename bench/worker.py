"""The worker process of each side: runs one iteration per turn and reports its time."""

import argparse
import contextlib
import json
import os
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench.workload import WORKLOADS


class Turns:
    """The worker's side of the protocol: a turn per line of stdin, JSON as response.

    The libraries print to stdout too, so responses go through an earlier copy of it, and what
    they print ends up in the log.
    """

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        self.counts: Counter[str] = Counter()
        self.stages: dict[str, float] = {}
        self.began = self.began_cpu = 0.0

    def say(self, **answer: Any) -> None:
        """Send the response of the turn."""
        print(json.dumps(answer), file=self.answers, flush=True)

    def begin(self) -> None:
        """Wait for the turn, then start the clocks."""
        if not sys.stdin.readline():
            raise SystemExit("the benchmark went away")
        self.counts.clear()
        self.stages.clear()
        self.began, self.began_cpu = time.perf_counter(), time.process_time()

    def stage(self, name: str) -> None:
        """Note that the stage `name` ends now, counted from the beginning of the turn."""
        self.stages[name] = time.perf_counter() - self.began

    def end(self, score: float) -> None:
        """Stop the clocks and send the response."""
        seconds, cpu_seconds = time.perf_counter() - self.began, time.process_time() - self.began_cpu
        ends = [0.0, *self.stages.values()]
        self.say(
            seconds=seconds,
            cpu_seconds=cpu_seconds,
            stages={name: after - before for name, before, after in zip(self.stages, ends, ends[1:])},
            counts=dict(self.counts),
            score=score,
            peak_rss_mb=peak_rss_mb(),
        )

    def count_optimizer_steps(self, **parameters: torch.nn.Parameter) -> None:
        """Count the steps of whichever optimizer holds each of `parameters`, as `optimizer_steps_NAME`."""

        def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            for name, parameter in parameters.items():
                self.counts[f"optimizer_steps_{name}"] += id(parameter) in held

        register_optimizer_step_post_hook(after_step)


def arguments(description: str | None, **choices: tuple[str, ...]) -> argparse.Namespace:
    """Parse the worker's options: workload, turns, threads and the side's `choices` (the default first)."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--workload", type=WORKLOADS.__getitem__, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--turns", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    for name, values in choices.items():
        parser.add_argument(f"--{name}", choices=values, default=values[0])
    return parser.parse_args()


def peak_rss_mb() -> float:
    """Return the peak resident memory of this process, in MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def machine(*packages: str) -> dict[str, Any]:
    """Describe the machine and the versions of the software."""
    from importlib.metadata import version

    return {
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": "cpu",
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
    }


@contextlib.contextmanager
def replaced(owner: Any, name: str, wrapper: Any) -> Any:
    """Replace `owner.name` by `wrapper(original)` for the duration of the block, to count its work."""
    original = getattr(owner, name)
    setattr(owner, name, wrapper(original))
    try:
        yield
    finally:
        setattr(owner, name, original)
