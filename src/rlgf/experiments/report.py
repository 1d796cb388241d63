"""The report of a comparison: tables, figures, and completions of all policies side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlgf.data.files import write_file
from rlgf.experiments import figures
from rlgf.experiments.tables import markdown
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
