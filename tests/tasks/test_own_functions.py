"""Functions of a user's own task: what they return is checked, and how they fail is told in one sentence."""

from pathlib import Path
from typing import Any

import pytest

from hostile import HOSTILE, is_clean
from rlgf.cli import app
from rlgf.config.sections import TaskConfig
from rlgf.config.specs import load_object
from rlgf.errors import INPUT_ERRORS, ConfigError, DataError
from rlgf.tasks.base import Task, check_task
from rlgf.tasks.registry import task_definition
from rlgf.types import Prompt

MODULE = """
from dataclasses import dataclass
import rlgf

@dataclass
class Options:
    words: int = 3

def build(config, tokenizer):
    {build}

def raw_texts(config, count):
    {raw_texts}

TASK = rlgf.TaskDefinition(build, Options, raw_texts=raw_texts, has_builtin_reward=False)
"""
GOOD = "prompts = [rlgf.Prompt('a')]; return rlgf.Task('mine', prompts, prompts, prompts)"


def own_task(
    folder: Path, monkeypatch: pytest.MonkeyPatch, build: str = GOOD, raw_texts: str = "return []", name: str = "own"
) -> TaskConfig:
    (folder / f"{name}.py").write_text(MODULE.format(build=build, raw_texts=raw_texts))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    return TaskConfig(f"python:{name}:TASK")


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ("import sys; sys.exit()", r"\(SystemExit"), ("raise SystemExit(0)", r"\(SystemExit: 0"),
        ("1 / 0", r"\(ZeroDivisionError"),
        ("raise KeyError('a')", r"\(KeyError: 'a', own\.py line"),
    ],
)  # fmt: skip
def test_a_function_that_ends_the_program_or_fails_is_an_error(
    failure: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = own_task(tmp_path, monkeypatch, build=failure, raw_texts=failure)
    definition = task_definition(config)
    assert definition.raw_texts is not None
    for name, call in (
        ("build", lambda: definition.build(config, None)),
        ("raw_texts", lambda: definition.raw_texts(config, 1)),
    ):
        with pytest.raises(ConfigError, match=rf"{name} of task 'python:own:TASK' failed {told}"):
            call()


def test_errors_of_ours_and_ctrl_c_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = own_task(tmp_path, monkeypatch, build="raise rlgf.DataError('no rows')", raw_texts="raise KeyboardInterrupt")
    definition = task_definition(config)
    assert definition.raw_texts is not None
    with pytest.raises(DataError, match=r"^no rows$"):
        definition.build(config, None)
    with pytest.raises(KeyboardInterrupt):
        definition.raw_texts(config, 1)


@pytest.mark.parametrize("body", ["import sys; sys.exit(0)", "raise SystemExit", "1 / 0", "def f(:", "raise OSError('gone')"])
def test_a_module_that_cannot_be_imported_is_an_error(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"broken_{abs(hash(body))}"
    (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"reward 'python:{name}:f' cannot be loaded"):
        load_object(f"python:{name}:f", "reward")


PROMPTS = [Prompt("a")]


@pytest.mark.parametrize(
    ("task", "told"),
    [
        (None, "built a NoneType"), ({"train": PROMPTS}, "built a dict"),
        (Task("t", [], PROMPTS, PROMPTS), "no list of prompts as train"),
        (Task("t", PROMPTS, iter(PROMPTS), PROMPTS), "no list of prompts as validation"),  # type: ignore[arg-type]
        (Task("t", PROMPTS, PROMPTS, ["a"]), "prompt 1 of test is 'a'"),  # type: ignore[list-item]
        (Task("t", [*PROMPTS, Prompt(3)], PROMPTS, PROMPTS), r"prompt 2 of train is Prompt\(text=3"),  # type: ignore[arg-type]
        (Task("t", [Prompt("a", (None,))], PROMPTS, PROMPTS), "prompt 1 of train"),  # type: ignore[arg-type]
        (Task("t", PROMPTS, PROMPTS, PROMPTS, extra_test_splits={"hard": "ab"}), "prompt 1 of hard is 'a'"),  # type: ignore[dict-item]
        (Task("t", PROMPTS, PROMPTS, PROMPTS, demonstrations=()), "as demonstrations"),
    ],
)  # fmt: skip
def test_what_is_no_task_is_refused(task: Any, told: str) -> None:
    with pytest.raises(DataError, match=f"task 'mine'.*{told}"):
        check_task(task, "mine")


def test_what_a_user_builds_is_checked_where_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = own_task(tmp_path, monkeypatch, build="return 3", name="builds_three")
    with pytest.raises(DataError, match="task 'python:builds_three:TASK' built a int"):
        task_definition(config).build(config, None)
    good = own_task(tmp_path, monkeypatch, name="builds_a_task")
    assert task_definition(good).build(good, None).test[0].text == "a"


def test_options_that_are_no_dataclass_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain.py").write_text("import rlgf\nTASK = rlgf.TaskDefinition(lambda config, tokenizer: None, dict)")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="options that are no dataclass"):
        task_definition(TaskConfig("python:plain:TASK"))


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_name_of_a_task_is_refused_in_a_clean_line(name: str) -> None:
    for spec in (name, f"python:{name}:TASK", f"python:json:{name}"):
        with pytest.raises(INPUT_ERRORS) as caught:
            task_definition(TaskConfig(spec))
        assert is_clean(str(caught.value))


def test_a_reward_that_ends_the_program_does_not_end_a_command_as_a_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "leaves.py").write_text("import sys\n\ndef reward(prompts, texts):\n    sys.exit()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    options = ["task.options={slots: 2, train_prompts: 8, held_out_prompts: 4}", "reward.path=python:leaves:reward"]
    monkeypatch.setattr("sys.argv", ["rlgf", "check", "task", "quickstart", *options])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 2
    assert "the reward failed on 8 completions (SystemExit, leaves.py line 4;" in capsys.readouterr().out
