"""ROUGE of the summarization tools (ROUGE-1.5.5 by rouge-score), not of the caption tools."""

import importlib
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from rlgf.text_metrics.optional import require_extra

KEYS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
TokenizerName = Literal["latin", "unicode"]
# scripts without spaces between words, by the first word of their letters' names
UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def unicode_words(text: str) -> list[str]:
    """Return the words of a text in any script, in lower case.

    A word is a run of letters, digits and their marks. In scripts that put no spaces between words,
    each letter with its marks is one.
    """
    words: list[str] = []
    is_open = False  # true if the next letter continues the last word
    for letter in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(letter)[0]
        if kind == "M" and words:
            words[-1] += letter
        elif kind in "LN":
            unspaced = unicodedata.name(letter, "").partition(" ")[0] in UNSPACED
            if is_open and not unspaced:
                words[-1] += letter
            else:
                words.append(letter)
            is_open = not unspaced
        else:
            is_open = False
    return words


class _UnicodeTokenizer:
    """The tokenizer of other scripts, as rouge-score calls it."""

    def __init__(self, stemming: bool) -> None:
        self.stemmer: Any = importlib.import_module("nltk.stem.porter").PorterStemmer() if stemming else None

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of a text; optionally stem words of over three letters."""
        words = unicode_words(text)
        return [self.stemmer.stem(word) if len(word) > 3 else word for word in words] if self.stemmer else words


class Rouge:
    """F-scores of each text against its best reference.

    `stemming` replaces words by their Porter stems first. `rougeLsum` takes each line of a text as
    a sentence. The `latin` tokenizer is that of ROUGE-1.5.5, whose words consist of a to z and 0 to
    9: of other scripts nothing is left, and every text scores 0. The constructor raises
    `ConfigError` if the extra `rouge` is missing.
    """

    def __init__(self, stemming: bool = False, keys: Sequence[str] = KEYS, tokenizer: TokenizerName = "latin") -> None:
        require_extra("ROUGE-1, -2, -L and -Lsum", "rouge", "rouge_score")
        self.keys, self.tokenizer = tuple(keys), tokenizer
        own = {} if tokenizer == "latin" else {"tokenizer": _UnicodeTokenizer(stemming)}
        scorers: Any = importlib.import_module("rouge_score.rouge_scorer")
        self.scorer: Any = scorers.RougeScorer(list(keys), use_stemmer=stemming, **own)

    def __call__(self, texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, list[float]]:
        """Return for each key one number per text, 0 to 1."""
        scores = [self.scorer.score_multi(list(group), text) for text, group in zip(texts, references)]
        return {key: [float(line[key].fmeasure) for line in scores] for key in self.keys}


def loses_letters(text: str, tokenizer: str) -> bool:
    """Return whether ROUGE's own tokenizer drops most letters of a text, as of other scripts."""
    if tokenizer != "latin" or text.isascii():
        return False
    letters = [letter for letter in text.lower() if letter.isalnum()]
    return 2 * sum(not letter.isascii() for letter in letters) > len(letters)


def count_lost(texts: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str) -> int:
    """Return the number of texts that lose most letters, themselves or in every reference."""
    return sum(
        loses_letters(text, tokenizer) or (bool(group) and all(loses_letters(reference, tokenizer) for reference in group))
        for text, group in zip(texts, references)
    )


def lost_sentence(count: int, of: int, fix: str) -> str:
    """Return a sentence about texts whose letters ROUGE drops, and how to keep them."""
    return (
        f"ROUGE reads only the letters a to z and digits, and {count:,} of {of:,} lines consist mostly of others, which score "
        f"0 or by chance: {fix}."
    )
