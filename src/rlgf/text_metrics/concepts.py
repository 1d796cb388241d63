"""CommonGen's coverage: the share of required concepts that a text mentions, in any inflection."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from rlgf.text_metrics.captions import Tokenizer
from rlgf.text_metrics.java import JAVA

MAX_CACHED_WORDS = 200_000  # in the cache of lemmas


def concepts_in(cell: object) -> tuple[str, ...]:
    """Return the concepts in a cell: a list of texts, or a single text.

    Raises `ValueError` for any other value.
    """
    concepts: Any = [cell] if isinstance(cell, str) else cell
    if not isinstance(concepts, Sequence) or not concepts:
        raise ValueError(f"{cell!r} holds no concepts: a list of strings is needed")
    if not all(isinstance(concept, str) and concept.strip() for concept in concepts):
        raise ValueError(f"{cell!r} holds something else than concepts: a list of strings is needed, none of them empty")
    return tuple(concepts)


class ConceptCoverage:
    """The share of a line's concepts that its text mentions, 0 to 1.

    A concept is mentioned if each of its words has a lemma in common with a word of the text:
    `catch` by `caught`, `man` by `men`. The lemmas are those that a word may have as a noun or as a
    verb, by the morphology of Stanford CoreNLP.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.kept: dict[str, frozenset[str]] = {}

    def __call__(self, texts: Sequence[str], concepts: Sequence[Sequence[str]]) -> list[float]:
        """Return one number per text; every line must have at least one concept."""
        words = [_parts(tokens) for tokens in self.tokenizer(texts)]
        wanted = [[_parts(tokens) for tokens in line] for line in self.tokenizer.groups(concepts)]
        self._cache_lemmas(word for line in (words, *wanted) for each in line for word in each)
        return [self._share(line, these) for line, these in zip(words, wanted)]

    def _share(self, words: Sequence[str], concepts: Sequence[Sequence[str]]) -> float:
        lemmas = {lemma for word in words for lemma in self.kept[word]}
        return sum(bool(concept) and all(self.kept[word] & lemmas for word in concept) for concept in concepts) / len(concepts)

    def _cache_lemmas(self, words: Iterable[str]) -> None:
        wanted = set(words)
        if len(self.kept) > MAX_CACHED_WORDS:
            self.kept.clear()
        new = sorted(wanted - self.kept.keys())
        if new:
            self.kept.update({word: frozenset(lemmas) for word, lemmas in zip(new, JAVA.request("lemmas", words=new))})


def _parts(tokens: str) -> list[str]:
    """Return the words of a tokenized text, and the parts of those with hyphens."""
    words = tokens.split()
    return words + [part for word in words if "-" in word for part in re.split("-+", word) if part]
