"""Sums over all processes.

Every sum over a batch uses these functions, so all processes agree on each mean and on early
stopping.
"""

from dataclasses import dataclass

from accelerate import PartialState
from accelerate.utils import reduce
from torch import float64, tensor


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares: mean and variance follow, and processes can be summed."""

    count: float
    total: float
    squares: float


def is_distributed() -> bool:
    """Return whether this is one of several processes."""
    return PartialState().num_processes > 1


def all_reduce_sum(value: float) -> float:
    """Sum a value over all processes; a single process returns it unchanged."""
    return float(reduce(tensor(value, dtype=float64), "sum"))  # pyright: ignore[reportArgumentType]


def all_reduce_moments(moments: Moments) -> Moments:
    """Sum moments over all processes."""
    return Moments(all_reduce_sum(moments.count), all_reduce_sum(moments.total), all_reduce_sum(moments.squares))
