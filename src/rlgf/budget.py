"""How many tokens a micro-batch may have: a fixed number on a CPU, and on a GPU the most that fits, found by trying.

Micro-batches only split what an optimizer step learns from: their size changes speed and memory, not what is learnt.
"""

from collections.abc import Callable

import torch

from rlgf.config import MICRO_BATCH_TOKENS
from rlgf.errors import UserError


def most_that_fits(attempt: Callable[[int], None], most: int) -> int:
    """The largest of 2,048, 4,096, 8,192, … tokens that `attempt` can work with, the first that reaches `most` being the last.

    `attempt` raises torch's out-of-memory error where it cannot.
    """
    found, budget = 0, MICRO_BATCH_TOKENS
    while _works(attempt, budget):
        found = budget
        if budget >= most:
            break
        budget *= 2
    if not found:
        raise UserError(
            f"a micro-batch of {MICRO_BATCH_TOKENS:,} tokens does not fit in the accelerator's memory: set "
            "runtime.token_budget to fewer, train adapters (adapter.rank), or set runtime.offload."
        )
    return found


def _works(attempt: Callable[[int], None], budget: int) -> bool:
    try:
        attempt(budget)
    except torch.OutOfMemoryError:
        return False
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True
