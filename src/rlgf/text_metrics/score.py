"""Metrics of a file of texts: their names, the columns they need, and their results."""

import io
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rlgf.bounds import Flag, SmallInt
from rlgf.data.files import read_numbered_jsonl
from rlgf.errors import ConfigError, DataError, unknown
from rlgf.text_metrics import bertscore, captions, rouge
from rlgf.text_metrics.concepts import ConceptCoverage
from rlgf.text_metrics.diversity import distinct, self_bleu

GROUPS: dict[str, tuple[str, ...]] = {
    "bleu": ("bleu_1", "bleu_2", "bleu_3", "bleu_4"),
    "rouge": ("rouge_l", *rouge.KEYS),
    "meteor": ("meteor",),
    "cider": ("cider_d",),
    "spice": ("spice",),
    "bertscore": bertscore.KEYS,
    "distinct": ("distinct_1", "distinct_2", "distinct_3"),
    "self_bleu": ("self_bleu",),
    "coverage": ("concept_coverage",),
}
"""Names for `--metrics` with their keys; a key may be given by itself."""

DEFAULT = "bleu,rouge,meteor,cider,distinct"

DESCRIPTIONS = {
    "bleu": "BLEU-1 to BLEU-4 on coco-caption's tokens (Java)",
    "rouge": "both families: rouge_l of the caption tools (Java), rouge1 rouge2 rougeL rougeLsum of the summarization tools",
    "meteor": "METEOR 1.5 (Java)",
    "cider": "CIDEr-D, document frequencies from the scored file (Java)",
    "spice": "SPICE (Java, and jars that `rlgf download spice` brings)",
    "bertscore": "precision, recall, F1 of an encoder's embeddings",
    "distinct": "distinct n-grams over all n-grams, n = 1, 2, 3; uses no references",
    "self_bleu": "BLEU-4 of each text against all others; uses no references",
    "coverage": "share of a line's `concepts` that its text mentions (Java); uses no references",
}

KEYS = tuple(key for keys in GROUPS.values() for key in keys)
SCALES = {"bleu_1": 100, "bleu_2": 100, "bleu_3": 100, "bleu_4": 100, "spice": 100, "cider_d": 10}
"""Factors of the printed table, as in papers; JSON and functions have coco-caption's scale."""

WITHOUT_REFERENCES = {*GROUPS["distinct"], *GROUPS["self_bleu"], *GROUPS["coverage"]}
ON_TOKENS = {*GROUPS["bleu"], "rouge_l", "meteor", "cider_d", "spice"}
PACKAGES = ("rlgf", "pycocoevalcap", "rouge-score", "bert-score")
ROUGE_OPTION = "--rouge-tokenizer unicode (evaluation.metric_options.rouge_tokenizer)"
FEW_DOCUMENTS = 100  # lines; with fewer, CIDEr-D's document frequencies mean little


@dataclass(frozen=True)
class Line:
    """One line of a scored file."""

    prediction: str
    references: tuple[str, ...] = ()
    concepts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """The options of metrics."""

    stemming: Flag = False  # rouge1 to rougeLsum
    rouge_tokenizer: rouge.TokenizerName = "latin"  # unicode: words of any script
    bertscore_model: str = bertscore.DEFAULT_MODEL
    bertscore_layers: SmallInt | None = None


@dataclass
class Scores:
    """The results for the file and, for metrics that have them, for each line.

    Numbers are on coco-caption's scale. None stands for a number that does not exist: self-BLEU of
    a file of one line.
    """

    corpus: dict[str, float | None] = field(default_factory=dict[str, float | None])
    per_line: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    warnings: list[str] = field(default_factory=list[str])


def resolve_metric_names(metrics: str) -> list[str]:
    """Return the keys of a list such as `bleu,rouge_l,spice`, in the table's order.

    Raises `ConfigError` for an empty list or an unknown name.
    """
    names = [name.strip() for name in metrics.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--metrics is empty: choose from {', '.join(GROUPS)}, separated by commas.")
    for name in names:
        if name not in GROUPS and name not in KEYS:
            raise unknown("metric", name, list(dict.fromkeys([*GROUPS, *KEYS])))
    wanted = {key for name in names for key in GROUPS.get(name, (name,))}
    return [key for key in KEYS if key in wanted]


def read_lines(source: str, keys: Sequence[str]) -> list[Line]:
    """Load the lines of a JSON-lines file, plain or gzip; `-` is standard input.

    Raises `ConfigError` if a line lacks the columns of these metrics.
    """
    where = "standard input" if source == "-" else source
    try:
        if source == "-":
            rows = read_numbered_jsonl(io.BufferedReader(io.BytesIO(sys.stdin.buffer.read())), where)
        else:
            with Path(source).expanduser().open("rb") as file:
                rows = read_numbered_jsonl(file, where)
    except OSError as error:
        raise DataError(f"{where} cannot be read: {error.strerror or error}.") from None
    except ValueError as error:  # a name that no file can have
        raise DataError(f"{where} cannot be read: {error}.") from None
    if not rows:
        raise DataError(f"{where} has no lines: give a file with a JSON object per line, with 'prediction' and 'references'.")
    needs_references = bool(reference_metrics(keys))
    return [_line(row, f"{where}, line {number}", needs_references, "concept_coverage" in keys) for number, row in rows]


def reference_metrics(keys: Sequence[str]) -> list[str]:
    """Return the metrics that compare with references."""
    return [key for key in keys if key not in WITHOUT_REFERENCES]


def _line(row: dict[str, Any], where: str, needs_references: bool, needs_concepts: bool) -> Line:
    # a run's own evaluation.jsonl names its completions 'text'
    prediction = (
        row["text"] if "spans" in row and "prediction" not in row and "text" in row else _column(row, "prediction", where)
    )
    if not isinstance(prediction, str):
        raise DataError(f"{where}: 'prediction' is {_kind(prediction)}, but must be a string.")
    references = _texts(row, "references", where) if needs_references else ()
    concepts = _texts(row, "concepts", where) if needs_concepts else ()
    return Line(prediction, references, concepts)


def _column(row: dict[str, Any], name: str, where: str) -> Any:
    if name not in row:
        raise DataError(f"{where}: there is no '{name}'; it has {', '.join(sorted(map(repr, row))) or 'nothing'}.")
    return row[name]


def _texts(row: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """Return a column of texts; a single text counts as a list of one."""
    value: Any = _column(row, name, where)
    texts: Any = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: '{name}' is {_kind(value)}, but must be a list of strings.")
    if not texts or not all(text.strip() for text in texts):
        wrong = "is empty" if not texts else "has an empty string"
        raise DataError(f"{where}: '{name}' {wrong}: give at least one string, none of them empty, or remove the line.")
    return tuple(texts)


def _kind(value: Any) -> str:
    """Return the kind of a wrong value, in JSON's terms."""
    if isinstance(value, list):
        return "a list with other values"
    names = {str: "a text", bool: "true or false", int: "a number", float: "a number", dict: "an object", type(None): "null"}
    return names.get(type(value), "something else")


@dataclass(frozen=True)
class Scorers:
    """The tools of metrics; None for those that no requested metric needs."""

    tokenizer: captions.Tokenizer | None
    spice: captions.Spice | None
    rouge: rouge.Rouge | None
    bert_score: bertscore.BertScore | None


def build_scorers(keys: Sequence[str], options: Options) -> Scorers:
    """Build the tools of these metrics; raise `ConfigError` if anything is missing.

    That is Java, jars, a package or a model.
    """
    requested = set(keys)
    rouge_keys = [key for key in rouge.KEYS if key in requested]
    embeddings = requested.intersection(bertscore.KEYS)
    return Scorers(
        captions.shared_tokenizer() if requested & (ON_TOKENS | {"concept_coverage"}) else None,
        captions.Spice() if "spice" in requested else None,
        rouge.Rouge(options.stemming, rouge_keys, options.rouge_tokenizer) if rouge_keys else None,
        bertscore.BertScore(options.bertscore_model, options.bertscore_layers) if embeddings else None,
    )


def score(
    lines: Sequence[Line], keys: Sequence[str], options: Options, report: Callable[[str], None] = lambda line: None
) -> Scores:
    """Compute the requested metrics of all lines.

    Raises `ConfigError` for missing Java, jars, packages or models before any scoring.
    """
    texts = [line.prediction for line in lines]
    references = [line.references for line in lines]
    requested = set(keys)
    needed = build_scorers(keys, options)
    tokenizer, spice, bert_score = needed.tokenizer, needed.spice, needed.bert_score
    scores = Scores()

    def keep(key: str, per_line: Sequence[float], corpus: float | None = None) -> None:
        if key in requested:
            scores.per_line[key] = list(per_line)
            scores.corpus[key] = statistics.fmean(per_line) if corpus is None else corpus

    if tokenizer is not None and requested & ON_TOKENS:
        _on_tokens(tokenizer(texts), tokenizer.groups(references), requested, spice, keep, report)
    if "cider_d" in requested and len(lines) < FEW_DOCUMENTS:
        scores.warnings.append(
            f"CIDEr-D computes its document frequencies from the {len(lines)} scored lines; with fewer than {FEW_DOCUMENTS} it "
            "is unreliable."
        )
    if needed.rouge is not None:
        lost = rouge.count_lost(texts, references, options.rouge_tokenizer)
        if lost:
            scores.warnings.append(rouge.lost_sentence(lost, len(lines), f"set {ROUGE_OPTION}"))
        for key, values in needed.rouge(texts, references).items():
            keep(key, values)
    if bert_score is not None:
        num_truncated = bert_score.count_truncated([*texts, *(text for group in references for text in group)])
        if num_truncated:
            scores.warnings.append(f"BERTScore truncated {num_truncated} texts to its model's context.")
        for key, values in bert_score(texts, references).items():
            keep(key, values)
    for order, key in enumerate(GROUPS["distinct"], 1):
        if key in requested:
            scores.corpus[key] = distinct(texts, order)
    if "self_bleu" in requested:
        others = self_bleu(texts)
        scores.corpus["self_bleu"] = None
        if others is not None:
            keep("self_bleu", others)
    if tokenizer is not None and "concept_coverage" in requested:
        keep("concept_coverage", ConceptCoverage(tokenizer)(texts, [line.concepts for line in lines]))
    scores.corpus = {key: scores.corpus[key] for key in keys}
    return scores


def _on_tokens(
    texts: Sequence[str],
    references: captions.References,
    requested: set[str],
    spice: captions.Spice | None,
    keep: Callable[..., None],
    report: Callable[[str], None],
) -> None:
    """Compute the metrics on coco-caption's tokens."""
    if spice is not None:
        spice.check(texts, references)
    if requested.intersection(GROUPS["bleu"]):
        for key, corpus, per_line in zip(GROUPS["bleu"], *captions.bleu(texts, references)):
            keep(key, per_line, corpus)
    if "rouge_l" in requested:
        keep("rouge_l", captions.rouge_l(texts, references))
    if "cider_d" in requested:
        corpus, per_line = captions.cider_d(texts, references)
        keep("cider_d", per_line, corpus)
    if "meteor" in requested:
        corpus, per_line = captions.meteor(texts, references)
        keep("meteor", per_line, corpus)
    if spice is not None:
        keep("spice", spice(texts, references, lambda done, of: report(f"SPICE: {done:,} of {of:,} lines")))


def table(scores: Scores) -> list[list[str]]:
    """Return the rows of the printed table: key, scaled value, and scale or family."""
    rows: list[list[str]] = []
    for key, value in scores.corpus.items():
        scale = SCALES.get(key, 1)
        shown = "–" if value is None else f"{value * scale:.2f}" if scale > 1 else f"{value:.4f}"
        family = "caption tools" if key == "rouge_l" else "summarization tools" if key in rouge.KEYS else ""
        rows.append([key, shown, f"× {scale}" if scale > 1 else family])
    return rows


def document(source: str, scores: Scores, options: Options, lines: int) -> dict[str, Any]:
    """Return the JSON document of the results.

    It has the file, the numbers of the corpus and of each line in the file's order, the warnings,
    the options and the package versions.
    """
    return {
        "file": source,
        "lines": lines,
        "corpus": scores.corpus,
        "per_line": scores.per_line,
        "warnings": scores.warnings,
        "options": asdict(options),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
