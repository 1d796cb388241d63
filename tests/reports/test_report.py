"""The report of a comparison: figures, completions side by side, and varied settings."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import FinishedComparison, FinishedRun, small
from rlgf.cli import app
from rlgf.config.variants import build_variants, parse_vary
from rlgf.data.checksums import read_checked_json
from rlgf.errors import ConfigError
from rlgf.reports import figures
from rlgf.reports.report import report_files, side_by_side, write_report
from rlgf.reports.tables import LAST_EVALUATION, splits_of, table_rows
from rlgf.runs.logs import read_rows
from rlgf.text_metrics.score import read_lines


def row(key: str, **more: Any) -> dict[str, Any]:
    metrics = {"score": [0.2, 0.4], "kl": [0.0, 0.0], "perplexity": [10.0, 12.0]}
    return {"key": key, "title": key.upper(), "completions_used": 16, "metrics": metrics, "curves": [], **more}


def point(texts: int, score: float) -> dict[str, float]:
    return {"completions": texts, "score": score, "kl": 2 * score, "perplexity": 10 + score}


def comparison(*rows: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"recipe": "r", "seeds": [0, 1], "rows": [row("sft"), *rows], **more}


@pytest.mark.integration
def test_a_tradeoff_has_a_point_for_each_evaluation_and_arrows_in_the_direction_of_training():
    trained = row("ppo", curves=[[point(8, 0.5), point(16, 1.0)], [point(8, 0.7), point(16, 2.0)]])
    figure = figures.tradeoff(comparison(trained, row("guide")))
    assert figure is not None
    left, right = figure.axes
    line = left.lines[0]
    assert list(line.get_xdata()) == pytest.approx([1.2, 3.0])
    assert list(line.get_ydata()) == pytest.approx([0.6, 1.5])
    assert list(right.lines[0].get_xdata()) == pytest.approx([10.6, 11.5])
    assert not left.xaxis_inverted()
    (arrow,) = left.texts
    assert arrow.xy == pytest.approx((3.0, 1.5))
    assert arrow.xyann == pytest.approx((1.2, 0.6))
    assert left.lines[1].get_ydata()[0] == pytest.approx(0.3)  # the SFT model
    assert figures.tradeoff(comparison(row("ppo", curves=[[], []]))) is None


@pytest.mark.integration
def test_what_could_not_be_measured_has_no_panel():
    def unknown(texts: int) -> dict[str, Any]:
        return {**point(texts, 0.5), "perplexity": None}

    trained = row("ppo", curves=[[unknown(8)], [unknown(8)]], algorithm="ppo")
    partly = row("lols", curves=[[unknown(8), point(16, 0.7)], [point(8, 0.6), point(16, 0.9)]])
    figure = figures.tradeoff(comparison(trained, partly))
    assert figure is not None
    assert [list(line.get_ydata()) for line in figure.axes[1].lines[:2]] == [[], [pytest.approx(0.8)]]
    figure = figures.tradeoff(comparison(trained))
    assert figure is not None
    assert [axes.get_xlabel() for axes in figure.axes] == ["KL to SFT"]
    trained["metrics"] = {**trained["metrics"], "perplexity": [None, float("nan")]}
    figure = figures.sensitivity(comparison(trained, varied={"kl.coefficient": 0.1}))
    assert figure is not None
    assert [axes.get_ylabel() for axes in figure.axes] == ["reward"]


def test_bars_show_easy_and_hard_prompts_on_the_tables_scale():
    splits = {"validation": {"cider_d_easy": [0.5, 0.7], "cider_d_hard": [0.2, 0.4]}}
    figure = figures.difficulty(comparison(row("ppo", splits=splits), row("ppo_pp")))
    assert figure is not None
    (axes,) = figure.axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([6.0, 3.0])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["PPO"]
    only_hard = row("ppo", splits={"validation": {"cider_d_hard": [0.2, 0.4]}})
    assert figures.difficulty(comparison(only_hard)) is None


def test_a_varied_setting_is_drawn_with_the_algorithms_own_row_among_its_values():
    def varied(key: str, value: float, score: float) -> dict[str, Any]:
        metrics = {"score": [score], "perplexity": [score + 1]}
        return row(f"ppo-{key}={value:g}", algorithm="ppo", varied={key: value}, metrics=metrics)

    rows = [row("ppo", algorithm="ppo"), varied("kl.coefficient", 0.0, 0.9), varied("kl.coefficient", 1.0, 0.1)]
    rows.append(varied("ppo.mle_coefficient", 0.5, 0.6))
    rows.append(row("ppo_best_of", varied={"kl.coefficient": 1.0}))
    figure = figures.sensitivity(comparison(*rows, varied={"kl.coefficient": 0.1, "ppo.mle_coefficient": 0.0}))
    assert figure is not None
    assert len(figure.axes) == 4
    reward, perplexity, other, _ = figure.axes
    assert [label.get_text() for label in reward.get_xticklabels()] == ["0.0", "0.1", "1.0"]
    assert list(reward.lines[0].get_ydata()) == pytest.approx([0.9, 0.3, 0.1])
    assert list(perplexity.lines[0].get_ydata()) == pytest.approx([1.9, 11.0, 1.1])
    assert list(other.lines[0].get_ydata()) == pytest.approx([0.3, 0.6])
    assert figures.sensitivity(comparison(*rows)) is None


def test_texts_stand_side_by_side_and_can_do_nothing_to_the_page():
    def example(text: str, score: float) -> list[dict[str, Any]]:
        return [{"prompt": "a b", "text": text, "score": score}]

    rows = [row("ppo", examples=example("</code>\n\n# big\x1b[31m <script>", 0.5)), row("ppo_pp", examples=example("fine", -1))]
    page = side_by_side(comparison(*rows))
    assert page is not None
    texts = [line for line in page.splitlines() if "big" in line or "fine" in line or "a b" in line]
    assert texts == [
        "    prompt           a b",
        "    PPO       0.500  </code>⏎⏎# big\\x1b[31m <script>",
        "    PPO_PP   -1.000  fine",
    ]
    assert side_by_side(comparison()) is None


def test_texts_stand_under_their_own_prompts_where_a_policy_lacks_one():
    def examples(*prompts: str) -> list[dict[str, Any]]:
        return [{"prompt": prompt, "text": f"about {prompt}", "score": 1.0} for prompt in prompts]

    page = side_by_side(comparison(row("ppo", examples=examples("a", "b")), row("guide", examples=examples("b", "c"))))
    assert page is not None
    shown = [line.split()[-1] for line in page.splitlines() if line.startswith("    ")]
    assert shown == ["a", "a", "b", "b", "b", "c", "c"]


def test_only_numbers_are_varied_and_what_a_setting_refuses_is_refused():
    config = small()
    own = config.kl.coefficient
    assert parse_vary(config, [f"kl.coefficient=0, {own},1e-2", "ppo.epochs=1,3"]) == {
        "kl.coefficient": [0, own, 0.01],
        "ppo.epochs": [1, 3],
    }
    for text, message in {
        "kl.coefficient": "give numbers separated by commas",
        "kl.coefficient=a": "give numbers",
        "kl.controller=1": "only numbers can be varied",
        "seed=1,2": "share seeds, evaluation and machine",
        "evaluation.prompts=4": "share seeds, evaluation and machine",
        "ppo.dropout=1": "only numbers can be varied",
        "kl.coeficient=1": "did you mean",
        "ppo.epochs=.5": "ppo.epochs",
        "kl.coefficient=-1": "kl.coefficient",
    }.items():
        with pytest.raises(ConfigError, match=message):
            parse_vary(config, [text])


def test_a_setting_that_means_nothing_to_an_algorithm_does_not_train_it_again():
    config = small()
    rows = build_variants(
        config, ["ppo", "lols"], {}, {"algorithm.options.lols.mixing_weight": [0.25], "ppo.learning_rate": [2e-5, 2.0000001e-5]}
    )
    assert [entry.key for entry in rows] == [
        "ppo", "ppo-ppo.learning_rate=2e-05", "ppo-ppo.learning_rate=2.0000001e-05",
        "lols", "lols-algorithm.options.lols.mixing_weight=0.25",
        "lols-ppo.learning_rate=2e-05", "lols-ppo.learning_rate=2.0000001e-05",
    ]  # fmt: skip


@pytest.mark.integration
@pytest.mark.integration
def test_a_report_is_written_again_from_results_alone(
    comparison: FinishedComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    first, second = comparison.folder, tmp_path / "second"
    monkeypatch.setattr("sys.argv", ["rlgf", "report", str(first), "--out", str(second)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 0
    assert "table.md, texts.md, curves.png, tradeoff.png, sensitivity.png" in capsys.readouterr().err
    for name in ("table.md", "texts.md"):
        assert (first / name).read_text() == (second / name).read_text()
    for folder, message in {second: "does not exist"}.items():
        monkeypatch.setattr("sys.argv", ["rlgf", "report", str(folder)])
        with pytest.raises(SystemExit) as stopped:
            app.main()
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.integration
def test_a_file_of_an_earlier_report_that_no_longer_holds_is_removed(tmp_path: Path):
    machine = dict.fromkeys(
        ("processor", "cpu_capability", "threads", "device", "python", "torch", "transformers", "rlgf"), "x"
    )
    trained = row("ppo", sampling="greedy", curves=[[point(8, 0.5)], [point(8, 0.7)]])
    results = comparison(trained, machine=machine)
    results["rows"][0]["sampling"] = "greedy"
    write_report(results, tmp_path)
    assert report_files(tmp_path) == ["table.md", "curves.png", "tradeoff.png"]
    trained["curves"] = [[], []]
    write_report(results, tmp_path)
    assert report_files(tmp_path) == ["table.md"]


def test_a_picture_and_its_table_show_the_same_split() -> None:
    trained = row("ppo", curves=[[point(8, 0.5), point(16, 1.0)], [point(8, 0.7), point(16, 2.0)]])
    results = comparison(trained, row("guide"))
    figure = figures.curves(results)
    assert figure is not None
    (axes,) = figure.axes
    assert list(axes.lines[0].get_xdata()) == [8, 16]  # no point of another split
    assert [text.get_text() for text in axes.texts] == ["SFT (test)", "guide (test)"]
    assert splits_of(results) == ["test", LAST_EVALUATION]
    headings, rows = table_rows(results, LAST_EVALUATION)
    assert headings[1:4] == ["reward", "KL to SFT", "perplexity"]
    assert [cells[:2] for cells in rows] == [["PPO", "1.500 ± 0.500"]]
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(1.5)


def test_a_run_without_validations_shows_the_reward_in_training() -> None:
    trained = row("ppo", curves=[[]], training=[{"completions": 8, "score": 0.5}, {"completions": 16, "score": 0.75}])
    trained["metrics"] |= {"pass_rate": [0.5]}
    figure = figures.curves(comparison(trained))
    assert figure is not None
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.5, 0.75]
    assert figure.axes[0].get_ylabel() == "reward"


@pytest.mark.integration
def test_a_single_run_has_a_report_next_to_its_start_and_its_guide(
    finished_run: Callable[[str], FinishedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run("ppo_pp").folder
    monkeypatch.setattr("sys.argv", ["rlgf", "report", str(run), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert not stopped.value.code
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    table = (tmp_path / "table.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][:4] == [
        "",
        "SFT",
        "guide",
        "PPO++",
    ]
    found = read_checked_json(run / "results.json")
    assert found["baselines"]["sft"]["completions"] == found["evaluation"]["completions"]
    first = read_rows(run / "evaluation.jsonl", print)[0]
    assert isinstance(first["references"], list)
    lines = read_lines(str(run / "evaluation.jsonl"), ["distinct_1", "rouge1"])
    assert lines[0].prediction == first["text"]
