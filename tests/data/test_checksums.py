"""Manifests and JSON files that check themselves: every changed bit is noticed."""

import json
import random
from pathlib import Path

import pytest

from rlgf.data.checksums import (
    DamagedError,
    content_identity,
    read_checked_json,
    replace_folder,
    set_aside,
    verify_folder,
    verify_manifest,
    write_checked_json,
    write_manifest,
)
from rlgf.errors import DataError


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "inner").mkdir(parents=True)
    (made / "weights").write_bytes(bytes(range(64)))
    (made / "inner" / "names.json").write_text('["ä"]')
    write_manifest(made, {"stage": "sft"})
    return made


def test_a_manifest_has_every_file_and_what_it_is_about(folder: Path) -> None:
    manifest = verify_manifest(folder)
    assert manifest["stage"] == "sft"
    assert sorted(manifest["files"]) == ["inner/names.json", "weights"]
    assert manifest["files"]["weights"]["size"] == 64


def test_every_flipped_bit_of_every_file_is_noticed(folder: Path) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) == 3
    draws = random.Random(0)
    for file in files:
        for bit in draws.sample(range(8 * file.stat().st_size), 40):
            flip(file, bit)
            with pytest.raises(DamagedError, match=r"weights|names|manifest"):
                verify_manifest(folder)
            flip(file, bit)
    verify_manifest(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "weights").unlink(), "weights is missing"),
        (lambda folder: (folder / "weights").write_bytes(b""), "0 bytes instead of 64"),
        (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "has no checksum"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "manifest.json").write_bytes(b"\xff\0"), "not valid JSON"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "not valid JSON"),
    ],
)
def test_damage_is_named(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(DamagedError, match=message):
        verify_manifest(folder)


def test_a_model_folder_without_a_manifest_is_not_verified(folder: Path) -> None:
    verify_folder(str(folder))
    flip(folder / "weights", 3)
    with pytest.raises(DataError, match=r"is damaged \(the checksum of .*weights differs"):
        verify_folder(str(folder))
    (folder / "manifest.json").unlink()
    verify_folder(str(folder))
    verify_folder("gpt2")


def test_the_identity_of_a_folder_is_its_content_and_not_its_place(folder: Path, tmp_path: Path) -> None:
    before = content_identity(str(folder))
    moved = folder.rename(tmp_path / "moved")
    assert content_identity(str(moved)) == before
    (moved / "manifest.json").unlink()
    assert sorted(content_identity(str(moved))) == sorted(before)
    (moved / "weights").write_bytes(bytes(range(1, 65)))
    assert content_identity(str(moved)) != before
    assert content_identity("gpt2") == "gpt2"
    assert content_identity(None) is None


def test_files_that_were_added_to_a_folder_with_a_manifest_belong_to_its_identity(folder: Path) -> None:
    before = content_identity(str(folder))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "a").write_text("a")
    assert content_identity(str(folder)) == before
    (folder / "chat_template.jinja").write_text("a")
    added = content_identity(str(folder))
    assert added != before
    (folder / "chat_template.jinja").write_text("b")
    assert content_identity(str(folder)) not in (before, added)


def test_a_text_that_no_file_can_have_as_its_name_is_its_own_identity() -> None:
    for text in ("{{ a.b }}/" * 500, "a\0b"):
        assert content_identity(text) == text


def test_a_checked_file_notices_changed_values_and_changed_spelling(tmp_path: Path) -> None:
    file = tmp_path / "value.json"
    write_checked_json(file, {"a": 0.1, "b": (1, None), "c": {"d": "ü"}})
    assert read_checked_json(file) == {"a": 0.1, "b": [1, None], "c": {"d": "ü"}}
    file.write_text(json.dumps(json.loads(file.read_text())))
    with pytest.raises(DamagedError, match="differs from its content"):
        read_checked_json(file)
    with pytest.raises(DamagedError, match="cannot be read"):
        read_checked_json(tmp_path / "missing.json")


def test_a_folder_is_replaced_and_a_damaged_one_is_kept_under_another_name(folder: Path, tmp_path: Path) -> None:
    scratch = tmp_path / ".scratch"
    scratch.mkdir()
    replace_folder(folder, scratch)
    assert [path.name for path in tmp_path.iterdir()] == ["made"]
    assert list(folder.iterdir()) == []
    assert set_aside(folder).name == "damaged-1-made"
    folder.mkdir()
    assert set_aside(folder).name == "damaged-2-made"


@pytest.mark.parametrize("name", ["policy", "best-policy", "critic-policy"])
def test_a_model_in_a_runs_folder_must_have_a_manifest(folder: Path, tmp_path: Path, name: str) -> None:
    model = folder.rename(tmp_path / name)
    (model / "manifest.json").unlink()
    verify_folder(str(model))
    for file in ("config.yaml", "identity.json"):
        (tmp_path / file).touch()
    for read in (verify_folder, content_identity):
        with pytest.raises(DataError, match=r"is damaged \(.*manifest.json is missing\): restore it"):
            read(str(model))


@pytest.mark.parametrize("text", ['{"my": "own"}', '{"files": ["a"]}', "[]", "a list of files", "[" * 9999])
def test_a_manifest_of_another_format_is_a_file_like_others(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(text)
    verify_folder(str(folder))
    before = content_identity(str(folder))
    assert "manifest.json" in dict(before)
    flip(folder / "weights", 3)
    assert content_identity(str(folder)) != before


@pytest.mark.parametrize("cut", [0, 30, -20])
def test_a_damaged_manifest_is_not_taken_for_another_format(folder: Path, cut: int) -> None:
    manifest = folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:cut])
    for read in (verify_folder, content_identity):
        with pytest.raises(DataError, match="is damaged"):
            read(str(folder))


def test_every_flipped_byte_of_a_manifest_is_noticed(folder: Path) -> None:
    manifest = folder / "manifest.json"
    for place in range(0, 8 * len(manifest.read_bytes()), 97):
        flip(manifest, place)
        with pytest.raises(DataError, match="is damaged"):
            verify_folder(str(folder))
        flip(manifest, place)
