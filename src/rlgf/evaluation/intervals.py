"""Intervals of means and shares over few prompts, shown wherever such a number is."""

import math
from collections.abc import Mapping, Sequence

FEW = 64  # prompts; a number over fewer is shown with its interval
LEVEL = 1.959964  # standard deviations of a normal distribution that hold 95 %
# shares, and the metrics whose sum is their number of trials
SHARES: Mapping[str, Sequence[str]] = {
    "pass_rate": ("completions",), "ended_with_eos": ("completions",), "win_rate": ("wins", "ties", "losses"),
    "accuracy": ("held_out_pairs",), "length_baseline": ("held_out_pairs",), "length_baseline_agreement": ("held_out_pairs",),
}  # fmt: skip


def mean_interval(mean: float, standard_error: float, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a mean over `count` values, by Student's t distribution."""
    if count < 2:
        return -math.inf, math.inf
    freedom = count - 1
    exact = {1: 12.7062, 2: 4.30265, 3: 3.18245}
    # the expansion of the quantile in 1 / freedom
    terms = (
        (LEVEL**3 + LEVEL) / 4,
        (5 * LEVEL**5 + 16 * LEVEL**3 + 3 * LEVEL) / 96,
        (3 * LEVEL**7 + 19 * LEVEL**5 + 17 * LEVEL**3 - 15 * LEVEL) / 384,
    )
    quantile = LEVEL + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))
    width = exact.get(freedom, quantile) * standard_error
    return mean - width, mean + width


def share_interval(share: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of a share of `count` trials (Wilson 1927)."""
    squared = LEVEL**2
    center = (share + squared / (2 * count)) / (1 + squared / count)
    width = LEVEL / (1 + squared / count) * math.sqrt(share * (1 - share) / count + squared / (4 * count**2))
    return max(0.0, center - width), min(1.0, center + width)


def interval_in(name: str, metrics: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the interval of a metric over fewer than `FEW` prompts, or None.

    It is made from the other metrics of the same evaluation: counts and standard errors.
    """
    value = metrics.get(name)
    if value is None or not math.isfinite(value):
        return None
    if name in SHARES:
        count = sum(metrics.get(part) or 0 for part in SHARES[name])
        return share_interval(value, count) if 0 < count < FEW else None
    error, count = metrics.get(f"{name}_standard_error"), metrics.get("completions")
    if error is None or not count or count >= FEW:
        return None
    return mean_interval(value, error, int(count))


def show_interval(interval: tuple[float, float] | None, digits: str = ".4g", scale: float = 1.0) -> str:
    """Return an interval as text after its number, or the empty text."""
    if interval is None:
        return ""
    low, high = (format(bound * scale, digits) for bound in interval)
    return f" [{low}, {high}]"


def show_mean(values: Sequence[float], digits: str = ".3f") -> str:
    """Return the mean of some values as text, with its interval if they are few."""
    count, mean = len(values), sum(values) / len(values)
    if count >= FEW or count < 2:
        return format(mean, digits)
    if all(value in (0.0, 1.0) for value in values):
        return format(mean, digits) + show_interval(share_interval(mean, count), digits)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return format(mean, digits) + show_interval(mean_interval(mean, error, count), digits)
