"""Documents that are made from the code are current, and what the README names exists."""

import importlib.util
import re
import runpy
import tomllib
from html import unescape
from pathlib import Path

import yaml
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

import rlgf
from rlgf.config.base import flatten, to_dict
from rlgf.config.schema import Config

ROOT = Path(__file__).resolve().parents[1]
PROSE = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", ROOT / "CODE_OF_CONDUCT.md",
    ROOT / "bench" / "README.md", ROOT / "native" / "README.md", *sorted((ROOT / "docs").glob("*.md")),
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


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as the repository's viewer and the site make them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    found = [re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles]
    return {name for name in found if found.count(name) == 1}


def test_links_in_the_documents_lead_somewhere():
    for path in [*PROSE, *(ROOT / "docs" / "results").rglob("*.md")]:
        for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", path.read_text()):
            there = (path.parent / target).resolve() if target else path
            assert there.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(there), f"{path.name}: {target}#{anchor}"


def test_nothing_leads_out_of_the_repository():
    for path in PROSE:
        for target in re.findall(r"\]\(([^)#:\s]+)", path.read_text()):
            assert (path.parent / target).resolve().is_relative_to(ROOT), f"{path.name}: {target}"
        assert "../shared" not in path.read_text(), path.name


def test_every_page_is_on_the_site_and_no_other():
    named = set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    site = runpy.run_path(str(ROOT / "tools" / "site.py"))["OTHERS"] if importlib.util.find_spec("ziamath") else {}
    pages = {str(path.relative_to(ROOT / "docs")).replace("README.md", "index.md") for path in (ROOT / "docs").rglob("*.md")}
    tables = {
        page for page in pages if page.endswith(("table.md", "texts.md", "table-xeon.md"))
    }  # of a page that links to them
    others = {page for page in named if page not in pages}
    assert pages - tables <= named
    assert others == {"reference.md", *(site.values() or others - {"reference.md"})}


def test_the_readme_fits_a_screen_or_three():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100
    headings = [line.removeprefix("## ") for line in lines if line.startswith("## ")]
    assert headings == [
        "When guidance helps, and when it does not", "Install", "Use it from Python", "The quickstart", "Choosing an algorithm",
        "Using a GPU", "Read on",
    ]  # fmt: skip
    assert "make quickstart " in "\n".join(lines)
    assert "make test " in "\n".join(lines)


def test_the_readmes_table_is_the_committed_one():
    assert _table("quickstart") in (ROOT / "README.md").read_text()


def test_figures_of_the_results_page_are_those_of_the_tables():
    row = re.compile(r"^\| ([^|]+) \| (\d\.\d+) ± (\d\.\d+)", re.MULTILINE)
    page = (ROOT / "docs" / "results.md").read_text()
    found = {name: f"{mean[1:]} ± {sd[1:]}" for name, mean, sd in row.findall(_table("quickstart-seeds"))}
    for name in ("PPO++", "AggreVaTeD", "LOLS", "D2LOLS"):
        assert f"{name} {found[name]}" in page
    paper = (ROOT / "docs" / "paper.md").read_text()
    for name, mean, sd in row.findall(_table("imdb-small")):
        if name in ("PPO", "PPO++", "AggreVaTeD", "LOLS", "D2LOLS"):
            assert f"| {mean[1:]} ± {sd[1:]} |" in paper, name


def _table(name: str) -> str:
    """The first table of a comparison, on test prompts."""
    blocks = (ROOT / "docs" / "results" / name / "table.md").read_text().split("\n\n")
    return next(block for block in blocks if block.startswith("|"))


def test_the_page_of_algorithms_quotes_the_code():
    page = (ROOT / "docs" / "algorithms.md").read_text()
    code = (ROOT / "src" / "rlgf" / "algorithms" / "guided.py").read_text()
    quotes = [
        "phase = Phase(rollin=None, rollout=POLICY)", "phase = Phase(GUIDE, POLICY, self.beta, self.switch)",
        "phase = Phase(POLICY, GUIDE, self.beta, self.switch)", "PhaseWeight(0, 0.5, alpha, 1 - alpha)",
        "PhaseWeight(1, 0.5, alpha, 1 - alpha)", "_from_iteration(self.switch_iteration)",
    ]  # fmt: skip
    for quote in quotes:
        assert f"`{quote}`" in page
        assert quote in code


def test_metrics_of_the_troubleshooting_page_exist():
    page, known = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("troubleshooting", "metrics"))
    for row in re.findall(r"^\| (?!symptom|---).*$", page, re.MULTILINE):
        for name in re.findall(r"`([a-z][a-z0-9_]+)`", row.split(" | ")[1]):
            assert f"`{name}`" in known, name


def test_settings_that_the_pages_name_exist():
    known = set(flatten(to_dict(Config()))) | {"algorithm.options", "task.options"}
    sections = "|".join(sorted({key.partition(".")[0] for key in known if "." in key}))
    for name in ("README", "docs/troubleshooting", "docs/migrating", "docs/paper", "docs/algorithms", "docs/command-line"):
        for key in re.findall(rf"`((?:{sections})\.[a-z_0-9.]+)", (ROOT / f"{name}.md").read_text()):
            if key.startswith(("algorithm.options.", "task.options.")) or key in OF_OTHERS:
                continue
            assert key in known or any(known_key.startswith(f"{key}.") for known_key in known) or key in FREE, f"{name}: {key}"


OF_OTHERS = {"guide.md", "guide.json", "sampling.max_prompt_len", "sampling.max_gen_len", "sampling.train_generation_kwargs",
             "sampling.eval_generation_kwargs", "lora.peft_config", "policy.args.beta"}  # fmt: skip
FREE = {"reward.weights", "reward.options", "guide.options", "evaluation.metric_options", "evaluation.sampling"}


def test_pictures_are_those_that_the_masks_of_the_library_give():
    for name, drawn in runpy.run_path(str(ROOT / "docs" / "picture.py"))["pictures"]().items():
        assert (ROOT / "docs" / "images" / name).read_text() == drawn, name


def test_texts_of_the_pictures_fit_in_a_wide_font():
    """DejaVu Sans, which is wider than the fonts that the pictures ask for, replaces them where none is there."""
    for name, drawn in runpy.run_path(str(ROOT / "docs" / "picture.py"))["pictures"]().items():
        lines: dict[str, float] = {}  # the right end of the last text, by its height
        for x, y, kind, words in re.findall(r'<text x="([\d.]+)" y="([\d.]+)"(?: class="([\w ]+)")?[^>]*>(.*?)</text>', drawn):
            title = re.search(r'<tspan class="title">(.*?)</tspan>', words)
            rest = unescape(re.sub(r"<tspan.*?</tspan>", "", words))
            width = _width(rest, 14 if "small" in kind else 16) + (_width(title[1], 18, "bold") if title else 0)
            if "token" in kind:  # centered in a box
                continue
            assert float(x) >= lines.get(y, 0), f"{name}: {words}"
            lines[y] = float(x) + width
            assert lines[y] <= 800, f"{name}: {words}"


def _width(words: str, size: float, weight: str = "normal") -> float:
    return float(TextPath((0, 0), words, size=size, prop=FontProperties(family="DejaVu Sans", weight=weight)).get_extents().x1)


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert project["version"] == rlgf.__version__ == citation["version"]
    minors = sorted(int(line.rpartition(".")[2]) for line in project["classifiers"] if re.search(r":: 3\.\d+$", line))
    assert project["requires-python"] == f">=3.{minors[0]},<3.{minors[-1] + 1}"


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


def test_figures_of_the_papers_page_are_those_of_the_tldr_run():
    page, run = ((ROOT / "docs" / name).read_text() for name in ("paper.md", "results/tldr-small/table.md"))
    tables = page.partition("### Table 2, TL;DR")[2].partition("\n###")[0]
    ours: dict[str, list[list[str]]] = {}
    for name, *cells in (re.split(r" *\| *", row)[1:-1] for row in re.findall(r"^\| [^|\n]+ \|.*$", tables, re.MULTILINE)):
        ours.setdefault(name, []).append(cells[1::2])
    for name, *cells in (
        re.split(r" *\| *", row)[1:-1] for row in re.findall(r"^\| [^|\n]+ \|.*$", run.split("\n\n")[1], re.MULTILINE)
    ):
        if name == "guide":
            continue
        reward, _, rouge1, rouge2, rouge_l, _, perplexity, output_perplexity, _, win_rate, _ = cells
        found = ours["best of 8" if name == "SFT, best of 8" else name]
        mine = [cell for table in found for cell in table]
        for own, theirs in zip(mine, (reward, win_rate, rouge1, perplexity, output_perplexity, rouge2, rouge_l)):
            assert own.removeprefix("0") == theirs.removeprefix("0"), name
