"""Trackers of a run that goes on: the same run, and no iteration twice."""

import errno
import os
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from rlgf.runs.tracking import RUNS, Trackers


def events_of(folder: Path) -> list[Event]:
    """The events of a folder in the order in which TensorBoard reads them: by file, then by place."""
    found: list[Event] = []
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event()
            event.ParseFromString(content[12 : 12 + size])  # between the checksums of size and content
            found.append(event)
            content = content[16 + size :]
    return found


def shown_steps(folder: Path) -> list[int]:
    """The steps of 'score' that TensorBoard shows: a session that starts drops later steps of those before."""
    steps: list[int] = []
    for event in events_of(folder):
        if event.session_log.status == SessionLog.START:
            steps = [step for step in steps if step < event.step]
        steps += [event.step for value in event.summary.value if value.tag == "score"]
    return steps


def log_iterations(folder: Path, first: int, last: int, name: str = "tensorboard") -> Trackers:
    """Log the iterations from `first` to `last`, as a process does that is then killed or ends."""
    trackers = Trackers([name], folder, {"seed": 0}, first)
    for iteration in range(first, last):
        trackers.log({"score": iteration / 7, "phases": ["policy"]}, iteration)
    trackers.finish()
    return trackers


def test_tensorboard_shows_each_iteration_once_after_a_kill(tmp_path: Path) -> None:
    log_iterations(tmp_path, 0, 5)  # killed after five, the last checkpoint is after two
    log_iterations(tmp_path, 2, 4)  # killed again
    log_iterations(tmp_path, 2, 6)
    files = list(tmp_path.rglob("events.out.tfevents.*"))
    assert len(files) == 3  # though they began in the same second
    logged = [event.step for event in events_of(tmp_path) for value in event.summary.value if value.tag == "score"]
    assert sorted(logged) == [0, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5]
    assert shown_steps(tmp_path) == [0, 1, 2, 3, 4, 5]


class Service:
    """A fake of wandb or trackio: it keeps runs by identity, and refuses steps out of order, as wandb does."""

    def __init__(self, key: str) -> None:
        self.key, self.runs = key, dict[str, list[int]]()
        self.calls: list[dict[str, Any]] = []
        self.config = SimpleNamespace(update=lambda values, allow_val_change: None)

    def init(self, project: str, **options: Any) -> SimpleNamespace:
        self.calls.append(options)
        steps = self.runs.setdefault(options[self.key], [])
        next_step = steps[-1] + 1 if steps else 0

        def log(values: dict[str, Any], step: int) -> None:
            assert step == (steps[-1] + 1 if steps else 0), "a step that the run has"
            steps.append(step)

        own = {"starting_step": next_step} if self.key == "id" else {"_next_step": next_step}
        return SimpleNamespace(log=log, finish=lambda: None, **own)


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_a_service_gets_the_same_run_and_each_iteration_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str
) -> None:
    service = Service(key)
    monkeypatch.setitem(sys.modules, name, service)
    log_iterations(tmp_path / "run" / "trackers", 0, 5, name)
    log_iterations(tmp_path / "run" / "trackers", 2, 8, name)
    log_iterations(tmp_path / "other" / "trackers", 0, 1, name)
    assert sorted(map(len, service.runs.values())) == [1, 8]
    assert [call["resume"] for call in service.calls] == ["allow"] * 3
    assert service.calls[0][key] == service.calls[1][key] != service.calls[2][key]


@pytest.mark.parametrize("content", [b"\0\0\0", b"[]", b'{"wandb": 3}', b"\xff"])
def test_a_damaged_identity_begins_a_new_run_of_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    service = Service("id")
    monkeypatch.setitem(sys.modules, "wandb", service)
    (tmp_path / RUNS).write_bytes(content)
    log_iterations(tmp_path, 0, 2, "wandb")
    log_iterations(tmp_path, 1, 3, "wandb")
    assert list(service.runs.values()) == [[0, 1, 2]]


def test_a_full_disk_under_tensorboard_is_an_error_and_no_endless_wait(tmp_path: Path) -> None:
    """Its thread writes; without it, a queue would fill up and `log` would wait."""
    trackers = Trackers(["tensorboard"], tmp_path, {})
    (tracker, _), *_ = trackers.trackers
    events = tracker.writer.file_writer.event_writer._ev_writer

    class Full:
        def write(self, content: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "events.out")

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    events._py_recordio_writer, replaced = Full(), events._py_recordio_writer
    replaced.close()

    def log_many() -> None:
        for step in range(100):
            trackers.log({f"metric{n}": 1.0 for n in range(30)}, step)

    with pytest.raises(OSError, match="No space left"):
        log_many()
    with pytest.raises(OSError, match="No space left"):
        trackers.finish()
