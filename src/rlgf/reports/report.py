"""The report of a comparison or of a run: tables, figures, completions side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlgf.data.files import read_json, write_file
from rlgf.evaluation.intervals import FEW, mean_interval, share_interval
from rlgf.reports import figures
from rlgf.reports.tables import markdown
from rlgf.runs.logs import read_rows
from rlgf.untrusted_text import as_code, escape_control_characters


def write_report(results: Mapping[str, Any], out: Path) -> None:
    """Write `table.md`, `texts.md` and the figures that have data.

    `results` is the content of `results.json`.
    """
    write_file(out / "table.md", markdown(results))
    if texts := side_by_side(results):
        write_file(out / "texts.md", texts)
    else:
        (out / "texts.md").unlink(missing_ok=True)
    figures.draw(results, out)


def write_run_report(run: Path, out: Path | None = None) -> list[str]:
    """Write the report of a single finished run, and return the names of its files.

    It is drawn from `results.json` and `metrics.jsonl`.
    """
    target = out or run
    path = run / "metrics.jsonl"
    metrics = read_rows(path, lambda line: None) if path.is_file() else []
    write_report(results_of_run(read_json(run / "results.json"), metrics), target)
    return report_files(target)


def finish_report(run: Path, results: Mapping[str, Any]) -> list[str]:
    """Write the report of a finished run, and return the last lines of its progress."""
    shown = ", ".join(["policy/", "results.json", "metrics.jsonl", *write_run_report(run)])
    return [*summary_lines(results), f"{run}: {shown}; see completions with `rlgf samples {run}`"]


def summary_lines(results: Mapping[str, Any]) -> list[str]:
    """Return the reward before and after training, and the guide's, with 95 % intervals.

    A second line is a warning that the prompts are few.
    """
    after, baselines = results["evaluation"], results.get("baselines", {})
    name = "pass_rate" if "pass_rate" in after else "score"
    count = int(after["completions"])

    def shown(metrics: Mapping[str, Any]) -> str:
        value, size = metrics[name], int(metrics["completions"])
        if value is None:  # not finite, so null in the file
            return "–"
        low, high = (
            share_interval(value, size) if name == "pass_rate" else mean_interval(value, metrics["score_standard_error"], size)
        )
        return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if size > 1 else "")

    start = f"{baselines['sft']['title']} {shown(baselines['sft'])} → " if "sft" in baselines else ""
    guide = f"; guide {shown(baselines['guide'])}" if "guide" in baselines else ""
    title = "pass rate" if name == "pass_rate" else "reward"
    line = f"{title} on {count:,} test prompts: {start}{results['title']} {shown(after)}{guide} (95 % intervals)"
    few = (
        f"warning: {count} test prompts are few, and the intervals wide: give more rows (or a larger "
        "evaluation.final_prompts, if there are more)"
    )
    return [line, few] if count < FEW else [line]


def results_of_run(results: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the results of a single run in the form of a comparison's."""
    rows: list[dict[str, Any]] = []
    for key, found in results.get("baselines", {}).items():
        numbers = {name: [value] for name, value in found.items() if name != "title"}
        numbers |= {"kl": [0.0]} if key == "sft" else {}
        sampling = results["sampling"] if key == "sft" else "its own"
        rows.append(_run_row(key, found["title"], sampling, 0, numbers))
    own = {name: [value] for name, value in results["evaluation"].items()}
    curve = [
        {**row["evaluation"], "iteration": row["iteration"] + 1, "completions": row["completions"]}
        for row in metrics
        if "evaluation" in row
    ]
    last = _run_row(results["algorithm"], results["title"], results["sampling"], results["completions_used"], own)
    splits = {
        split: {name: [value] for name, value in found.items()} for split, found in results.get("evaluations", {}).items()
    }
    last |= {
        "curves": [curve], "splits": splits, "examples": results.get("examples", []),
        "training": [{"completions": row["completions"], "score": row["score"]} for row in metrics],
    }  # fmt: skip
    shared = {key: results[key] for key in ("recipe", "machine", "judge", "output_perplexity_model") if key in results}
    return {**shared, "seeds": [results["seed"]], "rows": [*rows, last]}


def _run_row(key: str, title: str, sampling: str, used: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "key": key, "title": title, "sampling": sampling, "completions_used": used, "metrics": dict(metrics), "curves": [],
    }  # fmt: skip


def report_files(out: Path) -> list[str]:
    """Return the names of the report's files in a folder."""
    return [name for name in ("table.md", "texts.md", *figures.FIGURES) if (out / name).is_file()]


def side_by_side(results: Mapping[str, Any]) -> str | None:
    """Return each policy's completions of the first test prompts, with rewards.

    These are the paper's figures 6 to 8. Each completion is one line of an indented block, in which
    Markdown and HTML have no effect. None if there are no examples.
    """
    rows = [row for row in results["rows"] if row.get("examples")]
    if not rows:
        return None
    titles = [escape_control_characters(row["title"]) for row in rows]
    wide = max(map(len, ["prompt", *titles]))
    lines = [
        f"Recipe {as_code(results['recipe'])}, seed {results['seeds'][0]}: the first prompts of the final evaluation, with "
        "rewards."
    ]
    completions = [(title, {example["prompt"]: example for example in row["examples"]}) for title, row in zip(titles, rows)]
    for prompt in dict.fromkeys(example["prompt"] for row in rows for example in row["examples"]):
        lines += ["", "---", "", f"    {'prompt':{wide}}           {escape_control_characters(prompt)}"]
        for title, texts in completions:
            if example := texts.get(prompt):  # a guide may have failed on a prompt
                lines.append(f"    {title:{wide}}  {example['score']:7.3f}  {escape_control_characters(example['text'])}")
    return "\n".join([*lines, ""])
