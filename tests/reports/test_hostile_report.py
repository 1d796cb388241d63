"""Hostile texts in the report of a comparison: its tables, completions, figures and JSON."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from helpers import in_turn
from hostile import CONCENTRATE, HOSTILE, is_clean
from rlgf.cli import app
from rlgf.data.files import read_json, write_json
from rlgf.reports import figures
from rlgf.reports.report import side_by_side, write_report
from rlgf.reports.tables import markdown
from rlgf.untrusted_text import escape_control_characters

PAGE = MarkdownIt("commonmark", {"html": True}).enable("table")
MACHINE = dict.fromkeys(("processor", "cpu_capability", "threads", "device", "python", "torch", "transformers", "rlgf"), "x")


def results(titles: list[str], recipe: str = "r", **more: Any) -> dict[str, Any]:
    metrics = {
        "score": [0.5],
        "kl": [0.1],
        "perplexity": [9.0],
        "completions": [4.0],
        "cider_d_easy": [0.1],
        "cider_d_hard": [0.2],
    }
    point = {"score": 0.5, "kl": 0.1, "perplexity": 9.0, "completions": 8, "iteration": 1}
    rows = [
        {"key": f"row{number}", "title": title, "sampling": title, "completions_used": 8, "metrics": metrics,
         "splits": {title or "empty": metrics}, "curves": [[point]], "algorithm": "ppo",
         "examples": [{"prompt": title, "text": title, "score": 0.5}]}
        for number, title in enumerate(titles)
    ]  # fmt: skip
    return {
        "format_version": 1, "recipe": recipe, "seeds": [0], "task": recipe, "evaluation_prompts": 4, "rows": rows,
        "machine": MACHINE, "judge": recipe, "output_perplexity_model": recipe, **more,
    }  # fmt: skip


@in_turn(text=HOSTILE)
def test_a_table_shows_every_title_in_its_cell_and_nothing_else(text: str) -> None:
    page = markdown(results(["first", text, "last"], recipe=text))
    assert is_clean(page)
    tokens = PAGE.parse(page)
    assert not [token.type for token in tokens if token.type in ("html_block", "heading_open", "list_item_open", "hr", "fence")]
    inline = [child.type for token in tokens for child in token.children or []]
    assert set(inline) <= {"text", "text_special", "softbreak", "code_inline", "strong_open", "strong_close"}
    rows = [token for token in tokens if token.type == "tr_open"]
    first = [
        "".join(child.content for child in tokens[place + 2].children or [])
        for place, token in enumerate(tokens)
        if token in rows
    ]
    titles = first[1:4]  # of the first split, after its headings
    assert titles == ["first", escape_control_characters(text).strip(), "last"]


@in_turn(text=HOSTILE)
def test_completions_side_by_side_stay_in_their_block(text: str) -> None:
    page = side_by_side(results(["first", text], recipe=text))
    assert page is not None
    assert is_clean(page)
    kinds = {token.type for token in PAGE.parse(page)}
    assert kinds <= {"paragraph_open", "paragraph_close", "inline", "hr", "code_block"}
    shown = [line for line in page.splitlines() if line.startswith("    ")]
    assert len(shown) == len([line for line in page.splitlines() if line.strip() and line != "---"]) - 1


ODD_TITLES = [CONCENTRATE, "$\\frac{$", "_hidden", "\ud800\u202e", "電影", "x" * 3_000]


@pytest.mark.integration
def test_figures_are_drawn_whatever_the_titles(tmp_path: Path) -> None:
    odd = results(ODD_TITLES, recipe=CONCENTRATE, varied={"kl.coefficient": 0.1})
    for name, make in figures.FIGURES.items():
        figure = make(odd)
        assert figure is not None, name
        legends = [text.get_text() for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes)]
                   if legend for text in legend.get_texts()]  # fmt: skip
        assert all(is_clean(text) and len(text) < 70 for text in legends)
        if name in ("curves.png", "tradeoff.png"):
            assert len(legends) == len(ODD_TITLES)
    odd["rows"] = odd["rows"][:4]
    figures.draw(odd, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == set(figures.FIGURES)


@pytest.mark.integration
def test_a_report_is_made_of_hostile_results_in_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = results([*HOSTILE.values()], recipe=CONCENTRATE)
    write_json(tmp_path / "results.json", found)
    assert read_json(tmp_path / "results.json") == found
    monkeypatch.setattr(figures, "FIGURES", {})
    monkeypatch.setattr("sys.argv", ["rlgf", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 0
    for name in ("table.md", "texts.md", "results.json"):
        assert is_clean((tmp_path / name).read_text(encoding="utf-8"))
    assert is_clean(capsys.readouterr().err)


def test_results_of_another_shape_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = results(["first"])
    bad: list[Any] = [[], 3, {**good, "rows": 3}, {**good, "rows": [{}]}, {**good, "machine": None}, {**good, "seeds": []}]
    bad += [{**good, "rows": [{**copy.deepcopy(good["rows"][0]), "title": 3}]}]
    monkeypatch.setattr(figures, "FIGURES", {})
    monkeypatch.setattr("sys.argv", ["rlgf", "report", str(tmp_path)])
    for value in bad:
        (tmp_path / "results.json").write_text(json.dumps(value))
        with pytest.raises(SystemExit) as stopped:
            app.main()
        assert stopped.value.code == 2, value
        shown = " ".join(capsys.readouterr().err.split())
        assert "holds no results of `rlgf compare`" in shown or "has format version None" in shown, value


@pytest.mark.integration
def test_a_report_can_be_written_where_there_was_none(tmp_path: Path) -> None:
    write_report(results(["a|b"]), tmp_path / "new")
    assert "a\\|b" in (tmp_path / "new" / "table.md").read_text()
