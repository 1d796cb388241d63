"""The caption metrics BLEU, ROUGE-L, METEOR, CIDEr-D and SPICE, by pycocoevalcap and its jars.

All are on coco-caption's scale, and use tokens of the Stanford PTB tokenizer in lower case, without
punctuation, as coco-caption does. A function takes tokenized texts and the tokenized references of
each, and returns one number per text; some return the corpus's number as well.
"""

import functools
import hashlib
import importlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlgf.errors import ConfigError
from rlgf.text_metrics import jars
from rlgf.text_metrics.java import JAVA
from rlgf.text_metrics.optional import require_extra

References = Sequence[Sequence[str]]  # the references of each text
Progress = Callable[[int, int], None]  # (lines done, lines in total)

ORDERS = 4  # n-grams of one to four words
MAX_CACHED_TEXTS = 200_000  # in the cache of tokens
LINE_BATCH = 256  # per call of SPICE, and per progress report
# words; the time of SPICE's parser grows with their cube (20 s for 150, minutes for 300)
MAX_SENTENCE_WORDS = 150
SIGMA = 6.0  # of CIDEr-D's length penalty
CIDER_SCALE = 10.0


class Tokenizer:
    """Coco-caption's tokenizer: PTB tokens in lower case without punctuation, cached by text.

    The constructor raises `ConfigError` if Java or the extra `captions` is missing.
    """

    def __init__(self) -> None:
        require_extra("the PTB tokenizer", "captions", "jpype", "pycocoevalcap")
        JAVA.start()
        self.punctuation = frozenset(importlib.import_module("pycocoevalcap.tokenizer.ptbtokenizer").PUNCTUATIONS)
        self.kept: dict[str, str] = {}

    def __call__(self, texts: Iterable[str]) -> list[str]:
        """Return the tokens of each text, joined by spaces."""
        texts = list(texts)
        new = list(dict.fromkeys(text for text in texts if text not in self.kept))
        tokenized = dict(zip(new, JAVA.request("tokens", texts=[plain(text) for text in new]))) if new else {}
        for text, line in tokenized.items():
            tokenized[text] = " ".join(word for word in line.split(" ") if word not in self.punctuation)
        tokens = [tokenized[text] if text in tokenized else self.kept[text] for text in texts]
        if len(self.kept) + len(tokenized) > MAX_CACHED_TEXTS:
            self.kept.clear()
        self.kept.update(tokenized)
        return tokens

    def groups(self, groups: Iterable[Sequence[str]]) -> list[list[str]]:
        """Return the tokens of each text of each group."""
        groups = list(groups)
        tokens = iter(self(text for group in groups for text in group))
        return [[next(tokens) for _ in group] for group in groups]


@functools.cache
def shared_tokenizer() -> Tokenizer:
    """Return the tokenizer of this process, so that a reference is tokenized once."""
    return Tokenizer()


def plain(text: str) -> str:
    """Replace unpaired surrogates by U+FFFD, so that the text can be encoded as UTF-8."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def bleu(texts: Sequence[str], references: References) -> tuple[list[float], list[list[float]]]:
    """Compute BLEU-1 to BLEU-4 of the corpus, and of each line as `lines[n - 1][i]`.

    Without smoothing, with the length of the closest reference.
    """
    scorer = importlib.import_module("pycocoevalcap.bleu.bleu").Bleu(ORDERS)
    corpus, lines = scorer.compute_score(*_by_number(texts, references), verbose=0)
    return [float(value) for value in corpus], [[float(value) for value in values] for values in lines]


def rouge_l(texts: Sequence[str], references: References) -> list[float]:
    """Compute ROUGE-L of the caption tools; 0 for a text without words.

    It is F with β = 1.2 of the best precision and the best recall over the references.
    """
    scorer = importlib.import_module("pycocoevalcap.rouge.rouge").Rouge()
    return [float(scorer.calc_score([text], group)) if text else 0.0 for text, group in zip(texts, references)]


def meteor(texts: Sequence[str], references: References) -> tuple[float, list[float]]:
    """Compute METEOR 1.5 (English) of the corpus (summed statistics) and of each line."""
    response = JAVA.request("meteor", lines=list(zip(texts, references)))
    return response["corpus"], response["lines"]


def cider_d(texts: Sequence[str], references: References) -> tuple[float, list[float]]:
    """Compute CIDEr-D of the corpus and of each line, 0 to 10.

    Document frequencies come from these references, one document per line.
    """
    scorer = importlib.import_module("pycocoevalcap.cider.cider").Cider()
    corpus, lines = scorer.compute_score(*_by_number(texts, references))
    return float(corpus), [float(value) for value in lines]


def _by_number(texts: Sequence[str], references: References) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
    """Return references and texts by line number, so that equal lines stay separate."""
    return {i: list(group) for i, group in enumerate(references)}, {i: [text] for i, text in enumerate(texts)}


class CiderD:
    """CIDEr-D with the document frequencies of a fixed collection.

    So the number of a text depends on its line only. pycocoevalcap counts document frequencies in
    the lines it scores; this is its arithmetic with given frequencies (equal to 1e-12 if they are
    the same). Source: Vedantam et al. 2015, and pycocoevalcap's `cider_scorer.py`.
    """

    def __init__(self, documents: Iterable[Sequence[str]]) -> None:
        counts: Counter[tuple[str, ...]] = Counter()
        self.documents = 0
        for document in documents:
            counts.update({gram for text in document for grams in _grams(text) for gram in grams})
            self.documents += 1
        self.max_weight = math.log(self.documents) if self.documents else 0.0
        # n-grams of one document have the weight of unseen ones, so they need not be stored
        self.weights = {gram: self.max_weight - math.log(count) for gram, count in counts.items() if count > 1}

    def __call__(self, texts: Sequence[str], references: References) -> list[float]:
        """Return one number per text."""
        return [self._line(text, group) for text, group in zip(texts, references)]

    def _line(self, text: str, references: Sequence[str]) -> float:
        vectors, norms, pairs = self._vectors(text)
        total = 0.0
        for reference in references:
            others, other_norms, other_pairs = self._vectors(reference)
            similarity = 0.0
            for mine, other, norm, other_norm in zip(vectors, others, norms, other_norms):
                if norm and other_norm:
                    products = [min(mine[gram], other[gram]) * other[gram] for gram in mine if gram in other]
                    similarity += sum(products) / (norm * other_norm)
            total += similarity * math.exp(-((pairs - other_pairs) ** 2) / (2 * SIGMA**2))
        return CIDER_SCALE * total / ORDERS / len(references)

    def _vectors(self, text: str) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Return weighted n-gram counts and their norm for each order, and the text's length.

        The length is the number of word pairs.
        """
        weight, max_weight = self.weights.get, self.max_weight
        vectors: list[dict[tuple[str, ...], float]] = []
        for grams in _grams(text):
            vector = {gram: weight(gram, max_weight) for gram in grams}
            if len(vector) < len(grams):
                vector = {gram: count * vector[gram] for gram, count in Counter(grams).items()}
            vectors.append(vector)
        return vectors, [math.hypot(*vector.values()) for vector in vectors], max(len(text.split()) - 1, 0)


def _grams(text: str) -> list[list[tuple[str, ...]]]:
    """Return the n-grams of each order in a text."""
    words = text.split()
    return [list(zip(*(words[start:] for start in range(order)))) for order in range(1, ORDERS + 1)]


class Spice:
    """SPICE (Anderson et al. 2016) by its own jar and CoreNLP 3.6.0.

    Parses are stored on disk, in the cache folder. The constructor raises `ConfigError` if the
    jars, Java or the extra `captions` are missing.
    """

    def __init__(self) -> None:
        found = jars.find()
        require_extra("SPICE", "captions", "jpype", "pycocoevalcap")
        JAVA.start()
        self.jars = [str(path) for path in found]
        self.parses = jars.cache_folder() / "spice" / f"parses-{_models(found)}.sqlite"

    def __call__(self, texts: Sequence[str], references: References, progress: Progress | None = None) -> list[float]:
        """Compute the F-score of each tokenized text.

        `progress` is called now and then with the lines done and their total number.
        """
        self.check(texts, references)
        lines = list(zip(texts, references))
        scores: list[float] = []
        for start in range(0, len(lines), LINE_BATCH):
            part = lines[start : start + LINE_BATCH]
            scores += JAVA.request("spice", jars=self.jars, parses=str(self.parses), lines=part)
            if progress is not None:
                progress(len(scores), len(lines))
        return scores

    def check(self, texts: Sequence[str], references: References) -> None:
        """Raise `ConfigError` if a text or reference has over `LONGEST_SENTENCE` words."""
        for number, (text, group) in enumerate(zip(texts, references), 1):
            longest = max(len(each.split()) for each in (text, *group))
            if longest > MAX_SENTENCE_WORDS:
                raise ConfigError(
                    f"SPICE accepts captions of at most {MAX_SENTENCE_WORDS} words (parsing time grows with their cube), but "
                    f"text {number} or a reference of it has {longest}: leave spice out, or that text."
                )


def _models(paths: Sequence[Path]) -> str:
    """Return a short hash of the jars, since parses depend on their models."""
    sizes: list[Any] = [(path.name, path.stat().st_size) for path in paths]
    return hashlib.sha256(repr(sizes).encode()).hexdigest()[:12]
