"""Search for the largest micro-batch that fits in memory, in tokens.

On a CPU the size is a fixed number, on a GPU the largest that fits, found by trying. Micro-batches
only split the data of an optimizer step: their size changes speed and memory, not what is learned.
"""

from collections.abc import Callable

import torch

from rlgf.config.sections import MICRO_BATCH_TOKENS
from rlgf.errors import ConfigError


def find_micro_batch_size(attempt: Callable[[int], None], max_tokens: int) -> int:
    """Return the largest of 2,048, 4,096, 8,192, … tokens for which `attempt` succeeds.

    The first size that reaches `most` is the last one tried. `attempt` raises torch's out-of-memory
    error where a size does not fit. Raises ConfigError if none fits.
    """
    found, budget = 0, MICRO_BATCH_TOKENS
    while _fits(attempt, budget):
        found = budget
        if budget >= max_tokens:
            break
        budget *= 2
    if not found:
        raise ConfigError(
            f"a micro-batch of {MICRO_BATCH_TOKENS:,} tokens does not fit in the accelerator's memory: set "
            "runtime.token_budget to fewer, train adapters (lora.rank), or set runtime.offload."
        )
    return found


def _fits(attempt: Callable[[int], None], budget: int) -> bool:
    try:
        attempt(budget)
    except torch.OutOfMemoryError:
        return False
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True
