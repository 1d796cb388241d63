"""`rlgf evaluate`: best of N, and baselines."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import FinishedComparison, FinishedRun
from rlgf.cli import app


def evaluated(arguments: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    out = tmp_path / "out.json"
    monkeypatch.setattr("sys.argv", ["rlgf", "evaluate", *arguments, "--json", str(out)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 0
    return json.loads(out.read_text())


@pytest.mark.integration
def test_a_run_is_evaluated_with_the_best_of_several_texts(
    finished_run: Callable[[str], FinishedRun], stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    run = str(finished_run("d2lols").folder)
    arguments = [run, "evaluation.sampling={greedy: true}", "--best-of", "3", "--stages", str(stages)]
    found = evaluated(arguments, tmp_path, monkeypatch)
    assert "best of 3" in capsys.readouterr().out
    assert found["best_of"]["samples"] == 3
    assert found["best_of"]["sampling"] == "full softmax"  # greedily it would be the same text three times
    assert found["best_of"]["evaluation"]["completions"] == found["completions"] == 8


@pytest.mark.integration
@pytest.mark.parametrize("name", ["zero_shot", "sft", "guide"])
def test_a_baseline_is_a_command_and_says_what_a_comparison_says(
    name: str, comparison: FinishedComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = {row["key"]: row["metrics"] for row in comparison.results["rows"]}
    run = comparison.folder / "runs" / "ppo_pp-seed0"
    found = evaluated([str(run), "--baseline", name], tmp_path, monkeypatch)
    best = found.pop("best_of", None)
    assert found == {key: values[0] for key, values in rows[name].items()}
    assert (best is None) == (name == "guide")
    if name == "sft":
        assert best["evaluation"] == {key: values[0] for key, values in rows["sft_best_of"].items()}
    assert rows["zero_shot"]["perplexity"] != rows["sft"]["perplexity"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--baseline", "oracle"], "unknown baseline 'oracle'"),
        (["--baseline", "sft", "--policy", "somewhere"], "both choose the model to evaluate"),
        (["--baseline", "guide", "--best-of", "2"], "--baseline=guide has none"),
    ],
)
def test_baselines_that_cannot_be_are_refused(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["rlgf", "evaluate", "quickstart", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err.replace("\n", " ")
