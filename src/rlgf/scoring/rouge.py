"""ROUGE of the summarisation tools (ROUGE-1.5.5 by rouge-score): not the ROUGE-L of the caption tools."""

import importlib
from collections.abc import Sequence
from typing import Any

from rlgf.scoring.extras import need

KEYS = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge:
    """F-scores against the best reference of each line; `stemming` brings words to their Porter stems first.

    `rougeLsum` takes each line of a text for a sentence. Raises `UserError` when made where the extra `rouge` is missing.
    """

    def __init__(self, stemming: bool = False, keys: Sequence[str] = KEYS) -> None:
        need("ROUGE-1, -2, -L and -Lsum", "rouge", "rouge_score")
        self.keys = tuple(keys)
        self.scorer: Any = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(list(keys), use_stemmer=stemming)

    def __call__(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
        """For each key one number for each text, 0 to 1."""
        scores = [self.scorer.score_multi(list(group), text) for text, group in zip(texts, references)]
        return {key: [float(line[key].fmeasure) for line in scores] for key in self.keys}
