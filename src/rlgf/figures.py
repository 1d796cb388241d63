"""The figures of a comparison: reward against texts used, and figures 3 to 5 of the paper (6 to 8 are texts: `report`).

Each is drawn from `results.json` alone, and only where it holds what the figure shows.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlgf.tables import COLUMNS, columns_of, metrics_of, splits_of

# Okabe and Ito's palette, told apart by people who see colours differently
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX"  # one fewer than colours, so that many rows are told apart
GREY = "#555555"

Results = Mapping[str, Any]
Row = Mapping[str, Any]


def curves(results: Results) -> Any | None:
    """Reward on validation prompts against texts used: the mean over seeds, and the band from the lowest to the highest."""
    rows = _watched(results)
    if not rows:
        return None
    quantity, levels = _quantity(results), _levels(results)
    figure, (axes,) = _figure(1)
    for number, row in enumerate(rows):
        points = [list(points) for points in zip(*row["curves"])]
        texts = [at[0]["texts"] for at in points]
        scores = [[point[quantity] for point in at] for at in points]
        before = row["texts_used"] - texts[-1]  # texts of a distillation
        texts = [before + count for count in texts]
        if before == 0 and "sft" in levels:  # everything else starts as the SFT model
            texts, scores = [0, *texts], [levels["sft"][quantity], *scores]
        colour, marker = _look(number)
        axes.plot(
            texts, [statistics.fmean(at) for at in scores], label=row["title"], color=colour, marker=marker, markersize=4,
            linewidth=max(1.2, 3.6 - 0.4 * number),  # what is drawn later is thinner, so that curves on each other are seen
            linestyle="--" if row["key"] not in ("ppo", "ppo_pp", "aggrevated", "lols", "d2lols") else "-",
        )  # fmt: skip
        axes.fill_between(texts, [min(at) for at in scores], [max(at) for at in scores], color=colour, alpha=0.12, lw=0)
    if "guide" in levels:
        level = statistics.fmean(levels["guide"][quantity])
        axes.axhline(level, color=GREY, linestyle=":", lw=1.2)
        axes.annotate("guide", (1.0, level), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                      textcoords="offset points", ha="right", fontsize=9, color=GREY)  # fmt: skip
    axes.set_xlabel("texts written in training")
    axes.set_ylabel(COLUMNS[quantity].title)
    axes.set_title(f"{results['recipe']}: validation prompts, {_seeds(results['seeds'])}")
    axes.legend(frameon=False, fontsize=9)
    return figure


def tradeoff(results: Results) -> Any | None:
    """Reward against perplexity and KL, a point for each evaluation during training: the paper's figure 3.

    A point is the mean over seeds. Both horizontal axes run to the left, so that what is good lies at the top right; the lines
    in dashes are the SFT model's.
    """
    rows, quantity, levels = _watched(results), _quantity(results), _levels(results)
    points = [point for row in rows for curve in row["curves"] for point in curve]
    costs = [cost for cost in ("kl", "perplexity") if any(_measured([point.get(cost)]) for point in points)]
    if not costs:
        return None
    figure, panels = _figure(len(costs))
    for axes, cost in zip(panels, costs):
        for number, row in enumerate(rows):
            points = [at for at in zip(*row["curves"]) if _measured([point.get(cost) for point in at])]
            colour, marker = _look(number)
            axes.plot(
                [statistics.fmean(point[cost] for point in at) for at in points],
                [statistics.fmean(point[quantity] for point in at) for at in points],
                label=row["title"], color=colour, marker=marker, markersize=6, lw=0.6, alpha=0.85,
            )  # fmt: skip
        if "sft" in levels and _measured(levels["sft"][cost]):
            axes.axhline(statistics.fmean(levels["sft"][quantity]), color=GREY, linestyle="--", lw=1)
            axes.axvline(statistics.fmean(levels["sft"][cost]), color=GREY, linestyle="--", lw=1)
        axes.invert_xaxis()
        axes.set_xlabel(f"{COLUMNS[cost].title} (lower is further right)")
        axes.set_ylabel(COLUMNS[quantity].title)
    _legend_below(figure, panels[0])
    figure.suptitle(f"{results['recipe']}: validation prompts, a point for each evaluation; dashes: SFT on test", fontsize=11)
    return figure


def difficulty(results: Results) -> Any | None:
    """CIDEr-D of easy and of hard prompts, a pair of bars for each policy: the paper's figure 4."""
    parts = ("cider_d_easy", "cider_d_hard")
    split = next((s for s in splits_of(results) if all(part in columns_of(results, s) for part in parts)), None)
    if split is None:
        return None
    rows = [
        row for row in results["rows"]
        if "varied" not in row and all(_measured(metrics_of(row, split).get(part, [])) for part in parts)
    ]  # fmt: skip
    figure, (axes,) = _figure(1)
    for offset, part, colour in zip((-0.2, 0.2), parts, COLOURS):
        values = [[(value or 0) * COLUMNS[part].scale for value in metrics_of(row, split)[part]] for row in rows]
        axes.bar(
            [place + offset for place in range(len(rows))], [statistics.fmean(v) for v in values], 0.4, color=colour,
            yerr=[statistics.pstdev(v) for v in values], capsize=3, label=part.removeprefix("cider_d_"),
        )  # fmt: skip
    axes.set_xticks(range(len(rows)), [row["title"] for row in rows], rotation=20, ha="right", fontsize=9)
    axes.set_ylabel(COLUMNS["cider_d"].title)
    axes.set_title(f"{results['recipe']}: {split} prompts by difficulty, {_spread(results)}")
    axes.legend(frameon=False, fontsize=9)
    return figure


def sensitivity(results: Results) -> Any | None:
    """Reward and perplexity while one setting varies and the others stay: the paper's figure 5. Made by `compare --vary`."""
    varied: Mapping[str, Any] = results.get("varied", {})
    if not varied:
        return None
    quantities = [_quantity(results), "perplexity"]
    trained = [row for row in results["rows"] if "algorithm" in row]
    quantities = [name for name in quantities if any(_measured(row["metrics"][name]) for row in trained)]
    figure, panels = _figure(len(quantities), len(varied))
    titles = {row["algorithm"]: row["title"] for row in trained if "varied" not in row}
    for place, (setting, base) in enumerate(varied.items()):
        values = sorted({base, *(row["varied"][setting] for row in results["rows"] if setting in row.get("varied", {}))})
        for panel, quantity in enumerate(quantities):
            axes = panels[place * len(quantities) + panel]
            for number, name in enumerate(titles):
                rows = {
                    row.get("varied", {}).get(setting, base): row
                    for row in trained
                    if row["algorithm"] == name and row.get("varied", {}).keys() <= {setting}
                    if _measured(row["metrics"][quantity])
                }
                known = [value for value in values if value in rows]
                measured = [rows[value]["metrics"][quantity] for value in known]
                colour, marker = _look(number)
                axes.errorbar(
                    [values.index(value) for value in known], [statistics.fmean(m) for m in measured],
                    yerr=[statistics.pstdev(m) for m in measured], capsize=3, color=colour, marker=marker, markersize=5, lw=1.4,
                    label=titles[name],
                )  # fmt: skip
            axes.set_xticks(range(len(values)), [str(value) for value in values])
            axes.set_xlabel(setting)
            axes.set_ylabel(COLUMNS[quantity].title)
    _legend_below(figure, panels[0])
    figure.suptitle(f"{results['recipe']}: test prompts, {_spread(results)}", fontsize=11)
    return figure


def _measured(values: Sequence[float | None]) -> bool:
    """Whether there are values, and all are numbers; what could not be measured is none, and null in a file."""
    return bool(values) and all(value is not None and math.isfinite(value) for value in values)


def _watched(results: Results) -> list[Row]:
    """The rows that were evaluated during training, but those of a varied setting."""
    return [row for row in results["rows"] if "varied" not in row and any(row["curves"])]


def _quantity(results: Results) -> str:
    return "pass_rate" if "pass_rate" in columns_of(results) else "score"


def _levels(results: Results) -> dict[str, Mapping[str, Sequence[float]]]:
    """What policies that are not trained here reach on the test split."""
    return {row["key"]: row["metrics"] for row in results["rows"] if not row["curves"]}


def _look(number: int) -> tuple[str, str]:
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]


def _figure(panels: int, rows: int = 1) -> tuple[Any, list[Any]]:
    """A figure with rows of panels side by side. Made without pyplot, which would keep it and ask for a screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if panels == 1 else 5 * panels, 4.8 if rows == 1 else 3.6 * rows), layout="constrained")
    found: list[Any] = list(figure.subplots(rows, panels, squeeze=False).flat)
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, found


def _legend_below(figure: Any, axes: Any) -> None:
    """One legend for all panels, outside them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _spread(results: Results) -> str:
    return "mean and sd over seeds" if len(results["seeds"]) > 1 else "one seed"


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seeds, band from lowest to highest" if len(seeds) > 1 else "one seed"


# file name → what draws it, or returns None where there is nothing to show
FIGURES: dict[str, Callable[[Results], Any | None]] = {
    "curves.png": curves, "tradeoff.png": tradeoff, "difficulty.png": difficulty, "sensitivity.png": sensitivity,
}  # fmt: skip


def draw(results: Results, out: Path) -> None:
    """Every figure that there is something to show in, as PNG files in a folder; others are removed."""
    for name, make in FIGURES.items():
        figure = make(results)
        if figure is None:
            (out / name).unlink(missing_ok=True)
            continue
        out.mkdir(parents=True, exist_ok=True)
        figure.savefig(out / name, dpi=130, metadata={"Software": None})
