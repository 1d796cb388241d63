"""Every draw is a pure function of (seed, purpose, index, position): there is no stream whose state could be lost.

The generator is Philox, counter-based: the key holds seed and purpose, the counter the index, and a position is a place in
the block that follows. So the order of rows, padding, resuming and the number of processes change no draw.
"""

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a draw is for; each purpose is a family of its own."""

    PROMPT_ORDER = 1  # index: the pass over the dataset
    ROLLIN_COIN = 2  # index: the trajectory
    SWITCH = 3
    POLICY_TOKEN = 4
    GUIDE_TOKEN = 5
    REFERENCE = 6
    PHASE_COIN = 7  # index: the iteration
    MINIBATCH = 8  # index: the iteration and the epoch
    MLE = 9  # index: the optimizer step
    EVALUATION_TOKEN = 10
    SUPERVISED = 11
    TASK = 12
    INITIALISATION = 13
    CORRUPTION = 14  # index: the text
    JUDGE_ORDER = 20  # index: the row
    BEST_OF_TOKEN = 21  # index: prompt and sample


def uniforms(seed: int, purpose: Purpose, index: int, count: int, start: int = 0) -> NDArray[np.float64]:
    """`count` uniform numbers in [0, 1) for positions `start …`, float64."""
    # as uint64: a list would pass through float64, in which large neighbouring seeds are one
    key = np.array([seed % 2**64, int(purpose)], dtype=np.uint64)
    bits = np.random.Philox(key=key, counter=np.array([0, index % 2**64, 0, 0], dtype=np.uint64))
    return np.random.Generator(bits).random(start + count)[start:]


def uniform_rows(seed: int, purpose: Purpose, indices: Sequence[int], count: int, starts: Sequence[int]) -> NDArray[np.float64]:
    """A row of `count` uniforms for each index, from its own start position, [rows, count]."""
    rows = [uniforms(seed, purpose, index, count, start) for index, start in zip(indices, starts)]
    return np.stack(rows) if rows else np.zeros((0, count))


def permutation(seed: int, purpose: Purpose, index: int, size: int) -> NDArray[np.int64]:
    """A permutation of `range(size)`."""
    return np.argsort(uniforms(seed, purpose, index, size), kind="stable")
