"""Span corruption: how an encoder–decoder learns language from raw text. Source: Raffel et al. 2020, section 3.1.4."""

from collections.abc import Sequence

import numpy as np

from rlgf.randomness import Purpose, uniforms

NOISE, MEAN_SPAN = 0.15, 3.0  # share of tokens left out, and their mean number in a span


def corrupt(ids: Sequence[int], sentinels: Sequence[int], seed: int, index: int) -> tuple[list[int], list[int]]:
    """A text with spans of tokens left out, and what was: both with a sentinel for each span, in order.

    The number of tokens left out is fixed by the length (at least one, never all); where they are is drawn, a pure function
    of (seed, index). Unlike the source's, a span may begin the text and need not end it: in a text of one span it would
    always be the end. A text of one token or none cannot be corrupted.
    """
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens cannot be corrupted")
    hidden = min(max(round(len(ids) * NOISE), 1), len(ids) - 1)
    spans = min(max(round(hidden / MEAN_SPAN), 1), hidden, len(ids) - hidden, len(sentinels))
    draws = uniforms(seed, Purpose.CORRUPTION, index, len(ids) * 2 + 2)
    lengths = _parts(hidden, spans, draws[: len(ids)])
    kept = _parts(len(ids) - hidden + 2, spans + 1, draws[len(ids) :])  # one more at either end, which may then be nothing
    source: list[int] = []
    target: list[int] = []
    at = -1
    for gap, length, sentinel in zip(kept, lengths, sentinels):
        source += [*ids[max(at, 0) : at + gap], sentinel]
        target += [sentinel, *ids[at + gap : at + gap + length]]
        at += gap + length
    return [*source, *ids[at:]], target


def _parts(total: int, parts: int, draws: np.ndarray) -> list[int]:
    """`total` as a sum of `parts` numbers of at least 1, all ways alike."""
    cuts = np.sort(np.argsort(draws[: total - 1])[: parts - 1]) + 1
    return np.diff([0, *cuts.tolist(), total]).tolist()
