"""Generation: this library's decoder against `model.generate`, same prompts and number of tokens.

Workload S with 64 prompts, the full softmax or top-k 50 at temperature 1, no early EOS. Every row
compares two calls that take turns; the ratio is that of each pair of calls. `restart` rows continue
completions from prefixes of random length, as rollouts after a switch do. `generate` takes prompt
and prefix as a longer prompt, and generates for each the number of tokens that the longest needs.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.worker import machine
from bench.workload import Workload, make, read_prompts
from rlgf.cli.console import keep_freed_memory
from rlgf.data.files import write_json
from rlgf.generation.decoder import sample_completions
from rlgf.models.language_model import LanguageModel
from rlgf.models.loading import load_language_model
from rlgf.types import SamplingParams

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One comparison."""

    name: str
    new_tokens: int
    top_k: int = 0
    static: bool = False  # generate's cache
    restart: bool = False


ROWS = (
    Row("16 tokens", 16),
    Row("48 tokens", 48),
    Row("128 tokens", 128),
    Row("48 tokens, top-k 50", 48, top_k=50),
    Row("48 tokens, generate with a static cache", 48, static=True),
    Row("48 tokens, restarts", 48, restart=True),
    Row("48 tokens, restarts, top-k 50", 48, top_k=50, restart=True),
)


def contexts(row: Row, prompts: list[list[int]]) -> tuple[list[list[int]], list[int]]:
    """Return the prefixes and the number of tokens to generate after each."""
    if not row.restart:
        return prompts, [row.new_tokens] * len(prompts)
    draws = np.random.default_rng(0)
    begun = [int(n) for n in draws.integers(0, row.new_tokens, len(prompts))]
    prefixes = [[*prompt, *(int(i) for i in draws.integers(0, 8000, n))] for prompt, n in zip(prompts, begun)]
    return prefixes, [row.new_tokens - n for n in begun]


def ours(model: LanguageModel, row: Row, prefixes: list[list[int]], budgets: list[int]) -> Callable[[], int]:
    draws = np.random.default_rng(1).random((len(prefixes), row.new_tokens))
    sampling = SamplingParams(top_k=row.top_k) if row.top_k else SamplingParams()

    def write() -> int:
        return int(sample_completions(model, prefixes, budgets, budgets, draws, sampling).lengths.sum())

    return write


def theirs(model: Any, end: int, row: Row, prefixes: list[list[int]], budgets: list[int]) -> Callable[[], int]:
    widest, most = max(map(len, prefixes)), max(budgets)
    ids = torch.tensor([[end] * (widest - len(prefix)) + prefix for prefix in prefixes])
    mask = torch.tensor([[0] * (widest - len(prefix)) + [1] * len(prefix) for prefix in prefixes])
    options = {"cache_implementation": "static"} if row.static else {}

    def write() -> int:
        with torch.no_grad():
            model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=row.top_k, top_p=1.0,
                max_new_tokens=most, min_new_tokens=most, pad_token_id=end, disable_compile=True, **options,
            )  # fmt: skip
        return sum(budgets)  # only the requested tokens count

    return write


def timed(work: Callable[[], int]) -> tuple[float, int]:
    began = time.perf_counter()
    tokens = work()
    return time.perf_counter() - began, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "generate.json")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        from transformers import AutoModelForCausalLM

        workload = Workload(context=256)
        make(workload, Path(scratch))
        model = load_language_model(str(Path(scratch) / "model"))
        plain: Any = AutoModelForCausalLM.from_pretrained(Path(scratch) / "model").eval()
        prompts = read_prompts(Path(scratch))
    print(f"{'':42}rlgf tokens/s  generate tokens/s  generate takes")
    for row in ROWS:
        prefixes, budgets = contexts(row, prompts)
        sides = ours(model, row, prefixes, budgets), theirs(plain, model.eos_token_ids[0], row, prefixes, budgets)
        for side in sides:
            side()
        pairs = [[timed(side) for side in sides] for _ in range(arguments.pairs)]
        if any(mine[1] != other[1] for mine, other in pairs):
            raise SystemExit(f"{row.name}: the two did not write as many tokens")
        tokens = pairs[0][0][1]
        ratios = sorted(other[0] / mine[0] for mine, other in pairs)
        seconds = [sorted(pair[side][0] for pair in pairs) for side in (0, 1)]
        rates = [tokens / statistics.median(values) for values in seconds]
        found.append({
            "row": row.name, "tokens": tokens, "rlgf_seconds": seconds[0], "generate_seconds": seconds[1], "ratios": ratios,
            "ratio": statistics.median(ratios),
        })  # fmt: skip
        print(f"{row.name:42}{rates[0]:13,.0f}{rates[1]:19,.0f}{found[-1]['ratio']:10.2f} times as long", flush=True)
    write_json(arguments.out, {"rows": found, "machine": machine("rlgf", "torch", "transformers")})


if __name__ == "__main__":
    main()
