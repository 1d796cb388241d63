"""What a comparison leaves for people: its tables, its figures, and texts of all its policies side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlgf import figures
from rlgf.data import write_atomically
from rlgf.display import visible
from rlgf.tables import markdown


def write_report(results: Mapping[str, Any], out: Path) -> list[str]:
    """`table.md`, `texts.md` and the figures that there is something to show in; the names of what was written."""
    write_atomically(out / "table.md", markdown(results))
    if texts := side_by_side(results):
        write_atomically(out / "texts.md", texts)
    else:
        (out / "texts.md").unlink(missing_ok=True)
    figures.draw(results, out)
    return written_in(out)


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
    for place, first in enumerate(rows[0]["examples"]):
        lines += ["", "---", "", f"    {'prompt':{wide}}           {visible(first['prompt'])}"]
        for row in rows:
            example = row["examples"][place]
            lines.append(f"    {row['title']:{wide}}  {example['score']:7.3f}  {visible(example['text'])}")
    return "\n".join([*lines, ""])
