"""A config's journey is recorded and counted as the docstring of tools/config_journey.py says."""

import importlib
import sys
import textwrap
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
PACKAGE = {
    "schema": """
        from dataclasses import dataclass

        @dataclass(frozen=True)
        class Config:
            seed: int = 0
            name: str = ""
    """,
    "start": """
        from journey_example.stages import Stage, forward

        def train(config):
            stage = Stage(config)
            forward(config)
            stage.run()
            return [config.seed for _ in range(2)]
    """,
    "stages": """
        from journey_example.models import build, read_seed

        class Stage:
            def __init__(self, config):
                self.config = config
                self.lines = []

            def run(self):
                self.lines.append("not about the config")
                read_seed(self.config.seed)

        def forward(config):
            build(config=config)
    """,
    "models": """
        def build(*, config):
            str(config)

        def read_seed(seed):
            return seed + 1
    """,
}


@pytest.fixture
def journey(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, imported as its own subprocess imports it."""
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("config_journey")


def test_a_step_back_up_leads_to_a_place_that_was_left_before(journey: ModuleType):
    counts = journey.count(list("abbacbcd"))
    assert (counts.places, counts.steps) == (4, 6)
    assert counts.back_up == Counter({("b", "a"): 1, ("c", "b"): 1, ("b", "c"): 1})


def test_a_way_that_only_goes_on_has_no_step_back_up(journey: ModuleType):
    counts = journey.count(list("aabccd"))
    assert (counts.places, counts.steps, counts.back_up.total()) == (4, 3, 0)


def test_functions_are_listed_by_the_steps_back_up_that_lead_to_them(journey: ModuleType):
    f, g, h = ("a.py", "f"), ("b.py", "g"), ("b.py", "h")
    assert journey.most_frequent(journey.count([f, g, f, h, f, g]), 1) == ["   2  a.py:f, from g (1), h (1)"]


def test_who_receives_passes_or_reads_a_config_is_recorded_in_order(
    journey: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "journey_example"
    folder.mkdir()
    for name, text in PACKAGE.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    schema, start = (importlib.import_module(f"journey_example.{name}") for name in ("schema", "start"))
    try:
        way = journey.Recorder((schema.Config,), folder).run(lambda: start.train(schema.Config(3)))
        assert way == [
            ("start.py", "train"), ("stages.py", "Stage.__init__"), ("start.py", "train"), ("stages.py", "forward"),
            ("models.py", "build"), ("stages.py", "Stage.run"), ("start.py", "train"),
        ]  # fmt: skip
        assert "__getattribute__" not in vars(schema.Config)
        assert sys.getprofile() is None
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "journey_example"]:
            del sys.modules[name]
