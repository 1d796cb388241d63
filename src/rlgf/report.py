"""Tables and plots of a comparison."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlgf.data import write_atomically

COLUMNS = {
    "pass_rate": ("pass rate", 3),
    "score": ("reward", 3),
    "score_continuation": ("reward, continuation alone", 3),
    "kl": ("KL to SFT", 1),
    "perplexity": ("perplexity", 1),
    "output_perplexity": ("output-perplexity", 1),
    "distinct_2": ("distinct-2", 3),
    "win_rate": ("win rate", 3),
}
# Okabe and Ito's palette, told apart by people who see colours differently
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"


def mean_and_spread(values: Sequence[float | None], digits: int) -> str:
    """'mean ± population sd' of what was measured; a dash where nothing was."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return f"{mean} ± {statistics.pstdev(known):.{digits}f}" if len(known) > 1 else mean


def columns_of(results: Mapping[str, Any]) -> list[str]:
    """The columns that some row has; a pass/fail reward is not shown twice."""
    found = [name for name in COLUMNS if any(name in row["metrics"] for row in results["rows"])]
    return [name for name in found if not (name == "score" and "pass_rate" in found)]


def table_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the comparison's table."""
    names = columns_of(results)
    headings = ["", *(COLUMNS[name][0] for name in names), "texts used"]
    rows = [
        [
            row["title"],
            *(mean_and_spread(row["metrics"].get(name, []), COLUMNS[name][1]) for name in names),
            f"{row['texts_used']:,}",
        ]
        for row in results["rows"]
    ]
    return headings, rows


def markdown(results: Mapping[str, Any]) -> str:
    """The table with what it was measured on."""
    headings, rows = table_rows(results)
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    seeds, machine = results["seeds"], results["machine"]
    spread = f"mean ± population sd over seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    decodings = sorted({f"{row['title']}: {row['decoding']}" for row in results["rows"]})
    lines += [
        "",
        f"Recipe `{results['recipe']}`; {spread}; {results['evaluation_prompts']} held-out prompts for each figure. "
        "KL is exact: summed over every state of a text and the whole vocabulary, averaged over texts. "
        "Texts used: written in training, guide texts of a distillation included.",
        "",
        f"Sampling: {'; '.join(decodings)}." + judged(results),
        "",
        f"Machine: {machine['processor']}, {machine['cpu_capability']}, {machine['threads']} threads, {machine['device']}; "
        f"Python {machine['python']}, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"rlgf {machine['rlgf']}.",
        "",
    ]
    return "\n".join(lines)


def judged(results: Mapping[str, Any]) -> str:
    """Who compared texts with references, and what could not be read of the answers."""
    if "judge" not in results:
        return ""
    values = [value or 0 for row in results["rows"] for value in row["metrics"].get("unparseable", [])]
    return (
        f" Win rate: against the dataset's references, ties half, by {results['judge']}; "
        f"{sum(values):.0f} answers could not be read and are left out."
    )


def write_report(results: Mapping[str, Any], out: Path) -> None:
    """`table.md` and `curves.png`."""
    write_atomically(out / "table.md", markdown(results))
    plot_curves(results, out / "curves.png")


def plot_curves(results: Mapping[str, Any], path: Path) -> None:
    """Reward on validation prompts against texts used: the mean over seeds, and the band from the lowest to the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    quantity = "pass_rate" if "pass_rate" in columns_of(results) else "score"
    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    levels = {row["key"]: row["metrics"][quantity] for row in results["rows"] if not row["curves"]}
    number = 0
    for row in results["rows"]:
        if not any(row["curves"]):
            continue
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        number += 1
        points = [list(points) for points in zip(*row["curves"])]
        texts = [at[0]["texts"] for at in points]
        scores = [[point[quantity] for point in at] for at in points]
        before = row["texts_used"] - texts[-1]  # texts of a distillation
        texts = [before + count for count in texts]
        if before == 0 and levels.get("sft"):  # everything else starts as the SFT model
            texts, scores = [0, *texts], [levels["sft"], *scores]
        axes.plot(
            texts, [statistics.fmean(at) for at in scores], label=row["title"], color=colour, marker=marker, markersize=4,
            linestyle="--" if row["key"] not in ("ppo", "ppo_pp", "aggrevated", "lols", "d2lols") else "-",
        )  # fmt: skip
        axes.fill_between(texts, [min(at) for at in scores], [max(at) for at in scores], color=colour, alpha=0.12, lw=0)
    if "guide" in levels:
        level = statistics.fmean(levels["guide"])
        axes.axhline(level, color="#555555", linestyle=":", lw=1.2)
        axes.annotate("guide", (1.0, level), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                      textcoords="offset points", ha="right", fontsize=9, color="#555555")  # fmt: skip
    axes.set_xlabel("texts written in training")
    axes.set_ylabel("pass rate" if quantity == "pass_rate" else "reward")
    axes.set_title(f"{results['recipe']}: validation prompts, {len(results['seeds'])} seed(s), band from lowest to highest")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
