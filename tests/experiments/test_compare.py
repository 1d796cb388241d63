"""Comparisons: equal data, reuse of finished runs, the table and the plot."""

from pathlib import Path

import pytest

from helpers import SMALL, FinishedComparison, small
from rlgf.config.loading import override
from rlgf.config.variants import build_variants, plan_comparison
from rlgf.errors import ConfigError
from rlgf.experiments.compare import compare
from rlgf.reports import figures
from rlgf.reports.tables import markdown, mean_and_spread


@pytest.mark.integration
def test_a_comparison_has_a_row_for_every_baseline_algorithm_and_control(comparison: FinishedComparison):
    trained = [f"{key}{end}" for key in ("ppo_pp", "ppo_pp-kl.coefficient=0.5", "distill") for end in ("", "_best_of")]
    rows = {row["key"]: row for row in comparison.results["rows"]}
    assert list(rows) == ["zero_shot", "sft", "sft_best_of", "guide", *trained]
    for key in trained[::2]:
        assert rows[key]["completions_used"] == 16 + (8 if key == "distill" else 0)
        assert len(rows[key]["curves"]) == 2
        for curve in rows[key]["curves"]:
            assert [point["completions"] for point in curve] == [8, 16]
    for name in ("results.json", "table.md", "texts.md", "curves.png", "tradeoff.png", "sensitivity.png"):
        assert (comparison.folder / name).stat().st_size > 0
    assert not (comparison.folder / "difficulty.png").exists()
    assert "± " in (comparison.folder / "table.md").read_text()


@pytest.mark.integration
def test_a_finished_comparison_is_reused(comparison: FinishedComparison):
    again: list[str] = []
    assert compare(comparison.plan, comparison.folder, report=again.append)["rows"] == comparison.results["rows"]
    assert sum("reusing" in line for line in again) == 6
    assert not any("making" in line for line in again)
    assert any("making" in line for line in comparison.lines)


@pytest.mark.integration
def test_a_varied_setting_runs_each_value_once(comparison: FinishedComparison):
    assert [(row.key, row.title) for row in comparison.plan.rows] == [
        ("ppo_pp", "PPO++"),
        ("ppo_pp-kl.coefficient=0.5", "PPO++, kl.coefficient 0.5"),
        ("distill", "distill, then PPO"),
    ]
    assert comparison.results["varied"] == {"kl.coefficient": comparison.config.kl.coefficient}
    assert "PPO++, kl.coefficient 0.5" in (comparison.folder / "texts.md").read_text()


@pytest.mark.integration
def test_the_best_of_n_has_a_row_for_each_policy(comparison: FinishedComparison):
    rows = {row["key"]: row for row in comparison.results["rows"]}
    assert [rows[key]["title"] for key in ("sft_best_of", "ppo_pp_best_of")] == ["SFT, best of 2", "PPO++, best of 2"]
    assert "| PPO++, best of 2 |" in (comparison.folder / "table.md").read_text()
    assert dict(SMALL)["evaluation.final_prompts"] == rows["sft_best_of"]["metrics"]["completions"][0]


@pytest.mark.slow
def test_runs_in_processes_of_their_own_give_the_same_numbers(tmp_path: Path):
    config = small()
    rows = build_variants(config, ["ppo", "ppo_pp"], {})
    one = compare(plan_comparison(config, rows, [0]), tmp_path / "one")
    two = compare(plan_comparison(config, rows, [0]), tmp_path / "two", jobs=2)
    assert [row["metrics"] for row in one["rows"]] == [row["metrics"] for row in two["rows"]]


@pytest.mark.integration
def test_a_folder_with_another_run_is_refused_before_anything_runs(comparison: FinishedComparison):
    other = override(comparison.config, [("ppo.epochs", 3)])
    with pytest.raises(ConfigError, match="another run"):
        compare(plan_comparison(other, build_variants(other, ["ppo_pp", "lols"], {}), [0]), comparison.folder)
    assert not (comparison.folder / "runs" / "lols-seed0").exists()


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
