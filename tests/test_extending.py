"""The examples of docs/extending.md, docs/migrating.md and README.md are complete and run as they stand there."""

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import rlgf
from helpers import tiny_model
from rlgf.algorithms.registry import ALGORITHMS
from rlgf.cli.options import read_config
from rlgf.config.base import flatten, to_dict
from rlgf.config.loading import override
from rlgf.config.objects import SETTINGS
from rlgf.config.recipes import recipe

ROOT = Path(__file__).resolve().parents[1]
TITLED = re.compile(r'^```python title="(\w+)\.py"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
FILES = dict(TITLED.findall((ROOT / "docs" / "extending.md").read_text(encoding="utf-8")))
PRINTS = {  # what an example prints, as a regular expression
    "fading_guide": r"\[0\.5, 0\.5\]\n",
    "expert_guide": r"( superb \w+)+\n",
    "praise_reward": r"0\.\d+\n",
    "countdown_task": r"count down from \d+:\n",
    "length_metric": r"\[\d.*\] \d.*\n",
    "copy_sampler": r"1 1 \d\S*\n2 2 \d\S*\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all files of the page; stages that one example makes are reused by the next."""
    folder = tmp_path_factory.mktemp("extending")
    for name, code in FILES.items():
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    return folder


@pytest.fixture
def unchanged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in the folder, as a user's shell does; afterwards no module or algorithm of the examples is left."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    known = dict(ALGORITHMS)
    yield
    ALGORITHMS.clear()
    ALGORITHMS.update(known)
    for name in FILES:
        sys.modules.pop(name, None)


def test_every_kind_of_extension_has_an_example() -> None:
    assert set(FILES) == {"small", *PRINTS}


TRAINED = {"praise_reward", "countdown_task", "length_metric"}  # whole runs; the fast suite has one of those


@pytest.mark.integration
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.integration) if name in TRAINED else name for name in PRINTS]
)
@pytest.mark.usefixtures("unchanged")
def test_an_example_of_an_extension_runs(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")
    assert re.fullmatch(PRINTS[name], capsys.readouterr().out)


@pytest.mark.integration
def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny model in place of the Hub's two, and fewer iterations."""
    code = next(re.finditer(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL))[1]
    tiny_model().save(tmp_path / "tiny")
    small = {
        "ppo.iterations": 1, "ppo.completions_per_iteration": 4, "ppo.minibatch_size": 4, "task.max_new_tokens": 4,
        "evaluation.every": 0, "evaluation.final_prompts": 2, "evaluation.baselines": [], "runtime.trackers": [],
    }  # fmt: skip
    original = rlgf.train

    def train(**given: Any) -> rlgf.Trainer:
        settings = {**given.pop("settings"), **small}
        names = {"model": str(tmp_path / "tiny"), "guide": f"model:{tmp_path / 'tiny'}"}
        return original(**{**given, **names}, settings=settings)

    monkeypatch.setattr(rlgf, "train", train, raising=False)
    monkeypatch.chdir(tmp_path)
    words = ("plot", "cast", "story", "music", "sound", "script", "acting")
    found: dict[str, Any] = {"my_prompts": [f"review of : {word} =>" for word in words]}
    exec(code, found)
    assert found["policy"] is found["trainer"].components.models.policy.model
    assert (tmp_path / "runs" / "mine" / "policy" / "config.json").is_file()


def test_the_command_for_a_pretrained_model_has_the_settings_of_python() -> None:
    """docs/command-line.md gives on the command line what `rlgf.train(model=...)` sets over the recipe."""
    text = (ROOT / "docs" / "command-line.md").read_text()
    command = text[text.index("rlgf train prompts --data rows.jsonl --policy") :].partition("--out")[0].replace("\\\n", "")
    given = [word for word in command.split() if "=" in word and not word.startswith(("-", "reward.path"))]
    typed = flatten(to_dict(read_config("prompts", given, policy="gpt2")))
    # not read with a policy that is given, or about length and evaluations only
    ignored = ("recipe", "pretrain.", "sft.", "evaluation.", "ppo.iterations")
    expected = flatten(to_dict(override(recipe("prompts"), [*SETTINGS.items(), ("policy", "gpt2")])))
    differing = {key for key in expected if expected[key] != typed.get(key) and not key.startswith(ignored)}
    assert differing == set()


def test_code_of_other_pages_is_python() -> None:
    for page in ("migrating.md", "algorithms.md", "own-data.md"):
        for block in re.findall(r"^```python[^\n]*\n(.*?)^```$", (ROOT / "docs" / page).read_text(), re.MULTILINE | re.DOTALL):
            compile(block, page, "exec")
