"""The one place through which sums over a batch pass, so that several processes agree on every mean and every stop."""

from dataclasses import dataclass

from accelerate import PartialState
from accelerate.utils import reduce
from torch import float64, tensor


@dataclass(frozen=True)
class Moments:
    """Sums from which mean and variance follow; sums of several processes add up."""

    count: float
    total: float
    squares: float


def several() -> bool:
    """Whether this is one of several processes."""
    return PartialState().num_processes > 1


def total(value: float) -> float:
    """The sum of `value` over all processes (its own value where there is one process)."""
    return float(reduce(tensor(value, dtype=float64), "sum"))  # pyright: ignore[reportArgumentType]


def total_moments(moments: Moments) -> Moments:
    """Moments over all processes."""
    return Moments(total(moments.count), total(moments.total), total(moments.squares))
