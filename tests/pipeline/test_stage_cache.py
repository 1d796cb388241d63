"""Stages on disk when two processes need the same one."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlgf.data import lock
from rlgf.pipeline.stage_cache import StageCache


def test_of_two_that_need_a_stage_one_builds_it_and_the_other_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Locks are those of open files: two threads exclude each other as two processes do."""
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    begun, told, finish = threading.Event(), threading.Event(), threading.Event()
    built, lines = list[str](), list[str]()

    def report(line: str) -> None:
        lines.append(line)
        if "waiting" in line:
            told.set()

    def build(folder: Path) -> Mapping[str, Any]:
        built.append(folder.name)
        (folder / "weights").write_text("trained")
        begun.set()
        assert finish.wait(20)
        return {"loss": 1.0}

    cache, found = StageCache(tmp_path, report), list[Path]()
    threads = [threading.Thread(target=lambda: found.append(cache.build("sft", {"seed": 0}, build))) for _ in range(2)]
    threads[0].start()
    assert begun.wait(20)
    threads[1].start()
    assert told.wait(20)
    finish.set()
    for thread in threads:
        thread.join(20)
    (stage,) = tmp_path.iterdir()
    assert found == [stage, stage]
    assert len(built) == 1
    assert [line.partition(":")[0] for line in lines] == ["sft", stage.name, "sft"]
    assert lines[0] == f"sft: making {stage.name}"
    assert lines[1].startswith(f"{stage.name}: waiting for process ")
    assert lines[2] == f"sft: reusing {stage.name}"
