"""Documents that are made from the code are current, and what the README names exists."""

import re
import runpy
from pathlib import Path

import rlgf

ROOT = Path(__file__).resolve().parents[1]


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


def test_the_sample_of_two_tokenizers_is_the_one_that_was_drawn():
    drawn = ROOT / "docs" / "images" / "two-tokenizers"
    text, page = drawn.with_suffix(".txt").read_text().strip(), (ROOT / "docs" / "guides.md").read_text()
    assert f"```\n{text}\n```" in page
    assert "[guide:" in text
    assert "[policy:" in text
    assert "url(http" not in drawn.with_suffix(".svg").read_text()  # nothing is fetched to show it
