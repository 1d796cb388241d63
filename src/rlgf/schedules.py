"""Numbers that depend on how far training has come."""

import math


def learning_rate_factor(kind: str, step: int, steps: int, warmup: int = 0) -> float:
    """The factor on the learning rate at `step` of `steps` (0-based): 'constant', 'linear' or 'cosine' to zero.

    During the first `warmup` steps the factor rises linearly to 1.
    """
    if warmup and step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if kind == "constant":
        return 1.0
    if kind == "linear":
        return 1.0 - done
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    raise ValueError(f"unknown schedule {kind!r}")
