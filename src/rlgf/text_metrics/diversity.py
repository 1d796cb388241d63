"""Diversity of texts and repetition inside a text, on words separated by white space."""

import importlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlgf.text_metrics.optional import require_extra

ORDERS = 4


def grams(text: str, order: int) -> list[tuple[str, ...]]:
    """Return the word n-grams of a text in order."""
    words = text.split()
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def distinct(texts: Sequence[str], order: int = 2) -> float:
    """Return distinct word n-grams over all n-grams of all texts; 0 without any."""
    found = [gram for text in texts for gram in grams(text, order)]
    return len(set(found)) / len(found) if found else 0.0


def self_bleu(texts: Sequence[str]) -> list[float] | None:
    """Compute BLEU-4 of each text with all others as references; None without others.

    The arithmetic is pycocoevalcap's (no smoothing). The count of an n-gram in the others is its
    maximum over them. The two highest counts of every n-gram are stored, so the cost is linear in
    the number of texts, not quadratic. Source: Zhu et al. 2018 (Texygen).
    """
    require_extra("self-BLEU", "captions", "pycocoevalcap")
    package: Any = importlib.import_module("pycocoevalcap.bleu.bleu_scorer")
    if len(texts) < 2:
        return None
    counts: list[dict[tuple[str, ...], int]] = []
    lengths: Counter[int] = Counter()
    highest: dict[tuple[str, ...], tuple[int, int]] = {}
    for text in texts:
        length, own = package.precook(text, ORDERS)
        counts.append(own)
        lengths[length] += 1
        for gram, count in own.items():
            first, second = highest.get(gram, (0, 0))
            highest[gram] = (max(first, count), min(first, max(second, count)))
    scorer = package.BleuScorer(n=ORDERS)
    for text, own in zip(texts, counts):
        mine = len(text.split())
        lengths[mine] -= 1
        others = {gram: second if own[gram] == first else first for gram, (first, second) in ((g, highest[g]) for g in own)}
        known = [length for length, number in lengths.items() if number]
        scorer.crefs.append((known, others))
        scorer.ctest.append(package.cook_test(text, (known, others), n=ORDERS))
        lengths[mine] += 1
    _, lines = scorer.compute_score(option="closest", verbose=0)
    return [float(value) for value in lines[ORDERS - 1]]


def repetition(text: str, order: int = 3) -> float:
    """Return the share of a text's n-grams that are repetitions; 0 if it has none."""
    found = grams(text, order)
    return 1 - len(set(found)) / len(found) if found else 0.0
