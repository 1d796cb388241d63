"""The figures of a comparison: learning curves, and the paper's figures 3 to 5.

The paper's figures 6 to 8 are completions (`report`). Each figure is drawn from `results.json`
alone, and only if it has the data.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlgf.reports.tables import COLUMNS, columns_of, metrics_of, splits_of, start_of, title_of
from rlgf.untrusted_text import escape_control_characters, shorten

# Okabe and Ito's palette, distinguishable with color vision deficiency
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX"  # one fewer than colors, so that pairs repeat late
GRAY = "#555555"

Results = Mapping[str, Any]
Row = Mapping[str, Any]


def curves(results: Results) -> Any | None:
    """Plot the reward on validation prompts against completions used.

    A line is the mean over seeds, its band spans the lowest to the highest seed. Of a single run
    there is also the reward in training; dotted lines are the starting model and the guide on test.
    """
    rows = _trained_rows(results)
    training = [row for row in results["rows"] if row.get("training")]
    if not rows and not training:
        return None
    # training has rewards alone, so without validations the figure has them
    quantity, levels = _quantity(results) if rows else "score", _baselines(results)
    figure, (axes,) = _figure(1)
    for number, row in enumerate(rows):
        points = [list(points) for points in zip(*row["curves"])]
        texts = [at[0]["completions"] for at in points]
        scores = [[point[quantity] for point in at] for at in points]
        before = row["completions_used"] - texts[-1]  # completions of distillation
        texts = [before + count for count in texts]
        color, marker = _style(number)
        # Later lines are thinner, so that overlapping curves stay visible.
        axes.plot(
            texts, [statistics.fmean(at) for at in scores], label=_label(row["title"]), color=color, marker=marker,
            markersize=4, linewidth=max(1.2, 3.6 - 0.4 * number),
            linestyle="--" if row["key"] not in ("ppo", "ppo_pp", "aggrevated", "lols", "d2lols") else "-",
        )  # fmt: skip
        axes.fill_between(texts, [min(at) for at in scores], [max(at) for at in scores], color=color, alpha=0.12, lw=0)
    for row in training if quantity == "score" else ():
        points = row["training"]
        axes.plot([at["completions"] for at in points], [at["score"] for at in points], color=GRAY, lw=1, alpha=0.6,
                  label="in training (of policy and guide)", zorder=1)  # fmt: skip
    for key in ("sft", "guide"):
        if key not in levels or not _is_known(levels[key].get(quantity, [])):
            continue
        level, name = statistics.fmean(levels[key][quantity]), start_of(results) if key == "sft" else key
        axes.axhline(level, color=GRAY, linestyle=":", lw=1.2)
        axes.annotate(f"{name} (test)", (1.0, level), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                      textcoords="offset points", ha="right", fontsize=9, color=GRAY)  # fmt: skip
    axes.set_xlabel("completions generated in training")
    axes.set_ylabel(COLUMNS[quantity].title)
    axes.set_title(f"{_label(results['recipe'])}: validation prompts, {_seeds(results['seeds'])}")
    axes.legend(frameon=False, fontsize=9)
    return figure


def tradeoff(results: Results) -> Any | None:
    """Plot reward against perplexity and KL: the paper's figure 3.

    There is one point per evaluation during training, the mean over seeds. An arrow points in the
    direction of training; better points are at the top left. Dashed lines mark the starting model.
    """
    rows, quantity, levels = _trained_rows(results), _quantity(results), _baselines(results)
    points = [point for row in rows for curve in row["curves"] for point in curve]
    costs = [cost for cost in ("kl", "perplexity") if any(_is_known([point.get(cost)]) for point in points)]
    if not costs:
        return None
    figure, panels = _figure(len(costs))
    for axes, cost in zip(panels, costs):
        for number, row in enumerate(rows):
            points = [at for at in zip(*row["curves"]) if _is_known([point.get(cost) for point in at])]
            color, marker = _style(number)
            costs_at = [statistics.fmean(point[cost] for point in at) for at in points]
            scores_at = [statistics.fmean(point[quantity] for point in at) for at in points]
            axes.plot(
                costs_at, scores_at, label=_label(row["title"]), color=color, marker=marker, markersize=6, lw=0.6, alpha=0.85
            )
            for before, after in zip(zip(costs_at, scores_at), zip(costs_at[1:], scores_at[1:])):
                arrow = {"arrowstyle": "-|>", "color": color, "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
                axes.annotate("", xy=after, xytext=before, arrowprops=arrow)
        if "sft" in levels and _is_known(levels["sft"].get(cost, [])):
            axes.axhline(statistics.fmean(levels["sft"][quantity]), color=GRAY, linestyle="--", lw=1)
            axes.axvline(statistics.fmean(levels["sft"][cost]), color=GRAY, linestyle="--", lw=1)
        axes.set_xlabel(title_of(results, cost))
        axes.set_ylabel(COLUMNS[quantity].title)
    _legend_below(figure, panels[0])
    figure.suptitle(
        f"{_label(results['recipe'])}: validation prompts, a point for each evaluation; dashes: {start_of(results)} on test",
        fontsize=11,
    )
    return figure


def difficulty(results: Results) -> Any | None:
    """Plot CIDEr-D of easy and hard prompts: the paper's figure 4.

    There is one pair of bars per policy.
    """
    parts = ("cider_d_easy", "cider_d_hard")
    split = next((s for s in splits_of(results) if all(part in columns_of(results, s) for part in parts)), None)
    if split is None:
        return None
    rows = [
        row for row in results["rows"]
        if "varied" not in row and all(_is_known(metrics_of(row, split).get(part, [])) for part in parts)
    ]  # fmt: skip
    figure, (axes,) = _figure(1)
    for offset, part, color in zip((-0.2, 0.2), parts, COLORS):
        values = [[(value or 0) * COLUMNS[part].scale for value in metrics_of(row, split)[part]] for row in rows]
        axes.bar(
            [place + offset for place in range(len(rows))], [statistics.fmean(v) for v in values], 0.4, color=color,
            yerr=[statistics.pstdev(v) for v in values], capsize=3, label=part.removeprefix("cider_d_"),
        )  # fmt: skip
    axes.set_xticks(range(len(rows)), [_label(row["title"]) for row in rows], rotation=20, ha="right", fontsize=9)
    axes.set_ylabel(COLUMNS["cider_d"].title)
    axes.set_title(f"{_label(results['recipe'])}: {_label(split)} prompts by difficulty, {_spread(results)}")
    axes.legend(frameon=False, fontsize=9)
    return figure


def sensitivity(results: Results) -> Any | None:
    """Plot reward and perplexity against one varied setting: the paper's figure 5.

    The other settings are fixed. The data comes from `compare --vary`.
    """
    varied: Mapping[str, Any] = results.get("varied", {})
    if not varied:
        return None
    quantities = [_quantity(results), "perplexity"]
    trained = [row for row in results["rows"] if "algorithm" in row]
    quantities = [name for name in quantities if any(_is_known(row["metrics"][name]) for row in trained)]
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
                    if _is_known(row["metrics"][quantity])
                }
                known = [value for value in values if value in rows]
                values_at = [rows[value]["metrics"][quantity] for value in known]
                color, marker = _style(number)
                axes.errorbar(
                    [values.index(value) for value in known], [statistics.fmean(m) for m in values_at],
                    yerr=[statistics.pstdev(m) for m in values_at], capsize=3, color=color, marker=marker, markersize=5, lw=1.4,
                    label=_label(titles[name]),
                )  # fmt: skip
            axes.set_xticks(range(len(values)), [str(value) for value in values])
            axes.set_xlabel(_label(setting))
            axes.set_ylabel(COLUMNS[quantity].title)
    _legend_below(figure, panels[0])
    figure.suptitle(f"{_label(results['recipe'])}: test prompts, {_spread(results)}", fontsize=11)
    return figure


def _is_known(values: Sequence[float | None]) -> bool:
    """Return whether there are values and all are finite numbers.

    A value that could not be computed is None, and null in a file.
    """
    return bool(values) and all(value is not None and math.isfinite(value) for value in values)


def _trained_rows(results: Results) -> list[Row]:
    """Return the rows evaluated during training, without those of a varied setting."""
    return [row for row in results["rows"] if "varied" not in row and any(row["curves"])]


def _quantity(results: Results) -> str:
    return "pass_rate" if "pass_rate" in columns_of(results) else "score"


def _baselines(results: Results) -> dict[str, Mapping[str, Sequence[float]]]:
    """Return the test metrics of the policies that are not trained here."""
    return {row["key"]: row["metrics"] for row in results["rows"] if not row["curves"]}


def _style(number: int) -> tuple[str, str]:
    return COLORS[number % len(COLORS)], MARKERS[number % len(MARKERS)]


def _figure(panels: int, rows: int = 1) -> tuple[Any, list[Any]]:
    """Return a figure and its panels, `rows` rows of `panels` each.

    It is created without pyplot, which would keep it in memory and need a display.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8 if panels == 1 else 5 * panels, 4.8 if rows == 1 else 3.6 * rows), layout="constrained")
    found: list[Any] = list(figure.subplots(rows, panels, squeeze=False).flat)
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
    return figure, found


def _legend_below(figure: Any, axes: Any) -> None:
    """Add one legend for all panels, below them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def _label(text: str) -> str:
    """Return a nonempty label for a figure: short, on one line, without formulas.

    Matplotlib leaves out the labels of a legend that begin with an underscore.
    """
    shown = shorten(escape_control_characters(text), 60).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _spread(results: Results) -> str:
    return "mean and sd over seeds" if len(results["seeds"]) > 1 else "one seed"


def _seeds(seeds: Sequence[int]) -> str:
    return f"{len(seeds)} seeds, band from lowest to highest" if len(seeds) > 1 else "one seed"


# file name → function that draws it, or returns None if there is no data
FIGURES: dict[str, Callable[[Results], Any | None]] = {
    "curves.png": curves, "tradeoff.png": tradeoff, "difficulty.png": difficulty, "sensitivity.png": sensitivity,
}  # fmt: skip


def draw(results: Results, out: Path) -> None:
    """Write the figures that have data as PNG files to a folder; remove the others."""
    for name, make in FIGURES.items():
        figure = make(results)
        if figure is None:
            (out / name).unlink(missing_ok=True)
            continue
        out.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():  # of characters that the font lacks: they become boxes
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
            figure.savefig(out / name, dpi=130, metadata={"Software": None})
