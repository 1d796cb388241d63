"""The files and commands of docs/own-data.md, run in an empty folder."""

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from rlgf.cli import app
from rlgf.config.loading import check_keys
from rlgf.data.files import read_complete_lines
from rlgf.errors import ConfigError
from rlgf.tasks import prompts

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "own-data.md").read_text()
FILES: dict[str, str] = dict(re.findall(r"Save this as\s+`(\w+\.py)`[^`]*```python\n(.*?)```", PAGE, re.DOTALL))
COMMANDS: list[str] = [
    line.partition("#")[0].strip()
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if not kind and line.startswith("rlgf ")
]
LITTLE = (  # a run that learns nothing, in a second
    "ppo.completions_per_iteration=8 ppo.minibatch_size=8 pretrain.steps=2 sft.steps=2 model.layers=1 model.width=16 "
    "model.heads=2 "
    "ppo.iterations=1 evaluation.every=0 runtime.trackers=[] runtime.threads=1 model.max_length=64 pretrain.batch_size=2"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with the page's files in it, and what the first of them writes."""
    monkeypatch.chdir(tmp_path)
    for name, content in FILES.items():
        (tmp_path / name).write_text(content)
    runpy.run_path("make_rows.py")
    return tmp_path


def run(command: str, monkeypatch: pytest.MonkeyPatch, extra: str = "") -> None:
    monkeypatch.setattr("sys.argv", shlex.split(f"{command} {extra}"))
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 0, command


def test_the_page_has_files_and_commands():
    assert list(FILES) == ["make_rows.py", "orders.py", "orders_task.py"]
    assert {command.split()[1] for command in COMMANDS} == {"check", "train", "samples", "reward", "evaluate"}
    assert len(COMMANDS) == 13
    assert len((PAGE.partition("orders_task.py`")[2].partition("```\n\n")[0]).splitlines()) < 50  # one short file


def test_own_rows_and_an_own_task_are_sound(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    checks = [command for command in COMMANDS if command.startswith("rlgf check")]
    assert len(checks) == 3
    shown: list[str] = []
    for command in checks:
        run(command, monkeypatch)
        shown.append(capsys.readouterr().out)
    assert all("the reward is pure" in text and "ERROR" not in text for text in shown)
    assert "128 / 16 / 16 train, validation and test prompts" in shown[0]
    assert "do not outscore shuffled targets" in shown[0]
    assert "64 / 8 / 8 train, validation and test prompts" in shown[2]


@pytest.mark.integration
def test_a_policy_is_trained_and_evaluated_as_the_page_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (train,) = (command for command in COMMANDS if "--out runs/orders " in command)
    run(re.sub(r"--iterations \d+", "", train), monkeypatch, LITTLE)
    for command in (command for command in COMMANDS if command.startswith("rlgf evaluate") and "server:" not in command):
        run(command, monkeypatch)
    assert "best of 8" in capsys.readouterr().out


def test_the_options_that_the_page_names_are_there():
    for name in re.findall(r"task\.options\.(\w+)", PAGE):
        if name not in ("help", "max_count"):
            check_keys({name: None}, prompts.Options, "the page")
    for column in ("completion_column", "references_column", "chosen_column", "rejected_column", "truncation", "suffix"):
        assert f"`{column}" in PAGE
        check_keys({column: None}, prompts.Options, "the page")
    with pytest.raises(ConfigError, match="help"):
        check_keys({"help": 1}, prompts.Options, "the page")


@pytest.mark.slow
def test_every_command_of_the_page_works_to_the_letter(folder: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [json.loads(line) for line in Path("orders.jsonl").read_text().splitlines()]
    pairs = [{"prompt": row["prompt"], "chosen": " red green blue", "rejected": " red red"} for row in rows]
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    for command in COMMANDS:
        if "server:" not in command:
            run(command, monkeypatch, "preferences.min_words=1" if command.startswith("rlgf reward") else "")
    scores = [row["score"] for row in read_complete_lines(Path("runs/orders/metrics.jsonl"))]
    assert scores[0] < 0.45
    assert sum(scores[-5:]) / 5 > 0.6
    measured = json.loads(Path("runs/reward/stage.json").read_text())["metrics"]
    assert measured["accuracy"] > 0.9
