"""PPO++ with a guide that takes its time: asked ahead, beside the same run with cached rollins (docs/guides.md).

A server of ours (tests/fault_server.py, in a process of its own) sleeps before each answer. Three runs take turns: rollins
from the cache; a guide that takes less than an iteration's training; one that takes longer. Every run does the same work.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from helpers import config_of, tiny_model, tiny_trainer
from rlgf.algorithms import ppo_pp
from rlgf.config import GuideConfig
from rlgf.guides.cache import AnswerCache
from rlgf.guides.remote import RemoteGuide
from rlgf.guides.server import Server

ROOT = Path(__file__).resolve().parent.parent
TEXTS, CONCURRENCY = 64, 8
SERVE = (
    "import sys; from fault_server import FaultServer; "
    "server = FaultServer(delay=float(sys.argv[1])).start(); print(server.url, flush=True); sys.stdin.read(); server.stop()"
)


@contextmanager
def serving(delay: float) -> Iterator[str]:
    """The address of a server in a process of its own that sleeps `delay` seconds before each answer."""
    command = [sys.executable, "-c", SERVE, str(delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def run(url: str, cache: Path, iterations: int, prefetch: int, offline: bool = False) -> dict[str, Any]:
    """Seconds of each iteration but the first two, which fill the pipe."""
    guide_config = GuideConfig(concurrency=CONCURRENCY, offline=offline)
    guide = RemoteGuide(Server(f"server:m@{url}", guide_config, "completion"), guide_config, AnswerCache(cache))
    config = config_of(
        ppo__texts_per_iteration=TEXTS,
        ppo__minibatch_size=16,
        ppo__iterations=iterations,
        ppo__epochs=4,
        guide__prefetch=prefetch,
        task__max_new_tokens=24,
    )
    policy = tiny_model(width=192, layers=3, heads=4)
    trainer = tiny_trainer(ppo_pp(0.5), config, guide, policy)
    seconds: list[float] = []
    for iteration in range(iterations):
        began = time.perf_counter()
        trainer.step(iteration)
        seconds.append(time.perf_counter() - began)
    if trainer.prefetcher is not None:
        trainer.prefetcher.close()
    return {"seconds": seconds[2:], "mean": statistics.fmean(seconds[2:]), "requests": guide.spent["attempts"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "prefetch.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the other core is for the server and the client
    result: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"), "iterations": arguments.iterations, "rounds": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "kept.sqlite"
        with serving(0.0) as url:
            run(url, kept, arguments.iterations, 2)
        training = run(url, kept, arguments.iterations, 0, offline=True)["mean"]
        waves = TEXTS * 0.5 / CONCURRENCY  # answers one after the other, on the way to an iteration's rollins
        for number in range(arguments.rounds):
            row: dict[str, Any] = {}
            for name, share in (("cached", 0.0), ("faster guide", 0.5), ("slower guide", 2.0)):
                delay = share * training / waves
                cache = kept if name == "cached" else Path(folder) / f"{name}-{number}.sqlite"
                with serving(delay) as url:
                    row[name] = run(url, cache, arguments.iterations, 2, offline=name == "cached")
                row[name]["guide_seconds_per_iteration"] = delay * waves
            ratios = {name: row[name]["mean"] / row["cached"]["mean"] for name in row}
            print(", ".join(f"{name} {row[name]['mean']:.3f} s ({ratios[name]:.2f})" for name in row), flush=True)
            result["rounds"].append(row)
    for name in ("faster guide", "slower guide"):
        ratios = [row[name]["mean"] / row["cached"]["mean"] for row in result["rounds"]]
        paces = [row[name]["mean"] / row[name]["guide_seconds_per_iteration"] for row in result["rounds"]]
        result[name] = {
            "over_cached": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "over_guide": {"median": statistics.median(paces), "min": min(paces), "max": max(paces)},
        }
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({name: result[name] for name in ("faster guide", "slower guide")}, indent=2))


if __name__ == "__main__":
    main()
