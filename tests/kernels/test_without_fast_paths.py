"""The core without its fast paths: the suite passes on a package that has nothing behind their door."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rlgf

TESTS = Path(__file__).resolve().parents[1]
PACKAGE = Path(rlgf.__file__).parent
SUITE = (
    "rl", "algorithms", "generation/test_decoder.py", "generation/test_sampling.py", "evaluation", "pipeline/test_run.py",
    "end_to_end",
)  # fmt: skip
DOOR = ("__init__.py", "dispatch.py")


@pytest.mark.slow
def test_the_core_passes_its_tests_without_the_fast_paths(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "src" / "rlgf", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (tmp_path / "src" / "rlgf" / "kernels").iterdir():
        if path.name not in DOOR:
            path.unlink()
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "kernels_off", "-p", "no:cacheprovider", *(f"tests/{path}" for path in SUITE)],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'src'}{os.pathsep}{TESTS}", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    told = ran.stdout[-5000:] + ran.stderr[-2000:]
    assert ran.returncode == 0, told
    passed = re.search(r"(\d+) passed", ran.stdout)
    assert passed is not None, told
    assert int(passed[1]) > 200, told
