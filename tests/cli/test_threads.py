"""The number of threads: what decides it, where it is said, and that waiting threads sleep."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import FEW_PROMPTS, small
from rlgf.cli import app, console
from rlgf.errors import ConfigError
from rlgf.experiments import processes
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.run import train
from rlgf.pipeline.stage_cache import StageCache, no_report
from rlgf.runs.directory import RunDirectory
from rlgf.runs.machine import choose_num_threads, describe_threads

CORES = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("configured", "variable", "expected"),
    [
        (0, None, (CORES, "all cores")), (0, "", (CORES, "all cores")), (0, "3", (3, "OMP_NUM_THREADS")),
        (0, " 3,2 ", (3, "OMP_NUM_THREADS")), (5, "3", (5, "runtime.threads")), (5, "many", (5, "runtime.threads")),
    ],
)  # fmt: skip
def test_threads_are_the_configs_else_the_environments_else_all_cores(
    configured: int, variable: str | None, expected: tuple[int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert choose_num_threads(configured) == expected


@pytest.mark.parametrize("variable", ["0", "-1", "many", "1.5", "²", "3 4", "1025", "9" * 20, "9" * 5000])
def test_a_number_of_threads_that_is_none_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    with pytest.raises(ConfigError, match=r"OMP_NUM_THREADS is .* but must be a whole number from 1 to 1,024: fix or unset it"):
        choose_num_threads()


def test_the_command_line_honors_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    console.configure_runtime(small())
    assert torch.get_num_threads() == 3
    console.configure_runtime(small(("runtime.threads", 2)))
    assert torch.get_num_threads() == 2


def test_a_dry_run_says_the_number_and_its_reason(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(
        "sys.argv",
        ["rlgf", "train", "quickstart", "--dry-run", *FEW_PROMPTS],
    )
    with pytest.raises(SystemExit):
        app.main()
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert ["threads", "3 (OMP_NUM_THREADS)"] in lines


@pytest.mark.integration
def test_the_first_line_of_a_run_and_its_results_say_the_number(tmp_path: Path) -> None:
    lines: list[str] = []
    torch.set_num_threads(1)
    train(small(("ppo.iterations", 1)), tmp_path / "run", tmp_path / "stages", lines.append)
    assert lines[0] == "PPO on toy_reviews, seed 0: cpu, fp32, 1 thread"
    assert json.loads((tmp_path / "run" / "results.json").read_text())["machine"]["threads"] == 1


def test_it_is_said_that_waiting_threads_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert describe_threads(2) == "2 threads, which sleep while they wait"
    assert describe_threads(1) == "1 thread"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert describe_threads(2) == "2 threads"


@pytest.mark.parametrize(("configured", "jobs", "each"), [(6, 2, 3), (6, 4, 1), (1, 2, 1), (0, 2, 2)])
def test_runs_at_a_time_share_the_threads(
    configured: int, jobs: int, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    class Finished:
        returncode = 0

        def __class_getitem__(cls, kind: type) -> type:
            return cls

        def __init__(self, command: list[str], **options: Any) -> None:
            commands.append(command)

        def poll(self) -> int:
            return 0

    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setattr(processes.subprocess, "Popen", Finished)
    monkeypatch.setattr(processes.time, "sleep", lambda seconds: None)
    config = small(("runtime.threads", configured))
    processes.run_in_processes(
        [(resolve(config), RunDirectory(tmp_path / "run", config))], StageCache(tmp_path / "stages", no_report), jobs
    )
    assert commands[0][-1] == f"runtime.threads={each}"


@pytest.mark.parametrize(
    ("runs", "given", "expected"),
    [
        ("0.00 0.01 0.05 1/90 77", None, None), ("0.00 0.01 0.05 2/90 77", None, "PASSIVE"), ("7 7 7 1/90 77", None, None),
        ("0.00 0.01 0.05 2/90 77", "ACTIVE", "ACTIVE"), ("0.00 0.01 0.05 1/90 77", "PASSIVE", "PASSIVE"),
        ("", None, None), ("no", None, None), (None, None, None),
    ],
)  # fmt: skip
def test_waiting_threads_sleep_if_others_run_unless_the_environment_says_otherwise(
    runs: str | None, given: str | None, expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if runs is not None:
        (tmp_path / "loadavg").write_text(runs)
    monkeypatch.setattr(app, "LOADAVG", tmp_path / "loadavg")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    app.choose_wait_policy()
    assert os.environ.get("OMP_WAIT_POLICY") == expected


def test_a_busy_process_is_noticed() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            assert app.is_machine_busy() or not app.LOADAVG.exists()
        finally:
            process.kill()


CODE = """
import os, sys
from rlgf.cli import app
app.app = lambda: None  # what main() runs
app.is_machine_busy = lambda: True
app.main()
print("torch" in sys.modules)
import torch
"""


@pytest.mark.slow
def test_openmp_reads_what_the_command_line_has_set() -> None:
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    told = {**inherited, "OMP_DISPLAY_ENV": "TRUE"}
    ran = subprocess.run([sys.executable, "-c", CODE], env=told, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"  # OpenMP reads it when torch is imported
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in ran.stderr
