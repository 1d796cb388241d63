"""Schedules: factors that depend on the progress of training."""

import math


def learning_rate_factor(kind: str, step: int, steps: int, warmup: int = 0) -> float:
    """Compute the factor on the learning rate at an optimizer step.

    Args:
        kind: 'constant', 'linear' (decay to zero) or 'cosine' (decay to zero).
        step: the 0-based step.
        steps: the number of steps of the whole training.
        warmup: the number of first steps during which the factor rises linearly to 1.
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
