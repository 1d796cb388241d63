"""Text from outside in the terminal: every line passes one function, whatever is wrong and whoever says it."""

import ast
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import rlgf
from helpers import in_turn, parsed, small
from hostile import CONCENTRATE, HOSTILE, PRINTABLE, is_clean
from rlgf.cli import app, console, terminal

PACKAGE = Path(rlgf.__file__).parent
PRINTERS = {"print", "echo", "secho", "print_exception", "print_exc", "print_json", "input"}


def printing_calls(path: Path) -> list[str]:
    """The calls in a file that print: by Python, typer or rich, or to a standard stream."""
    found: list[str] = []
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        last = getattr(node.func, "attr", getattr(node.func, "id", ""))
        name = ast.unparse(node.func) if last in (*PRINTERS, "Console", "write") else ""
        if last in PRINTERS or last == "Console" or name.startswith(("sys.stdout.write", "sys.stderr.write")):
            found.append(f"{path.relative_to(PACKAGE)}: {name}")
    return found


def test_one_file_prints() -> None:
    found = [call for path in sorted(PACKAGE.rglob("*.py")) for call in printing_calls(path)]
    # what starts `python -m rlgf.text_metrics.worker` reads lines of JSON from it
    # and `runs/progress.py` has one function that escapes, for Python code without the command line
    others = [call for call in found if not call.startswith(("cli/terminal.py", "text_metrics/worker.py"))]
    assert others == ["runs/progress.py: sys.stderr.write"]
    assert any(call.startswith("cli/terminal.py") for call in found)


@in_turn(text=HOSTILE)
def test_every_way_to_print_is_clean(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    terminal.report(text)
    terminal.report_reuse_once()(text)
    terminal.write(text, (text, "bold"))
    terminal.write_block(text)
    terminal.print_table([text, "value"], [[text, text]])
    terminal.fail(text)
    try:
        raise ValueError(text)
    except ValueError as error:
        terminal.print_traceback(error)
    with terminal.escape_warnings():
        warnings.simplefilter("always")
        warnings.warn(text or "empty", UserWarning, stacklevel=1)
    shown = capsys.readouterr()
    assert is_clean(shown.out)
    assert is_clean(shown.err)


@pytest.mark.parametrize("name", ["transformers", "datasets", "no.such.library"])
def test_what_libraries_log_is_clean(name: str) -> None:
    console.quiet()
    handlers = logging.getLogger(name).handlers or [logging.lastResort]
    assert handlers
    for handler in handlers:
        assert handler is not None
        line = handler.format(logging.LogRecord(name, logging.ERROR, "x.py", 1, "file %s", (CONCENTRATE,), None))
        assert is_clean(line)
        assert "file \\x1b[31m" in line


COMMANDS: dict[str, list[str]] = {
    "no command": ["{}"], "no option": ["train", "--{}"], "a recipe": ["train", "{}"],
    "an assignment": ["train", "quickstart", "{}"],
    "a key": ["train", "quickstart", "{}=1"], "a key of options": ["train", "quickstart", "task.options.{}=1"],
    "a value": ["train", "quickstart", "policy={}"], "a number": ["train", "quickstart", "ppo.epochs={}"],
    "a choice": ["train", "quickstart", "ppo.schedule={}"], "an algorithm": ["train", "quickstart", "--algorithm", "{}"],
    "a seed": ["train", "quickstart", "--seed", "{}"], "data": ["train", "prompts", "--data", "{}", "--dry-run"],
    "a guide": ["train", "quickstart", "--algorithm", "ppo_pp", "--guide", "{}", "--dry-run"], "no sample": ["samples", "{}"],
    "a guide's model": ["train", "quickstart", "--algorithm", "ppo_pp", "--guide", "model:{}", "--dry-run"],
    "a task": ["check", "task", "{}"], "a task's module": ["check", "task", "python:{}:TASK"], "a run": ["evaluate", "{}"],
    "a judge": ["evaluate", "quickstart", "--judge", "{}"], "a file": ["score", "{}"],
    "metrics": ["score", "-", "--metrics", "{}"],
    "seeds": ["compare", "quickstart", "--seeds", "{}"], "algorithms": ["compare", "quickstart", "--algorithms", "{}"],
    "what varies": ["compare", "quickstart", "--vary", "{}=1"], "a comparison": ["report", "{}"], "something": ["show", "{}"],
    "a download": ["download", "{}"],
    "a server": ["check", "guide", "server:{}@http://127.0.0.1:9/v1", "guide.endpoint.retries=0"],
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_is_typed_is_shown_clean_when_it_is_wrong(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for text in (CONCENTRATE, PRINTABLE, "\x1b[31m\n\u202e\ud800"):
        monkeypatch.setattr("sys.argv", ["rlgf", *(part.replace("{}", text) for part in command)])
        with pytest.raises(SystemExit) as stopped:
            app.main()
        shown = capsys.readouterr()
        expected = (0, 2) if "model:{}" in command else (2,)  # a name on the Hub is not looked up in a dry run
        assert stopped.value.code in expected, shown.err
        assert is_clean(shown.out)
        assert is_clean(shown.err)
        assert "Traceback" not in shown.err


def test_a_runner_sees_the_same_usage_errors() -> None:
    for arguments in (["train", "--\x1b\u202e"], ["\x1b\u202e"]):
        ran = CliRunner().invoke(app.app, arguments)
        assert ran.exit_code == 2
        assert is_clean(ran.output)
        assert "\\x1b\\u202e" in ran.output


def test_a_failure_that_nobody_expects_is_told_line_by_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(what: str, *_: Any) -> None:
        raise RuntimeError(f"{CONCENTRATE} sk-abcdefgh12345678")

    monkeypatch.setattr("rlgf.config.recipes.recipe", fail)
    monkeypatch.setattr("sys.argv", ["rlgf", "show", "quickstart"])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    shown = capsys.readouterr().err
    assert stopped.value.code == 1
    assert is_clean(shown)
    assert "Traceback (most recent call last)" in shown
    assert "RuntimeError: \\x1b[31m" in shown
    assert "sk-abc" not in shown


def sample(text: str) -> dict[str, Any]:
    span = {"origin": "policy", "tokens": 1, "text": text}
    return {
        "iteration": 0, "index": 0, "phase": 0, "prompt": text, "text": text, "spans": [span, {**span, "origin": text}],
        "switch_position": 0, "rollout_by": "policy", "ended_with_eos": True, "score": None, "guide_completion": text,
    }  # fmt: skip


def test_completions_are_shown_clean_whatever_the_log_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(sample(text)) for text in HOSTILE.values()]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr("sys.argv", ["rlgf", "samples", str(tmp_path), "--count", "1000"])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    shown = capsys.readouterr()
    assert stopped.value.code == 0, shown.err
    assert is_clean(shown.out)
    assert shown.out.count("reward nan") == len(HOSTILE)
    for broken in (
        {},
        {"iteration": 0},
        {**sample("a"), "spans": 3},
        {**sample("a"), "spans": [{}]},
        {**sample("a"), "prompt": 3},
    ):
        (tmp_path / "rollouts.jsonl").write_text(json.dumps(broken) + "\n")
        with pytest.raises(SystemExit) as stopped:
            app.main()
        assert stopped.value.code == 2
        told = " ".join(capsys.readouterr().err.split())
        assert "has a line that is no completion of a run" in told or "lines of another form are left out" in told


def test_a_plan_shows_names_clean(capsys: pytest.CaptureFixture[str]) -> None:
    config = small(
        ("recipe", PRINTABLE), ("task.data", PRINTABLE), ("policy", PRINTABLE), ("reward.path", PRINTABLE),
        ("guide.spec", f"model:{PRINTABLE}"), ("algorithm.name", "ppo_pp"),
    )  # fmt: skip
    console.print_plan(config, config.algorithm.build(), PRINTABLE)
    shown = capsys.readouterr()
    assert is_clean(shown.out + shown.err)
    assert "\\x1b[31m" in shown.out
