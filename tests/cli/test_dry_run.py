"""`rlgf train --dry-run` and `rlgf check` find what a run would stop at, and say what they did not try."""

import json
from pathlib import Path

import pytest

from rlgf.cli import app
from rlgf.data.lock import FileLock

ROWS = [{"prompt": f"{name} wants {count} colors:", "count": count} for name in ("Ann", "Ben", "Cleo") for count in range(9)]
REWARDS = """
def counts(prompts, texts):
    return [float(len(text.split())) for text in texts]

def thanks(prompts, texts):
    return [float("thanks" in text) for text in texts]

def guide(requests):
    return [f" {request.prompt.columns['count']} colors" for request in requests]

def broken(requests):
    return [request.prompt.columns["color"] for request in requests]
"""
RUN = ["train", "prompts", "--dry-run", "--data", "rows.jsonl", "reward.path=python:own_parts:counts"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with rows, a module with rewards and guides, and a second file of rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_parts", raising=False)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "own_parts.py").write_text(REWARDS)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run a command, and return its exit code and all that it printed."""
    monkeypatch.setattr("sys.argv", ["rlgf", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    shown = capsys.readouterr()
    return int(stopped.value.code or 0), " ".join(f"{shown.out} {shown.err}".split())


def test_a_sound_run_is_tried_and_nothing_is_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    guided = ["--algorithm", "ppo_pp", "--guide", "python:own_parts:guide", "--out", "runs/mine"]
    code, shown = run(monkeypatch, capsys, *RUN, *guided)
    assert code == 0
    assert "checked 21 / 3 / 3 train, validation and test prompts" in shown
    assert "checked the reward python:own_parts:counts scores completions" in shown
    assert "checked the guide python:own_parts:guide completes prompts" in shown
    assert "not tried loading the models, their memory, and training" in shown
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == {"rows.jsonl", "own_parts.py"}


@pytest.mark.parametrize(
    ("arguments", "content", "words"),
    [
        (["task.options.prompt_column=question"], None, "there is no 'question'"),
        ([], "", "holds no rows"),
        ([], '{"prompt": "a"}\n{"prompt": \n', "line 2: not valid JSON"),
        (["model.max_length=33"], None, "exceeds the model's context of 33"),
        (["runtime.device=cuda:7"], None, "finds no such device"),
        (["--algorithm", "ppo_pp", "--guide", "model:./nowhere"], None, "no such file or folder"),
        (["--algorithm", "ppo_pp", "--guide", "python:own_parts:broken"], None, "failed on 2 requests (KeyError: 'color'"),
        (["reward.path=python:own_parts:nothing"], None, "cannot be loaded"),
        (["--out", "taken"], None, "holds something that is not a run"),
        (["--out", "rows.jsonl/run"], None, "cannot be made"),
    ],
)  # fmt: skip
def test_what_would_stop_the_run_stops_the_dry_run(
    arguments: list[str], content: str | None, words: str, folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    if content is not None:
        (folder / "rows.jsonl").write_text(content)
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.txt").write_text("mine")
    code, shown = run(monkeypatch, capsys, *RUN, *arguments)
    assert code == 2
    assert words in shown
    assert "Traceback" not in shown


def test_a_folder_in_use_is_told_by_a_dry_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (folder / "runs" / "mine").mkdir(parents=True)
    lock = FileLock(folder / "runs" / "mine" / ".lock")
    assert lock.acquire()
    code, shown = run(monkeypatch, capsys, *RUN, "--out", "runs/mine")
    lock.release()
    assert code == 2
    assert "trains runs/mine at this moment" in shown


def test_rows_without_targets_are_sound_and_a_reward_that_found_nothing_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    check = ["check", "task", "prompts", "--data", "rows.jsonl"]
    code, shown = run(monkeypatch, capsys, *check, "reward.path=python:own_parts:counts")
    assert code == 0
    assert "the reward is not constant: from 0.000 to" in shown
    assert "mean rewards: random words of the data" in shown
    code, shown = run(monkeypatch, capsys, *check, "reward.path=python:own_parts:thanks")
    assert code == 0
    assert "WARNING the reward was 0 for all 42 completions tried (random words of the data, empty texts)" in shown
    code, shown = run(monkeypatch, capsys, *check, "reward.path=python:own_parts:counts", "model.max_length=33")
    assert code == 2
    assert "ERROR task 'prompts', train prompt 1 has" in shown


def test_a_guide_is_asked_with_a_row_of_the_data(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    code, shown = run(monkeypatch, capsys, "check", "guide", "python:own_parts:guide", "--data", "rows.jsonl")
    assert code == 0
    assert "asked with the prompt" in shown
    assert "called with a list of requests such as prompt.text=" in shown
    assert "prompt.columns={'count': " in shown
    assert "colors'" in shown
