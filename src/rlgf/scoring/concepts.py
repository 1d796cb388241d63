"""Which of the concepts that a text was to mention it mentions, whatever their inflection (CommonGen's coverage)."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rlgf.scoring.captions import Tokenizer
from rlgf.scoring.java import JAVA

KEPT_WORDS = 200_000  # whose lemmas are kept


def concepts_in(cell: object) -> tuple[str, ...]:
    """The concepts that a cell of the data holds: a list of texts, or one text as the only one. Others raise `ValueError`."""
    concepts: Any = [cell] if isinstance(cell, str) else cell
    if not isinstance(concepts, Sequence) or not concepts:
        raise ValueError(f"{cell!r} holds no concepts: a list of texts is needed")
    if not all(isinstance(concept, str) and concept.strip() for concept in concepts):
        raise ValueError(f"{cell!r} holds something else than concepts: a list of texts is needed, none of them empty")
    return tuple(concepts)


class ConceptCoverage:
    """The share of a line's concepts that its text mentions, 0 to 1.

    A concept is mentioned where each of its words has a lemma in common with a word of the text: `catch` by `caught`, `man` by
    `men`. The lemmas are those that a word may have as a noun or as a verb, by the morphology of Stanford CoreNLP.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.kept: dict[str, frozenset[str]] = {}

    def __call__(self, texts: Sequence[str], concepts: Sequence[Sequence[str]]) -> list[float]:
        """One number for each text. Every line must have at least one concept."""
        words = [_parts(tokens) for tokens in self.tokenizer(texts)]
        wanted = [[_parts(tokens) for tokens in line] for line in self.tokenizer.groups(concepts)]
        self._learn(word for line in (words, *wanted) for each in line for word in each)
        return [self._share(line, these) for line, these in zip(words, wanted)]

    def _share(self, words: Sequence[str], concepts: Sequence[Sequence[str]]) -> float:
        said = {lemma for word in words for lemma in self.kept[word]}
        return sum(bool(concept) and all(self.kept[word] & said for word in concept) for concept in concepts) / len(concepts)

    def _learn(self, words: Iterable[str]) -> None:
        wanted = set(words)
        if len(self.kept) > KEPT_WORDS:
            self.kept.clear()
        new = sorted(wanted - self.kept.keys())
        if new:
            self.kept.update({word: frozenset(lemmas) for word, lemmas in zip(new, JAVA.ask("lemmas", words=new))})


def _parts(tokens: str) -> list[str]:
    """The words of a tokenised text, those with hyphens also in parts."""
    words = tokens.split()
    return words + [part for word in words if "-" in word for part in re.split("-+", word) if part]
