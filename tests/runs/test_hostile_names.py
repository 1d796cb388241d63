"""Hostile names of metrics, rewards and splits: in trackers, in logs and as names of files."""

import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from helpers import config_of, tiny_trainer
from hostile import CONCENTRATE, HOSTILE, is_clean
from rlgf.algorithms.registry import ppo
from rlgf.data.files import json_safe, read_complete_lines, read_json, to_json, to_line, write_json
from rlgf.pipeline.final_evaluation import final_results
from rlgf.pipeline.resolve import resolve
from rlgf.runs.directory import RunDirectory
from rlgf.runs.tracking import Trackers


def tags(folder: Path) -> list[str]:
    """The tags in TensorBoard's files, which are records of a length, a check, an event and a check."""
    from tensorboardX.proto.event_pb2 import Event

    found: list[str] = []
    for file in folder.rglob("events*"):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event: Any = Event()
            event.ParseFromString(content[12 : 12 + length])
            found += [value.tag for value in event.summary.value]
            content = content[16 + length :]
    return found


def test_tags_of_tensorboard_are_clean_and_none_is_missing(tmp_path: Path) -> None:
    trackers = Trackers(("tensorboard",), tmp_path, {"text": CONCENTRATE})
    trackers.log({f"score/{text}": 1.0 for text in HOSTILE.values()}, 0)
    trackers.finish()
    found = tags(tmp_path)
    assert len(found) == len(HOSTILE)
    assert all(map(is_clean, found))


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_logs_and_results_hold_every_text_on_one_line(text: str, tmp_path: Path) -> None:
    row = {"prompt": text, text: [text, float("nan")], "number": 1}
    line = to_line(row)
    assert is_clean(line)
    assert len(line.splitlines()) == 1
    assert json.loads(line) == json_safe(row)
    (tmp_path / "rows.jsonl").write_text(line + line, encoding="utf-8")
    assert read_complete_lines(tmp_path / "rows.jsonl") == [json_safe(row)] * 2
    write_json(tmp_path / "results.json", json_safe(row))
    assert read_json(tmp_path / "results.json") == json_safe(row)
    assert is_clean((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert json.loads(to_json(json_safe(row))) == json_safe(row)


def test_splits_of_a_task_become_files_in_the_run(tmp_path: Path) -> None:
    config = config_of(evaluation__final_prompts=2)
    trainer = tiny_trainer(ppo().build(), config)
    task = trainer.components.task
    names = ["../above", "/root", CONCENTRATE, "x" * 400, "hard"]
    trainer.components = dataclasses.replace(
        trainer.components, task=dataclasses.replace(task, extra_test_splits=dict.fromkeys(names, task.test))
    )
    run = tmp_path / "run"
    directory = RunDirectory(run, config)
    run.mkdir()
    (run / "metrics.jsonl").write_text("")
    found = final_results(trainer, directory, resolve(config))
    assert list(found["evaluations"]) == names
    files = sorted(path.name for path in run.iterdir() if path.name.startswith("evaluation"))
    assert len(files) == 1 + len(names)
    assert all(map(is_clean, files))
    assert "evaluation-hard.jsonl" in files
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
