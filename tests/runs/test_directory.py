"""The directory of a run: whose run it is."""

from pathlib import Path

import pytest

from rlgf.config.loading import override
from rlgf.config.recipes import quickstart
from rlgf.errors import ConfigError
from rlgf.runs.directory import RunDirectory


@pytest.mark.parametrize(
    "change", [("task.options.slots", 2), ("evaluation.sampling.greedy", True), ("task.options.right_aspect", 0.5)]
)
def test_a_setting_that_was_taken_away_makes_another_run(tmp_path: Path, change: tuple[str, object]):
    plain = quickstart()
    changed = override(plain, [change])
    RunDirectory(tmp_path, changed).create(changed)
    with pytest.raises(ConfigError, match="another run"):
        RunDirectory(tmp_path, plain)
