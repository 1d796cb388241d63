"""PPO++ with a slow guide: prefetched rollins against cached rollins (docs/guides.md).

    make bench-prefetch          # or, with tests/ on PYTHONPATH: python -m bench.prefetch --rounds 20

A server of ours (tests/fault_server.py, in a separate process) sleeps before each response. The
policy, its completions and its optimizer steps are those of the recipe imdb-small. Three trainers
are in one process and take turns, one iteration at a time, in an order that rotates: rollins from
the cache; the same once more, which shows how much two equal trainers differ on this machine; and a
guide that takes half as long as an iteration's training, prefetched two iterations ahead. The
benchmark checks that they do the same work. The result is the ratio within each round, in wall time
and in CPU time of the process (client and training together). Then a guide that takes twice as long
as training runs alone, and its iterations are compared with the time that the guide needs.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fault_server import WORDS
from rlgf.cli.console import keep_freed_memory, quiet
from rlgf.config.loading import override
from rlgf.config.recipes import imdb_small
from rlgf.config.schema import Config
from rlgf.generation.openai.cache import ResponseCache
from rlgf.generation.openai.client import Server
from rlgf.guides.remote import RemoteGuide
from rlgf.models.critic import new_critic
from rlgf.models.loading import new_language_model
from rlgf.rl.experience import Models
from rlgf.tasks.base import Task
from rlgf.trainer import Components, Trainer
from rlgf.types import POLICY, Prompt

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, PROMPT_WORDS, CONCURRENCY, BETA = 256, 32, 8, 0.5
UNTIMED = 2  # iterations at the beginning, which fill the queue of requests
SERVE = (
    "import sys; from fault_server import FaultServer; "
    "server = FaultServer(delay=float(sys.argv[1])).start(); print(server.url, flush=True); sys.stdin.read(); server.stop()"
)


@contextmanager
def serving(delay: float) -> Iterator[str]:
    """Start a server that sleeps `delay` seconds before each response; yield its address."""
    command = [sys.executable, "-c", SERVE, str(delay)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def trainer(url: str, cache: Path, iterations: int, offline: bool = False) -> Trainer:
    """Return PPO++ at imdb-small's sizes, with random weights and prompts and a cheap reward."""
    settings: list[tuple[str, Any]] = [
        ("algorithm.name", "ppo_pp"), ("algorithm.options.ppo_pp.beta", BETA), ("ppo.iterations", iterations),
        ("ppo.mle_coefficient", 0.0), ("sampling.top_k", 0), ("runtime.threads", 1),
        ("guide.spec", f"server:m@{url}"), ("guide.endpoint.concurrency", CONCURRENCY),
        ("guide.endpoint.offline", offline),
    ]  # fmt: skip
    config: Config = override(imdb_small(), settings)
    vocabulary = config.model.vocabulary
    words = ["<end>", *WORDS, *(f"w{number}" for number in range(vocabulary - len(WORDS) - 1))]
    reads: Any = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    reads.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=reads, eos_token="<end>", bos_token="<end>")
    policy = new_language_model(config.model, tokenizer, seed=0)
    draws = torch.Generator().manual_seed(0)
    drawn = torch.randint(1, vocabulary, (PROMPTS, PROMPT_WORDS), generator=draws).tolist()
    prompts = [Prompt(" ".join(words[token] for token in row)) for row in drawn]

    def judge(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [sum(word[-1] in "02468e" for word in text.split()) / max(1, len(text.split())) for text in texts]

    guide = RemoteGuide(Server(config.guide.spec, config.guide, "completion"), config.guide, ResponseCache(cache))
    parts = Models(policy, policy.frozen_copy(), {POLICY: critic_of(policy)})
    task = Task("prefetch", prompts, prompts, prompts, judge)
    made = Trainer(Components(config.trainer, config.algorithm.build(), task, judge, parts, guide, [], None))
    assert made.prefetcher is not None
    made.prefetcher.iterations += config.guide.prefetch  # so that the last timed iteration still prefetches
    return made


def critic_of(policy: Any) -> Any:
    """Return a critic that starts from the policy's weights."""
    with tempfile.TemporaryDirectory() as folder:
        policy.save(Path(folder))
        return new_critic("separate", folder, policy, 0.0)


def timed(one: Trainer, iteration: int) -> dict[str, Any]:
    """Run one iteration; return wall and CPU seconds of this process, score and loss."""
    wall, cpu = time.perf_counter(), time.process_time()
    metrics, _ = one.step(iteration)
    return {
        "wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "score": metrics["score"],
        "policy_loss": metrics["policy_loss"], "waited": metrics["seconds_rollout"],
    }  # fmt: skip


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, quartiles and extremes."""
    quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    named = zip(("quartile", "median", "third_quartile"), quarters)
    return {**dict(named), "min": min(values), "max": max(values), "rounds": len(values)}


def rounds(count: int, kept: Path, url: str, fresh: Path) -> list[dict[str, Any]]:
    """Run `count` timed rounds: one iteration of each trainer after another."""
    total = UNTIMED + count
    nowhere = "http://127.0.0.1:9/v1"
    three = {
        "cached": trainer(nowhere, kept, total, offline=True),
        "cached again": trainer(nowhere, kept, total, offline=True),
        "faster guide": trainer(url, fresh, total),
    }
    found: list[dict[str, Any]] = []
    for iteration in range(total):
        names = list(three)
        names = names[iteration % 3 :] + names[: iteration % 3]
        row = {name: timed(three[name], iteration) for name in names}
        if len({(row[name]["score"], row[name]["policy_loss"]) for name in row}) != 1:
            raise SystemExit(f"the trainers did not do the same work in iteration {iteration}: {row}")
        if iteration >= UNTIMED:
            found.append(row)
            ratios = {name: [row[name][clock] / row["cached"][clock] for clock in ("wall", "cpu")] for name in row}
            told = [f"{name} {wall:.3f} wall, {cpu:.3f} CPU" for name, (wall, cpu) in ratios.items() if name != "cached"]
            print(f"cached {row['cached']['wall']:.2f} s; times that: {'; '.join(sorted(told))}", flush=True)
    for one in three.values():
        if one.prefetcher is not None:
            one.prefetcher.close()
    return found


def alone(iterations: int, url: str, fresh: Path) -> list[float]:
    """Return the seconds of each timed iteration of one trainer alone."""
    one = trainer(url, fresh, UNTIMED + iterations)
    seconds = [timed(one, iteration)["wall"] for iteration in range(UNTIMED + iterations)]
    assert one.prefetcher is not None
    one.prefetcher.close()
    return seconds[UNTIMED:]


def main() -> None:
    parser = argparse.ArgumentParser(description="PPO++ with a prefetched guide, against cached rollins.")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--slow-iterations", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "prefetch.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the other core is for the server, and for the client where training lets go of the interpreter
    keep_freed_memory()  # as the command line does
    quiet()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = folder / "kept.sqlite"
        total = UNTIMED + max(arguments.rounds, arguments.slow_iterations)
        with serving(0.0) as url:  # fill the cache
            first = trainer(url, kept, total)
            assert first.prefetcher is not None
            for iteration in range(total):
                first.components.guide.prefetch(first.prefetcher.requests_of(iteration))
            first.prefetcher.close()
        once = trainer("http://127.0.0.1:9/v1", kept, total, offline=True)
        training = min(timed(once, iteration)["wall"] for iteration in range(3))
        waves = (
            once.config.ppo.completions_per_iteration * BETA / CONCURRENCY
        )  # answers one after another for an iteration's rollins
        with serving(0.5 * training / waves) as url:
            found = rounds(arguments.rounds, kept, url, folder / "faster.sqlite")
        with serving(2.0 * training / waves) as url:
            slow = alone(arguments.slow_iterations, url, folder / "slower.sqlite")
        asked = trainer("http://127.0.0.1:9/v1", kept, total, offline=True)
        assert asked.prefetcher is not None
        answers = [
            len(asked.prefetcher.requests_of(UNTIMED + number)) / CONCURRENCY for number in range(arguments.slow_iterations)
        ]
    needs = sum(answers) * 2.0 * training / waves  # what the guide takes for these iterations' rollins
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"), "load_before": load, "training_seconds": training, "concurrency": CONCURRENCY,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": 1, "torch": torch.__version__},
        "faster guide over cached": {
            clock: spread([row["faster guide"][clock] / row["cached"][clock] for row in found]) for clock in ("wall", "cpu")
        },
        "cached again over cached": {
            clock: spread([row["cached again"][clock] / row["cached"][clock] for row in found]) for clock in ("wall", "cpu")
        },
        "slower guide": {"seconds": slow, "guide_needs": needs, "over_guide": sum(slow) / needs},
        "rounds": found,
    }  # fmt: skip
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}, indent=1))


if __name__ == "__main__":
    main()
