"""Documents that are made from the code are current, and what the README names exists."""

import re
import runpy
from pathlib import Path

import rlgf

ROOT = Path(__file__).resolve().parents[1]
PROSE = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "bench" / "README.md",
    ROOT / "native" / "README.md", *sorted((ROOT / "docs").glob("*.md")),
    *(path for path in sorted((ROOT / "docs" / "results").rglob("*.md")) if path.name != "texts.md"),
]  # fmt: skip
WIDTH = 100


def wide_lines(text: str) -> list[int]:
    """Return the numbers of lines of prose over 100 columns; code, tables and addresses are exempt."""
    found: list[int] = []
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            is_code = not is_code
        elif not is_code and not line.startswith("    ") and not line.lstrip().startswith("|"):
            shown = re.sub(r"\]\([^)]*\)|https?://\S+", "", line)
            if len(shown) > WIDTH:
                found.append(number)
    return found


def test_the_reference_of_settings_is_current():
    assert runpy.run_path(str(ROOT / "docs" / "make.py"))["page"]() == (ROOT / "docs" / "config.md").read_text()


def test_the_reference_of_public_names_is_current():
    text = (ROOT / "docs" / "api.md").read_text()
    assert runpy.run_path(str(ROOT / "docs" / "make.py"))["api_page"]() == text
    assert set(re.findall(r"^### `rlgf\.(\w+)`$", text, re.MULTILINE)) == set(rlgf.__all__) - {"__version__"}
    assert text.count("```pycon\n>>> ") == len(rlgf.__all__) - 1


def test_links_in_the_documents_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_the_layers_of_the_architecture_name_every_file():
    package, text = ROOT / "src" / "rlgf", (ROOT / "docs" / "architecture.md").read_text()
    named: dict[str, set[str]] = {}
    for folder, files in re.findall(
        r"^\| `([\w/]+?)/?` \| (.*) \|$", text.partition("## Layers")[2].partition("\n## ")[0], re.MULTILINE
    ):
        named.setdefault("" if folder == "rlgf" else folder, set()).update(re.findall(r"`(\w+\.py)`", files))
    present: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"):
            present.setdefault(path.parent.relative_to(package).as_posix().removeprefix("."), set()).add(path.name)
    assert named == present


def test_the_prose_of_the_documents_is_at_most_100_columns_wide():
    wide = {str(path.relative_to(ROOT)): lines for path in PROSE if (lines := wide_lines(path.read_text()))}
    assert wide == {}


def test_wide_lines_are_found_in_prose_only():
    long = "word " * 21
    text = "\n".join([long, "```", long, "```", f"| {long} |", f"    {long}", f"[a link](https://{'x' * 100}).", "short"])
    assert wide_lines(text) == [1]


def test_the_sample_of_two_tokenizers_is_the_one_that_was_drawn():
    drawn = ROOT / "docs" / "images" / "two-tokenizers"
    text, page = drawn.with_suffix(".txt").read_text().strip(), (ROOT / "docs" / "guides.md").read_text()
    assert f"```\n{text}\n```" in page
    assert "[guide:" in text
    assert "[policy:" in text
    assert "url(http" not in drawn.with_suffix(".svg").read_text()  # nothing is fetched to show it
