"""Checkpoints: what is saved is loaded, and what was damaged is not."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rlgf.data.checksums import MANIFEST, read_checked_json, write_checked_json
from rlgf.errors import CheckpointError
from rlgf.runs.checkpoints import Checkpoints, load_state, save_state
from rlgf.types import FORMAT_VERSION

SHARED = torch.randn(3, 2)
STATE: dict[str, Any] = {
    "weights": {"a.b": torch.randn(4, 3), "half": torch.ones(2, dtype=torch.bfloat16), "transposed": torch.randn(2, 3).T},
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "groups": [{"betas": (0.9, 0.999)}]},
    "tied": [SHARED, SHARED],
    "numbers": [1, 2.5, None, True, "text", 0.1 + 0.2, float("inf")],
    "empty": {"list": [], "tuple": (), "tensor": torch.zeros(0)},
}  # fmt: skip


def same(some: Any, other: Any) -> bool:
    if isinstance(some, torch.Tensor):
        return isinstance(other, torch.Tensor) and some.dtype == other.dtype and torch.equal(some, other)
    if isinstance(some, dict):
        return isinstance(other, dict) and list(some) == list(other) and all(same(some[key], other[key]) for key in some)
    if isinstance(some, list | tuple):
        return type(some) is type(other) and len(some) == len(other) and all(map(same, some, other))
    return type(some) is type(other) and some == other


class Warnings(list[str]):
    def __call__(self, line: str) -> None:
        self.append(line)


def checkpoints_in(folder: Path, run: str = "this", *accepted: str) -> tuple[Checkpoints, Warnings]:
    warn = Warnings()
    return Checkpoints(folder / "checkpoints", 2, run, (run, *accepted), warn), warn


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    save_state(tmp_path, STATE)
    assert same(STATE, load_state(tmp_path))
    assert (tmp_path / "tensors.safetensors").stat().st_size < 2_000  # the tied tensor is stored once


def test_what_a_checkpoint_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a\.b\.0 is a set"):
        save_state(tmp_path, {"a": {"b": [{1}]}})


def test_the_newest_checkpoints_are_kept_and_the_order_is_by_number(tmp_path: Path) -> None:
    checkpoints, warnings = checkpoints_in(tmp_path)
    assert checkpoints.load() is None
    for iteration in (5, 999_999, 1_000_000):
        checkpoints.save(iteration, {"n": iteration})
    assert checkpoints.iterations() == [999_999, 1_000_000]
    assert checkpoints.load() == (1_000_000, {"n": 1_000_000})
    checkpoints.save(1_000_000, {"n": -1})  # again, as after an error
    assert checkpoints.load() == (1_000_000, {"n": -1})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["iteration-1000000", "iteration-999999"]
    assert warnings == []


def test_stray_names_are_ignored_with_a_warning(tmp_path: Path) -> None:
    checkpoints, warnings = checkpoints_in(tmp_path)
    checkpoints.save(3, {"n": 3})
    folder = tmp_path / "checkpoints"
    # the last two are other names of numbers, which would count as checkpoints that are kept
    for name in ("iteration-9", "iteration-abc", "iteration-000007.bak", "notes", "iteration-0000009", "iteration-00000٣"):
        (folder / name).mkdir()
    (folder / "iteration-000008").write_text("")
    assert checkpoints.load() == (3, {"n": 3})
    assert checkpoints.iterations() == [3]
    assert len(warnings) == 7
    assert all("is not a checkpoint: ignored" in line for line in warnings)


def test_a_flipped_bit_anywhere_leads_to_the_checkpoint_before(tmp_path: Path) -> None:
    checkpoints, warnings = checkpoints_in(tmp_path)
    for iteration in (1, 2):
        checkpoints.save(iteration, {**STATE, "n": iteration})
    whole = tmp_path / "whole"
    shutil.copytree(tmp_path / "checkpoints", whole)
    names = [file.name for file in sorted((whole / "iteration-000002").iterdir())]
    assert names == ["manifest.json", "state.json", "tensors.safetensors"]
    draws = random.Random(1)
    for name in names:
        for _ in range(12):
            shutil.rmtree(tmp_path / "checkpoints")
            shutil.copytree(whole, tmp_path / "checkpoints")
            file = tmp_path / "checkpoints" / "iteration-000002" / name
            content = bytearray(file.read_bytes())
            bit = draws.randrange(8 * len(content))
            content[bit // 8] ^= 1 << bit % 8
            file.write_bytes(content)
            found = checkpoints.load()
            assert found is not None
            assert found[0] == found[1]["n"] == 1
            assert warnings.pop().startswith("iteration-000002 is not used: ")
            assert (tmp_path / "checkpoints" / "damaged-1-iteration-000002").is_dir()


@pytest.mark.parametrize("name", ["manifest.json", "state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_without_a_whole_checkpoint_the_run_stops_with_one_sentence(tmp_path: Path, name: str, damage: str) -> None:
    checkpoints, _ = checkpoints_in(tmp_path)
    checkpoints.save(4, STATE)
    file = tmp_path / "checkpoints" / "iteration-000004" / name
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        file.write_bytes(b"" if damage == "empty" else content[:-9])
    with pytest.raises(CheckpointError, match=rf"no checkpoint in .* can be used \(.*{name}.*restore one, or remove"):
        checkpoints.load()
    assert (tmp_path / "checkpoints" / "iteration-000004").is_dir()  # left for whoever restores it


def test_a_checkpoint_of_another_run_or_iteration_is_not_used(tmp_path: Path) -> None:
    other, _ = checkpoints_in(tmp_path, "other")
    other.save(9, {"n": 9})
    mine, warnings = checkpoints_in(tmp_path)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        mine.load()
    mine.save(3, {"n": 3})
    assert mine.load() == (3, {"n": 3})
    assert "belongs to another run" in warnings[0]
    assert checkpoints_in(tmp_path, "later", "this")[0].load() == (3, {"n": 3})
    (tmp_path / "checkpoints" / "iteration-000003").rename(tmp_path / "checkpoints" / "iteration-000006")
    with pytest.raises(CheckpointError, match="holds the state after 3 iterations"):
        mine.load()


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path) -> None:
    checkpoints, _ = checkpoints_in(tmp_path)
    checkpoints.save(3, {"n": 3})
    manifest = tmp_path / "checkpoints" / "iteration-000003" / "manifest.json"
    write_checked_json(manifest, {**read_checked_json(manifest), "format_version": 0})
    with pytest.raises(CheckpointError, match="has format version 0, and this rlgf reads version 1"):
        checkpoints.load()


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints is not a folder: move it away"):
        checkpoints_in(tmp_path)[0].load()


def test_scratch_folders_of_killed_processes_go_with_the_next_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".writing-abc").mkdir(parents=True)
    checkpoints, warnings = checkpoints_in(tmp_path)
    assert checkpoints.load() is None
    checkpoints.save(1, {})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-000001"]
    assert warnings == []


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, _ = checkpoints_in(tmp_path)
    checkpoints.save(1, {"n": 1})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlgf.runs.checkpoints.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(1, {"n": 2})
    assert checkpoints.load() == (1, {"n": 1})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["iteration-000001"]


@pytest.mark.parametrize("files", [None, [1], {"a": 1}, {"a": {"size": 0}}], ids=repr)
def test_a_manifest_of_another_shape_leads_to_the_checkpoint_before(tmp_path: Path, files: object) -> None:
    checkpoints, warnings = checkpoints_in(tmp_path)
    checkpoints.save(1, {"n": 1})
    checkpoints.save(2, {"n": 2})
    manifest = tmp_path / "checkpoints" / "iteration-000002" / MANIFEST
    write_checked_json(manifest, {"format_version": FORMAT_VERSION, "files": files})
    assert checkpoints.load() == (1, {"n": 1})
    assert "is no manifest" in warnings[0]
