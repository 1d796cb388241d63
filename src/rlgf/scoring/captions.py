"""The caption metrics on coco-caption's scale, by pycocoevalcap and its jars: BLEU, ROUGE-L, METEOR, CIDEr-D, SPICE.

All of them read tokens of the Stanford PTB tokenizer in lower case, without punctuation, as coco-caption has it. A function
takes tokenised texts and for each the tokenised references, and returns one number for each text, or the corpus's as well.
"""

import functools
import hashlib
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlgf.errors import UserError
from rlgf.scoring import jars
from rlgf.scoring.extras import need
from rlgf.scoring.java import JAVA

References = Sequence[Sequence[str]]  # for each text its references
Progress = Callable[[int, int], None]  # done, of

ORDERS = 4  # n-grams of one to four words
KEPT_TEXTS = 200_000  # whose tokens are kept
LINES_AT_A_TIME = 256  # given to SPICE between two reports
LONGEST_SENTENCE = 150  # words that SPICE's parser is given: its time grows with their cube (20 s for 150, minutes for 300)
SIGMA = 6.0  # of CIDEr-D's length penalty
CIDER_SCALE = 10.0


class Tokenizer:
    """Coco-caption's tokenizer: PTB tokens in lower case without punctuation; the tokens of a text are kept.

    Raises `UserError` when made where Java or the extra `captions` is missing.
    """

    def __init__(self) -> None:
        need("the PTB tokenizer", "captions", "jpype", "pycocoevalcap")
        JAVA.start()
        self.punctuation = frozenset(importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer").PUNCTUATIONS)
        self.kept: dict[str, str] = {}

    def __call__(self, texts: Iterable[str]) -> list[str]:
        """The tokens of each text, with a space between two."""
        texts = list(texts)
        new = list(dict.fromkeys(text for text in texts if text not in self.kept))
        answers = dict(zip(new, JAVA.ask("tokens", texts=[plain(text) for text in new]))) if new else {}
        for text, line in answers.items():
            answers[text] = " ".join(word for word in line.split(" ") if word not in self.punctuation)
        tokens = [answers[text] if text in answers else self.kept[text] for text in texts]
        if len(self.kept) + len(answers) > KEPT_TEXTS:
            self.kept.clear()
        self.kept.update(answers)
        return tokens

    def groups(self, groups: Iterable[Sequence[str]]) -> list[list[str]]:
        """The tokens of each text of each group."""
        groups = list(groups)
        tokens = iter(self(text for group in groups for text in group))
        return [[next(tokens) for _ in group] for group in groups]


@functools.cache
def shared_tokenizer() -> Tokenizer:
    """One tokenizer for all metrics of this process, so that a reference is tokenised once."""
    return Tokenizer()


def plain(text: str) -> str:
    """A text that can be written as UTF-8: halves of surrogate pairs become U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def bleu(texts: Sequence[str], references: References) -> tuple[list[float], list[list[float]]]:
    """BLEU-1 to BLEU-4 of the corpus, and of each line: `lines[n - 1][i]`. No smoothing; the closest reference's length."""
    scorer = importlib.import_module("pycocoevalcap.bleu.bleu").Bleu(ORDERS)
    corpus, lines = scorer.compute_score(*_by_number(texts, references), verbose=0)
    return [float(value) for value in corpus], [[float(value) for value in values] for values in lines]


def rouge_l(texts: Sequence[str], references: References) -> list[float]:
    """ROUGE-L of the caption tools (F with β 1.2 of the best precision and the best recall). A text without words has 0."""
    scorer = importlib.import_module("pycocoevalcap.rouge.rouge").Rouge()
    return [float(scorer.calc_score([text], group)) if text else 0.0 for text, group in zip(texts, references)]


def meteor(texts: Sequence[str], references: References) -> tuple[float, list[float]]:
    """METEOR 1.5 for English, of the corpus (its statistics summed) and of each line."""
    answer = JAVA.ask("meteor", lines=list(zip(texts, references)))
    return answer["corpus"], answer["lines"]


def cider_d(texts: Sequence[str], references: References) -> tuple[float, list[float]]:
    """CIDEr-D with document frequencies from these references, one document per line; 0 to 10."""
    scorer = importlib.import_module("pycocoevalcap.cider.cider").Cider()
    corpus, lines = scorer.compute_score(*_by_number(texts, references))
    return float(corpus), [float(value) for value in lines]


def _by_number(texts: Sequence[str], references: References) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """References and texts as the package takes them, under a number each: equal lines stay two."""
    return {i: list(group) for i, group in enumerate(references)}, {i: [text] for i, text in enumerate(texts)}


class CiderD:
    """CIDEr-D with the document frequencies of a fixed collection, so that the number of a text hangs on nothing but its line.

    pycocoevalcap counts document frequencies anew in what it scores; this is its arithmetic with frequencies given
    (equal to 1e-12 where they are the same). Source: Vedantam et al. 2015, and pycocoevalcap's `cider_scorer.py`.
    """

    def __init__(self, documents: Iterable[Sequence[str]]) -> None:
        counts: Counter[tuple[str, ...]] = Counter()
        self.documents = 0
        for document in documents:
            counts.update({gram for text in document for grams in _grams(text) for gram in grams})
            self.documents += 1
        self.most = math.log(self.documents) if self.documents else 0.0
        # what is in one document weighs as much as what is in none, so it need not be kept
        self.weights = {gram: self.most - math.log(count) for gram, count in counts.items() if count > 1}

    def __call__(self, texts: Sequence[str], references: References) -> list[float]:
        """One number for each text."""
        return [self._line(text, group) for text, group in zip(texts, references)]

    def _line(self, text: str, references: Sequence[str]) -> float:
        vectors, norms, pairs = self._vectors(text)
        total = 0.0
        for reference in references:
            others, other_norms, other_pairs = self._vectors(reference)
            similarity = 0.0
            for mine, theirs, norm, other_norm in zip(vectors, others, norms, other_norms):
                if norm and other_norm:
                    products = [min(mine[gram], theirs[gram]) * theirs[gram] for gram in mine if gram in theirs]
                    similarity += sum(products) / (norm * other_norm)
            total += similarity * math.exp(-((pairs - other_pairs) ** 2) / (2 * SIGMA**2))
        return CIDER_SCALE * total / ORDERS / len(references)

    def _vectors(self, text: str) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """For each order the weighed counts and their length; and the number of word pairs, which is what counts as length."""
        weight, most = self.weights.get, self.most
        vectors: list[dict[tuple[str, ...], float]] = []
        for grams in _grams(text):
            vector = {gram: weight(gram, most) for gram in grams}
            if len(vector) < len(grams):
                vector = {gram: count * vector[gram] for gram, count in Counter(grams).items()}
            vectors.append(vector)
        return vectors, [math.hypot(*vector.values()) for vector in vectors], max(len(text.split()) - 1, 0)


def _grams(text: str) -> list[list[tuple[str, ...]]]:
    """The n-grams of each order in a text."""
    words = text.split()
    return [list(zip(*(words[start:] for start in range(order)))) for order in range(1, ORDERS + 1)]


class Spice:
    """SPICE (Anderson et al. 2016) by its own jar and CoreNLP 3.6.0; parses are kept on disk, in the cache folder.

    Raises `UserError` when made where the jars, Java or the extra `captions` are missing.
    """

    def __init__(self) -> None:
        found = jars.find()
        need("SPICE", "captions", "jpype", "pycocoevalcap")
        JAVA.start()
        self.jars = [str(path) for path in found]
        self.parses = jars.cache_folder() / "spice" / f"parses-{_models(found)}.sqlite"

    def __call__(self, texts: Sequence[str], references: References, progress: Progress | None = None) -> list[float]:
        """The F-score of each tokenised text; `progress` is told now and then how many lines are done, of how many."""
        self.check(texts, references)
        lines = list(zip(texts, references))
        scores: list[float] = []
        for start in range(0, len(lines), LINES_AT_A_TIME):
            part = lines[start : start + LINES_AT_A_TIME]
            scores += JAVA.ask("spice", jars=self.jars, parses=str(self.parses), lines=part)
            if progress is not None:
                progress(len(scores), len(lines))
        return scores

    def check(self, texts: Sequence[str], references: References) -> None:
        """Raise `UserError` where a text would take its parser minutes."""
        for number, (text, group) in enumerate(zip(texts, references), 1):
            longest = max(len(each.split()) for each in (text, *group))
            if longest > LONGEST_SENTENCE:
                raise UserError(
                    f"SPICE reads captions of at most {LONGEST_SENTENCE} words (its parser's time grows with their cube), but "
                    f"text {number} or a reference of it has {longest}: leave spice out, or that text."
                )


def _models(paths: Sequence[Path]) -> str:
    """A short name for the jars that parse: other models, other parses."""
    sizes: list[Any] = [(path.name, path.stat().st_size) for path in paths]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]
