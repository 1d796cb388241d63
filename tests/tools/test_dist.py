"""The built distributions install into an empty environment and train there, away from the checkout."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "task.options.train_prompts=16", "task.options.held_out_prompts=4", "model.width=16", "guide.model.width=16", "sft.steps=2",
    "guide.sft.steps=2", "ppo.completions_per_iteration=4", "ppo.minibatch_size=4", "evaluation.every=0",
    "evaluation.final_prompts=4", "evaluation.baselines=[]", "runtime.trackers=[]", "runtime.threads=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def wheel() -> Path:
    """The wheel of `make dist`, built from the sdist; it needs the package registry."""
    built = subprocess.run(["make", "-C", str(ROOT), "dist"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, f"make dist fails (it needs the package registry): {built.stderr.strip()[-300:]}"
    return next((ROOT / "dist").glob("rlgf-*.whl"))


@pytest.mark.slow
def test_the_wheel_is_pure_python_and_complete(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    packaged = {name for name in names if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "src/rlgf"], capture_output=True, text=True, check=True
    ).stdout
    assert packaged == {name.removeprefix("src/") for name in tracked.split()}
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_trains_in_an_environment_of_its_own(wheel: Path, tmp_path: Path) -> None:
    """The dependencies are those of this environment, found by their folder: a full install takes minutes."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(purelib, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    assert run(python, "-c", "import rlgf; print(rlgf.__file__)").startswith(purelib)
    out = tmp_path / "run"
    command = ["train", "quickstart", "--algorithm", "d2lols", "--alpha", "2", "--iterations", "3"]
    run(folder / "bin" / "rlgf", *command, "--out", str(out), *SMALL)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert "pass_rate" in json.loads((out / "results.json").read_text())["evaluation"]


def run(program: Path, *arguments: str | Path) -> str:
    """Run a program in the folder of its environment, without this checkout, and return its output."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COVERAGE"))}
    cwd = program.parents[2]
    done = subprocess.run(
        [str(program), *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_python_of_this_environment_is_declared() -> None:
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    assert f"Programming Language :: Python :: 3.{sys.version_info.minor}" in declared
