"""ROUGE of the summarization tools (ROUGE-1.5.5 by rouge-score), not of the caption tools."""

import importlib
from collections.abc import Sequence
from typing import Any

from rlgf.text_metrics.optional import require_extra

KEYS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge:
    """F-scores of each text against its best reference.

    `stemming` replaces words by their Porter stems first. `rougeLsum` takes each line of a text as
    a sentence. The constructor raises `ConfigError` if the extra `rouge` is missing.
    """

    def __init__(self, stemming: bool = False, keys: Sequence[str] = KEYS) -> None:
        require_extra("ROUGE-1, -2, -L and -Lsum", "rouge", "rouge_score")
        self.keys = tuple(keys)
        self.scorer: Any = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(list(keys), use_stemmer=stemming)

    def __call__(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
        """Return for each key one number per text, 0 to 1."""
        scores = [self.scorer.score_multi(list(group), text) for text, group in zip(texts, references)]
        return {key: [float(line[key].fmeasure) for line in scores] for key in self.keys}
