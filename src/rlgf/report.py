"""What a comparison leaves for people: its tables, its figures, and texts of all its policies side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlgf import figures
from rlgf.data import write_atomically
from rlgf.display import visible
from rlgf.tables import markdown


def write_report(results: Mapping[str, Any], out: Path) -> None:
    """`table.md`, `texts.md` and the figures that there is something to show in; `results` as `results.json` has them."""
    write_atomically(out / "table.md", markdown(results))
    if texts := side_by_side(results):
        write_atomically(out / "texts.md", texts)
    else:
        (out / "texts.md").unlink(missing_ok=True)
    figures.draw(results, out)


def written_in(out: Path) -> list[str]:
    """Which files of a report a folder has."""
    return [name for name in ("table.md", "texts.md", *figures.FIGURES) if (out / name).is_file()]


def side_by_side(results: Mapping[str, Any]) -> str | None:
    """The first prompts of the test split, each with every policy's text and its reward: the paper's figures 6 to 8.

    Texts stand in indented blocks, a line each, where Markdown and HTML mean nothing.
    """
    rows = [row for row in results["rows"] if row.get("examples")]
    if not rows:
        return None
    wide = max(len("prompt"), *(len(row["title"]) for row in rows))
    lines = [
        f"Recipe `{results['recipe']}`, seed {results['seeds'][0]}: the first prompts of the final evaluation, with rewards."
    ]
    written = [(row["title"], {example["prompt"]: example for example in row["examples"]}) for row in rows]
    for prompt in dict.fromkeys(example["prompt"] for row in rows for example in row["examples"]):
        lines += ["", "---", "", f"    {'prompt':{wide}}           {visible(prompt)}"]
        for title, texts in written:
            if example := texts.get(prompt):  # a guide may have given up on one
                lines.append(f"    {title:{wide}}  {example['score']:7.3f}  {visible(example['text'])}")
    return "\n".join([*lines, ""])
