"""The directory of a run: whose run it is."""

from pathlib import Path

import pytest

from hostile import is_clean
from rlgf.config.loading import override
from rlgf.config.recipes import quickstart
from rlgf.data.checksums import read_checked_json, write_checked_json
from rlgf.errors import ConfigError, DataError
from rlgf.pipeline.stage_cache import StageCache, no_report
from rlgf.runs.directory import RunDirectory, read_results
from rlgf.runs.logs import append_rows


@pytest.mark.parametrize(
    "change", [("task.options.slots", 2), ("evaluation.sampling.greedy", True), ("task.options.right_aspect", 0.5)]
)
def test_a_setting_that_was_taken_away_makes_another_run(tmp_path: Path, change: tuple[str, object]):
    plain = quickstart()
    changed = override(plain, [change])
    RunDirectory(tmp_path, changed).create(changed)
    with pytest.raises(ConfigError, match="another run"):
        RunDirectory(tmp_path, plain)


@pytest.mark.parametrize(
    "name", ["config.yaml", "identity.json", "results.json", "metrics.jsonl", "evaluation.jsonl", "guide.json"]
)
def test_a_folder_in_the_place_of_a_file_is_noticed_at_the_start(tmp_path: Path, name: str) -> None:
    config = quickstart()
    RunDirectory(tmp_path, config).create(config)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(ConfigError, match=f"{name} is a folder, and a run has a file there: move it away"):
        RunDirectory(tmp_path, config)


@pytest.mark.parametrize(
    "change",
    [{"history": []}, {"history": {}}, {"history": [{}]}, {"history": [1]}, {"config_sha256": None}, {"config_sha256": []}],
)
def test_an_identity_of_another_shape_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    config = quickstart()
    RunDirectory(tmp_path, config).create(config)
    path = tmp_path / "identity.json"
    write_checked_json(path, read_checked_json(path) | change)
    with pytest.raises(DataError, match=r"identity\.json does not hold the identities of a run: restore it"):
        RunDirectory(tmp_path, config)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"evaluation": [1]},
        {"evaluation": {"score": "1"}},
        {"evaluation": {}, "evaluations": {"x": [1]}},
        {"evaluation": None},
    ],
)
def test_results_of_another_shape_are_refused(tmp_path: Path, content: dict[str, object]) -> None:
    path = tmp_path / "results.json"
    write_checked_json(path, {"format_version": 1, **content})
    with pytest.raises(DataError, match=r"results\.json has no evaluation of numbers: restore it, or remove it"):
        read_results(path)
    write_checked_json(path, {"format_version": 1, "evaluation": {"score": 1.5, "kl": None}})
    assert read_results(path)["evaluation"]["score"] == 1.5


@pytest.mark.parametrize(
    ("rows", "done", "has_policy", "is_kept"),
    [
        (5, 0, False, True),
        (5, 2, False, True),
        (5, 4, False, False),
        (2, 0, False, False),
        (2, 0, True, True),
        (0, 0, True, False),
    ],
)
def test_logs_of_iterations_whose_checkpoint_is_missing_are_kept(
    tmp_path: Path, rows: int, done: int, has_policy: bool, is_kept: bool
) -> None:
    config, warnings = override(quickstart(), [("runtime.checkpoint_every", 2)]), list[str]()
    directory = RunDirectory(tmp_path, config, warn=warnings.append)
    directory.create(config)
    append_rows(tmp_path / "metrics.jsonl", [{"iteration": number, "seconds": 1.0} for number in range(rows)])
    append_rows(tmp_path / "rollouts.jsonl", [{"iteration": number} for number in range(rows)])
    if has_policy:
        (tmp_path / "policy").mkdir()
    before = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "rollouts.jsonl")}
    directory.drop_lines_after(done)
    assert len(directory.read_metrics()) == done
    copies = {path.name.removesuffix(".before-1"): path.read_bytes() for path in tmp_path.glob("*.before-1")}
    assert copies == (before if is_kept else {})
    assert len(warnings) == is_kept
    assert (
        not warnings or f"goes on after {done} iterations, and copies of the logs are in metrics.jsonl.before-1" in warnings[0]
    )


@pytest.mark.parametrize("name", ["a\0b", "a\udcffb"])
def test_a_path_that_some_library_cannot_write_to_is_refused_at_the_start(tmp_path: Path, name: str) -> None:
    """A lone surrogate is how Python shows a byte that is not UTF-8; the tokenizers library fails on it at the end."""
    with pytest.raises(ConfigError, match=r"is not a path in UTF-8 without NUL: choose another --out\.$") as caught:
        RunDirectory(tmp_path / name, quickstart())
    assert is_clean(str(caught.value))
    for at, option in ((None, "--stages"), (tmp_path / name, "--out")):
        with pytest.raises(ConfigError, match=f"choose another {option}"):
            StageCache(tmp_path / name, no_report).build("sft", {}, lambda folder: {}, at)
