"""The cost of text metrics as rewards: milliseconds for a batch of 128 texts (docs/scoring.md).

CommonGen: document frequencies from the whole training split, prompts and references of the
validation split, the outputs of one system. Every batch has new texts, as in training. References
are new in the first passage and known in the second, whose texts are the outputs of another system.
SPICE starts with an empty folder of parses.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlgf.data.files import write_json
from rlgf.text_metrics.as_rewards import build_text_function
from rlgf.text_metrics.java import JAVA
from rlgf.types import Prompt, RewardFunction

ROOT = Path(__file__).resolve().parent.parent
BATCH = 128
NAMES = ("cider_d", "bleu_4", "rouge_l", "rougeL", "concept_coverage", "meteor", "spice", "spider")
BATCHES = {"spice": 2, "spider": 2}  # parsing takes its time; others: 7, all of the split


def rows_of(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def prompts_of(path: Path) -> list[Prompt]:
    return [Prompt(" ".join(r["concepts"]), tuple(r["targets"]), columns={"concepts": r["concepts"]}) for r in rows_of(path)]


def passage(function: RewardFunction, prompts: list[Prompt], texts: list[str], batches: int) -> list[float]:
    """Return the milliseconds of each batch."""
    found: list[float] = []
    for number in range(batches):
        part = slice(number * BATCH, (number + 1) * BATCH)
        found.append(1000 * seconds_of(lambda part=part: function(prompts[part], texts[part])))
    return found


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "commongen")
    arguments.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "text_rewards.json")
    options = arguments.parse_args()
    load_before = os.getloadavg()[0]
    train, prompts = prompts_of(options.data / "train.jsonl.gz"), prompts_of(options.data / "validation.jsonl.gz")
    systems = rows_of(options.data / "system_outputs_validation.jsonl.gz")
    JAVA.start()
    print("ms a batch, fastest (median): all new, texts new, all known")
    functions: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        for name in NAMES:
            made: list[RewardFunction] = []
            seconds = seconds_of(lambda name=name, made=made: made.append(build_text_function(name, train)))
            first = seconds_of(lambda made=made: made[0](prompts[-1:], ["warming up"]))
            batches = BATCHES.get(name, len(prompts) // BATCH)
            new = passage(made[0], prompts, [row["unilm"] for row in systems], batches)
            known = passage(made[0], prompts, [row["bart"] for row in systems], batches)
            again = passage(made[0], prompts, [row["bart"] for row in systems], batches)
            functions[name] = {
                "seconds_to_build": seconds, "seconds_of_first_text": first, "ms_all_new": new, "ms_new_texts": known,
                "ms_all_known": again,
            }  # fmt: skip
            shown = [f"{min(values):10,.0f} ({statistics.median(values):,.0f})" for values in (new, known, again)]
            print(f"{name:18}{seconds:6.1f} s to build{''.join(shown)}", flush=True)
        JAVA.close()
    machine = {"processor": platform.machine(), "cores": len(os.sched_getaffinity(0)), "java": JAVA.version}
    machine["load_before"] = load_before
    references = sum(len(prompt.references) for prompt in prompts) / len(prompts)
    write_json(
        options.out,
        {
            "machine": machine,
            "batch": BATCH,
            "references_per_text": references,
            "train_prompts": len(train),
            "functions": functions,
        },
    )


if __name__ == "__main__":
    main()
