"""The tables of a comparison: one row per policy, one column per metric."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlgf.evaluation.intervals import FEW, interval_in, show_interval
from rlgf.untrusted_text import as_code, escape_markdown


@dataclass(frozen=True)
class Column:
    """The display of a metric: heading, digits, and scale as usual in the field."""

    title: str
    digits: int
    scale: float = 1.0


COLUMNS = {
    "pass_rate": Column("pass rate", 3),
    # the training objective; `score` uses the evaluation's sampling parameters
    "score_sampled": Column("reward, sampled", 3),
    "score": Column("reward", 3),
    "score_continuation": Column("reward, continuation only", 3),
    "score_minus_reference": Column("reward − reference's", 3),
    **{f"bleu_{order}": Column(f"BLEU-{order}", 2, 100) for order in (1, 2, 3, 4)},
    "cider_d": Column("CIDEr-D", 2, 10),
    "cider_d_easy": Column("CIDEr-D, easy", 2, 10),
    "cider_d_hard": Column("CIDEr-D, hard", 2, 10),
    "spice": Column("SPICE", 2, 100),
    "meteor": Column("METEOR", 3),
    "rouge1": Column("ROUGE-1", 3),
    "rouge2": Column("ROUGE-2", 3),
    "rougeL": Column("ROUGE-L", 3),
    "rougeLsum": Column("ROUGE-Lsum", 3),
    "rouge_l": Column("ROUGE-L, captions", 3),
    **{f"bertscore_{part}": Column(f"BERTScore {part}", 3) for part in ("precision", "recall", "f1")},
    "concept_coverage": Column("coverage", 3),
    "kl": Column("KL to SFT", 1),
    "perplexity": Column("perplexity", 1),
    "output_perplexity": Column("output-perplexity", 1),
    **{f"distinct_{length}": Column(f"distinct-{length}", 3) for length in (1, 2, 3)},
    "self_bleu": Column("self-BLEU", 3),
    "win_rate": Column("win rate", 3),
}


LAST_EVALUATION = "validation, at the last evaluation in training"
"""The split of the pictures: the table of it has the numbers at the end of their lines."""


def title_of(results: Mapping[str, Any], name: str) -> str:
    """Return the heading of a metric; the KL is to the starting model."""
    return COLUMNS[name].title if name != "kl" else f"KL to {start_of(results)}"


def start_of(results: Mapping[str, Any]) -> str:
    """Return the title of the starting model: 'SFT', or 'start' without SFT."""
    return next((row["title"] for row in results["rows"] if row.get("key") == "sft"), "SFT")


def mean_and_spread(values: Sequence[float | None], digits: int, scale: float = 1.0) -> str:
    """Return 'mean ± population sd' of the known values, or a dash."""
    known = [value * scale for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return f"{mean} ± {statistics.pstdev(known):.{digits}f}" if len(known) > 1 else mean


def cell(metrics: Mapping[str, list[float | None]], name: str) -> str:
    """Return a metric as a cell of the table, over few prompts with its interval.

    That is the interval of the mean over all seeds, whose errors are independent.
    """
    column = COLUMNS[name]
    shown = mean_and_spread(metrics.get(name, []), column.digits, column.scale)
    seeds = [
        {key: values[seed] for key, values in metrics.items() if seed < len(values) and values[seed] is not None}
        for seed in range(len(metrics.get(name, [])))
    ]
    found = [interval_in(name, {key: float(value or 0) for key, value in seed.items()}) for seed in seeds]
    known = [interval for interval in found if interval is not None]
    if not known or len(known) < len(found):
        return shown
    mean = statistics.fmean(float(seed[name] or 0) for seed in seeds)
    below, above = (
        sum((float(seed[name] or 0) - interval[side]) ** 2 for seed, interval in zip(seeds, known)) ** 0.5 / len(known)
        for side in (0, 1)
    )
    return shown + show_interval((mean - below, mean + above), f".{column.digits}f", column.scale)


def metrics_of(row: Mapping[str, Any], split: str) -> Mapping[str, list[float | None]]:
    """Return a row's metrics on a split, one value per seed."""
    if split == LAST_EVALUATION:
        curves = [curve for curve in row.get("curves", []) if curve]
        names = {name: None for curve in curves for name in curve[-1] if name not in ("completions", "iteration")}
        return {name: [curve[-1].get(name) for curve in curves] for name in names}
    return row["metrics"] if split == "test" else row.get("splits", {}).get(split, {})


def splits_of(results: Mapping[str, Any]) -> list[str]:
    """Return the evaluated splits, 'test' first."""
    extra = dict.fromkeys(split for row in results["rows"] for split in row.get("splits", {}))
    drawn = any(curve for row in results["rows"] for curve in row.get("curves", []))
    return ["test", *extra, *([LAST_EVALUATION] if drawn else [])]


def columns_of(results: Mapping[str, Any], split: str = "test") -> list[str]:
    """Return the columns that any row has.

    The score of a pass/fail reward is omitted, as is a group that is the whole split.
    """
    found = [name for name in COLUMNS if any(name in metrics_of(row, split) for row in results["rows"])]
    found = [name for name in found if not (name == "score" and "pass_rate" in found)]
    alone = [name for name in found if name.startswith("cider_d_")]
    return [name for name in found if not (name in alone and len(alone) == 1)]


def table_rows(results: Mapping[str, Any], split: str = "test") -> tuple[list[str], list[list[str]]]:
    """Return the headings and cells of the comparison's table for a split."""
    names = columns_of(results, split)
    headings = ["", *(title_of(results, name) for name in names), "completions used"]
    rows: list[list[str]] = []
    for row in results["rows"]:
        metrics = metrics_of(row, split)
        if split == LAST_EVALUATION and not metrics:
            continue
        cells = [cell(metrics, name) for name in names]
        rows.append([row["title"], *cells, f"{row['completions_used']:,}"])
    return headings, rows


def markdown(results: Mapping[str, Any]) -> str:
    """Return the tables in Markdown, with the conditions they were measured under."""
    lines: list[str] = []
    splits = splits_of(results)
    for split in splits:
        headings, rows = table_rows(results, split)
        lines += [f"**{escape_markdown(split).strip() or '–'}**", ""] if len(splits) > 1 else []
        lines += ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
        lines += [*("| " + " | ".join(map(escape_markdown, row)) + " |" for row in rows), ""]
    seeds, machine = results["seeds"], results["machine"]
    spread = f"mean ± population sd over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    decodings = sorted({escape_markdown(f"{row['title']}: {row['sampling']}") for row in results["rows"]})
    texts = {split: next(iter(metrics_of(results["rows"][-1], split).get("completions", [None]))) for split in splits}
    few = any(count and count < FEW for count in texts.values())
    counted = [f"{count:,.0f} prompts of {escape_markdown(split)}" for split, count in texts.items() if count]
    notes = [
        f"Recipe {as_code(results['recipe'])}; {spread}; {' and '.join(counted)} for each figure. "
        "KL is exact: summed over every state of a completion and the whole vocabulary, averaged over completions. "
        + (f"In brackets: the 95 % interval over prompts, as there are fewer than {FEW}. " if few else "")
        + "Completions used: those of training, and those of a distillation.",
        f"Sampling: {'; '.join(decodings)}." + judge_note(results),
        escape_markdown(
            f"Machine: {machine['processor']}, {machine['cpu_capability']}, {machine['threads']} threads, {machine['device']}; "
            f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}, "
            f"rlgf {machine['rlgf']}."
        ),
    ]
    for note in notes:
        lines += [*textwrap.wrap(note, 100, break_long_words=False, break_on_hyphens=False), ""]
    return "\n".join(lines)


def judge_note(results: Mapping[str, Any]) -> str:
    """Return sentences on the output-perplexity model and the judge.

    The latter includes the number of responses that could not be parsed.
    """
    general = results.get("output_perplexity_model")
    under = f" Output-perplexity: under the model before SFT, {escape_markdown(general)}." if general else ""
    if "judge" not in results:
        return under
    values = [value or 0 for row in results["rows"] for value in row["metrics"].get("unparseable", [])]
    refused = sum(value or 0 for row in results["rows"] for value in row["metrics"].get("judge_refused", []))
    return under + (
        f" Win rate: against the dataset's references, ties half, by {escape_markdown(results['judge'])}; "
        f"{sum(values):.0f} unparseable responses are dropped"
        + (f", and {refused:.0f} questions that the judge refused." if refused else ".")
    )
