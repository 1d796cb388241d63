"""How much texts differ from each other, and how much one repeats itself. Words are what stands between spaces."""

import importlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rlgf.scoring.extras import need

ORDERS = 4


def grams(text: str, order: int) -> list[tuple[str, ...]]:
    """The n-grams of words of a text, in their order."""
    words = text.split()
    return [tuple(words[i : i + order]) for i in range(len(words) - order + 1)]


def distinct(texts: Sequence[str], order: int = 2) -> float:
    """Distinct n-grams of words over all n-grams, in all texts together; 0 where there are none."""
    found = [gram for text in texts for gram in grams(text, order)]
    return len(set(found)) / len(found) if found else 0.0


def self_bleu(texts: Sequence[str]) -> list[float] | None:
    """BLEU-4 of each text with all others as its references; None where there are no others.

    The arithmetic is pycocoevalcap's (no smoothing). An n-gram of the others counts as often as in the one of them that has it
    most: of every n-gram the two highest counts are kept, so the cost grows with the texts and not with their square.
    Source: Zhu et al. 2018 (Texygen).
    """
    need("self-BLEU", "captions", "pycocoevalcap")
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
    """The share of a text's n-grams that it has said before; 0 where it has none."""
    found = grams(text, order)
    return 1 - len(set(found)) / len(found) if found else 0.0
