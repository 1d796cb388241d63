"""Documents that are made from the code are current, and what the README names exists."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_reference_of_settings_is_current():
    assert runpy.run_path(str(ROOT / "docs" / "make.py"))["page"]() == (ROOT / "docs" / "config.md").read_text()


def test_links_in_the_documents_lead_somewhere():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
