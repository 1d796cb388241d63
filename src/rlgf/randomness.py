"""Stateless random numbers: pure functions of (seed, purpose, index, position).

The generator is the counter-based Philox: seed and purpose are its key, the index is its counter,
and the position is the offset in the stream that starts there. So no generator state is saved, and
the order of rows, padding, resuming and the number of processes change no random number.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Purpose(IntEnum):
    """The purpose of a random number; each has an independent stream."""

    PROMPT_ORDER = 1  # index: the pass over the dataset
    ROLLIN = 2  # index: the trajectory
    SWITCH = 3
    POLICY_TOKEN = 4
    GUIDE_TOKEN = 5
    REFERENCE = 6
    PHASE = 7  # index: the iteration
    MINIBATCH = 8  # index: the iteration and the epoch
    MLE = 9  # index: the optimizer step
    EVALUATION_TOKEN = 10
    SUPERVISED = 11
    TASK = 12
    INITIALIZATION = 13
    CORRUPTION = 14  # index: the row
    DROPOUT = 15  # index: the iteration; a seed of torch's generators
    JUDGE_ORDER = 20  # index: the row
    BEST_OF_TOKEN = 21  # index: prompt and sample


def uniforms(seed: int, purpose: Purpose, index: int, count: int, start: int = 0) -> "NDArray[np.float64]":
    """Sample `count` uniform numbers in [0, 1), at positions from `start` on.

    Returns:
        float64 [count].
    """
    import numpy as np  # here, so that `rlgf list` responds at once

    # uint64: a list would be converted through float64, where large adjacent seeds are equal
    key = np.array([seed % 2**64, int(purpose)], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=np.array([0, index % 2**64, 0, 0], dtype=np.uint64))
    return np.random.Generator(bits).random(start + count)[start:]


def uniform_rows(
    seed: int, purpose: Purpose, indices: Sequence[int], count: int, starts: Sequence[int]
) -> "NDArray[np.float64]":
    """Sample `count` uniform numbers per index, each from its own start position, [rows, count]."""
    import numpy as np

    rows = [uniforms(seed, purpose, index, count, start) for index, start in zip(indices, starts)]
    return np.stack(rows) if rows else np.zeros((0, count))


def permutation(seed: int, purpose: Purpose, index: int, size: int) -> "NDArray[np.int64]":
    """Sample a permutation of `range(size)`, int64 [size]."""
    import numpy as np

    return np.argsort(uniforms(seed, purpose, index, size), kind="stable")
