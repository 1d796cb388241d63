"""Span corruption: pretraining of encoder–decoders on raw text.

Source: Raffel et al. 2020, section 3.1.4.
"""

from collections.abc import Sequence

import numpy as np

from rlgf.randomness import Purpose, uniforms

NOISE, MEAN_SPAN = 0.15, 3.0  # fraction of tokens removed, and mean tokens per span


def corrupt(ids: Sequence[int], sentinels: Sequence[int], seed: int, index: int) -> tuple[list[int], list[int]]:
    """Return a text without sampled spans, and the removed spans.

    Both have one sentinel per span, in order. The length determines the number of removed tokens
    (at least one, never all); their positions are sampled, a pure function of (seed, index). Unlike
    in the source, a span may start the text and need not end it: in a text with one span it would
    always be the end. Raises `ValueError` for a text of fewer than two tokens.
    """
    if len(ids) < 2:
        raise ValueError(f"a text of {len(ids)} tokens cannot be corrupted")
    hidden = min(max(round(len(ids) * NOISE), 1), len(ids) - 1)
    spans = min(max(round(hidden / MEAN_SPAN), 1), hidden, len(ids) - hidden, len(sentinels))
    numbers = uniforms(seed, Purpose.CORRUPTION, index, len(ids) * 2 + 2)
    lengths = _parts(hidden, spans, numbers[: len(ids)])
    # one more at either end, so that the first and the last gap may be empty
    kept = _parts(len(ids) - hidden + 2, spans + 1, numbers[len(ids) :])
    source: list[int] = []
    target: list[int] = []
    at = -1
    for gap, length, sentinel in zip(kept, lengths, sentinels):
        source += [*ids[max(at, 0) : at + gap], sentinel]
        target += [sentinel, *ids[at + gap : at + gap + length]]
        at += gap + length
    return [*source, *ids[at:]], target


def _parts(total: int, parts: int, numbers: np.ndarray) -> list[int]:
    """Sample `parts` integers of at least 1 with sum `total`, uniformly."""
    cuts = np.sort(np.argsort(numbers[: total - 1])[: parts - 1]) + 1
    return np.diff([0, *cuts.tolist(), total]).tolist()
