"""Comparisons: equal data, reuse of finished runs, the table and the plot."""

from pathlib import Path

import pytest

from helpers import SMALL, small
from rlgf.cli import app
from rlgf.config.loading import override
from rlgf.config.recipes import Control
from rlgf.config.variants import build_variants, plan_comparison
from rlgf.errors import ConfigError
from rlgf.experiments import figures
from rlgf.experiments.compare import compare
from rlgf.experiments.tables import markdown, mean_and_spread

DISTIL = Control("distill, then PPO", {"distill.num_completions": 8, "distill.steps": 2, "distill.batch_size": 4})


def test_a_comparison_has_a_row_for_every_baseline_algorithm_and_control(tmp_path: Path):
    config = small(("evaluation.every", 1))
    rows = build_variants(config, ["ppo", "d2lols"], {"distill": DISTIL})
    lines: list[str] = []
    results = compare(plan_comparison(config, rows, [0, 1]), tmp_path, report=lines.append)
    assert [row["key"] for row in results["rows"]] == ["sft", "guide", "ppo", "d2lols", "distill"]
    for row in results["rows"][2:]:
        assert row["completions_used"] == 24 + (8 if row["key"] == "distill" else 0)
        for curve in row["curves"]:
            assert [point["completions"] for point in curve] == [8, 16, 24]
    for name in ("results.json", "table.md", "curves.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "± " in (tmp_path / "table.md").read_text()
    again: list[str] = []
    assert compare(plan_comparison(config, rows, [0, 1]), tmp_path, report=again.append)["rows"] == results["rows"]
    assert sum("reusing" in line for line in again) == 6
    assert not any("making" in line for line in again)


@pytest.mark.slow
def test_runs_in_processes_of_their_own_give_the_same_numbers(tmp_path: Path):
    config = small()
    rows = build_variants(config, ["ppo", "ppo_pp"], {})
    one = compare(plan_comparison(config, rows, [0]), tmp_path / "one")
    two = compare(plan_comparison(config, rows, [0]), tmp_path / "two", jobs=2)
    assert [row["metrics"] for row in one["rows"]] == [row["metrics"] for row in two["rows"]]


def test_a_folder_with_another_run_is_refused_before_anything_runs(tmp_path: Path):
    config = small()
    rows = build_variants(config, ["ppo"], {})
    compare(plan_comparison(config, rows, [0]), tmp_path)
    with pytest.raises(ConfigError, match="another run"):
        compare(
            plan_comparison(override(config, [("ppo.epochs", 1)]), build_variants(config, ["ppo", "lols"], {}), [0]), tmp_path
        )
    assert not (tmp_path / "runs" / "lols-seed0").exists()


def test_an_algorithm_that_the_guide_cannot_serve_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "begins_only.py").write_text("def guide(requests): return [''] * len(requests)\nguide.can_continue = False\n")
    monkeypatch.chdir(tmp_path)
    for spec in ("references", "python:begins_only:guide"):
        config = small(("guide.spec", spec))
        with pytest.raises(ConfigError, match=r"cannot continue a prefix, which LOLS needs"):
            compare(plan_comparison(config, build_variants(config, ["ppo", "ppo_pp", "lols"], {}), [0]), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_a_figure_is_a_mean_and_a_population_spread():
    assert mean_and_spread([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert mean_and_spread([0.5], 3) == "0.500"
    assert mean_and_spread([None, None], 1) == "–"
    assert mean_and_spread([], 1) == "–"


def test_a_table_says_what_it_was_measured_on():
    machine = {
        "processor": "abacus", "cpu_capability": "beads", "threads": 1, "device": "cpu", "python": "3", "torch": "2",
        "transformers": "5", "rlgf": "0",
    }  # fmt: skip
    row = {
        "key": "ppo",
        "title": "PPO",
        "sampling": "greedy",
        "completions_used": 1200,
        "metrics": {"score": [0.5]},
        "curves": [],
    }
    results = {"recipe": "r", "seeds": [0], "evaluation_prompts": 4, "rows": [row], "machine": machine}
    text = markdown(results)
    assert "| PPO | 0.500 | 1,200 |" in text
    assert "abacus" in text
    assert "PPO: greedy" in text


def test_runs_that_were_never_evaluated_on_the_way_have_no_plot():
    rows = [
        {"key": "guide", "title": "guide", "metrics": {"score": [0.5]}, "curves": []},
        {"key": "ppo", "title": "PPO", "completions_used": 8, "metrics": {"score": [0.5]}, "curves": [[]]},
    ]
    assert figures.curves({"recipe": "r", "seeds": [0], "rows": rows}) is None


def test_texts_are_shown_by_author_without_colour_and_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    from rlgf.data.files import to_line

    spans = [
        {"origin": "guide", "tokens": 1, "text": " great"},
        {"origin": "policy", "tokens": 2, "text": " \x1b[31mplot[bold]"},
    ]
    row = {
        "iteration": 0,
        "index": 3,
        "prompt": "review",
        "spans": spans,
        "switch_position": 1,
        "ended_with_eos": True,
        "score": 1.0,
    }
    (tmp_path / "rollouts.jsonl").write_text(to_line(row))
    monkeypatch.setattr("sys.argv", ["rlgf", "samples", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "review [guide: great] [policy: \\x1b[31mplot[bold]] ■" in shown
    assert "\x1b" not in shown


def test_a_dry_run_prints_the_plan_and_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    changes = [f"{key}={value}" for key, value in SMALL if key.startswith("ppo")]
    monkeypatch.setattr("sys.argv", ["rlgf", "train", "quickstart", "--algorithm", "d2lols", "--dry-run", *changes])
    with pytest.raises(SystemExit):
        app.main()
    shown = capsys.readouterr().out
    for words in ("D2LOLS", "phase 0", "phase 1", "3 of 8 completions", "parameters", "memory"):
        assert words in shown
    assert not list(tmp_path.iterdir())
