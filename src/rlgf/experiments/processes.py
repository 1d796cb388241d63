"""The runs of a comparison in processes of their own."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rlgf.errors import Interrupted, TrainingError
from rlgf.interrupts import before_leaving, deferred
from rlgf.pipeline.resolve import ResolvedRun
from rlgf.pipeline.stage_cache import StageCache
from rlgf.runs.directory import RunDirectory
from rlgf.runs.machine import choose_num_threads

POLL_SECONDS = 0.2
LOG = "log.txt"
Running = dict[Path, "subprocess.Popen[bytes]"]


def run_in_processes(runs: Sequence[tuple[ResolvedRun, RunDirectory]], cache: StageCache, jobs: int) -> None:
    """Run each run in a separate process, `jobs` at a time.

    The threads are divided among them. A signal is sent on to the processes, which are waited for.

    Raises:
        TrainingError: a run failed; the others are interrupted.
        Interrupted: a signal arrived.
    """
    configured = max((run.trainer.runtime.threads for run, _ in runs), default=0)
    threads = max(1, choose_num_threads(configured)[0] // jobs)
    waiting, running = list(runs), Running()

    def kill_all() -> None:
        for process in running.values():
            process.kill()

    with before_leaving(kill_all):
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    with deferred("the start of a run"):
                        run, directory = waiting.pop(0)
                        running[directory.folder] = _start(run, directory, cache, threads)
                    cache.report(f"started {directory.folder.name}")
                time.sleep(POLL_SECONDS)
                for folder in _ended(running):
                    cache.report(f"finished {folder.name} ({len(waiting) + len(running)} to go)")
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Interrupted) else signal.SIGINT
            stopped = _stop(running, number)
            raise Interrupted(
                number, f"stopped {', '.join(stopped) or 'before a run'}: the same command resumes, see {LOG} of each run."
            ) from None
        finally:
            _stop(running, signal.SIGTERM)


def _start(run: ResolvedRun, directory: RunDirectory, cache: StageCache, threads: int) -> "subprocess.Popen[bytes]":
    """Start a run; its output goes to `log.txt` in its folder."""
    folder = directory.folder
    directory.create(run.config)
    command = [sys.executable, "-m", "rlgf", "train", str(folder / "config.yaml"), "--out", str(folder)]
    command += ["--stages", str(cache.folder), "--no-baselines", f"runtime.threads={threads}"]
    with (folder / LOG).open("w") as log:
        # a session of its own, so that Ctrl-C reaches it once, by this process
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _ended(running: Running) -> list[Path]:
    """Remove the processes that ended, and return their folders; raise if one failed."""
    ended = [folder for folder, process in running.items() if process.poll() is not None]
    for folder in ended:
        if code := running.pop(folder).returncode:
            tail = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise TrainingError(f"{folder.name} ended with exit code {code}: {' '.join(tail)}")
    return ended


def _stop(running: Running, number: int) -> list[str]:
    """Send a signal to all processes, wait, and return the names of their runs."""
    for process in running.values():
        process.send_signal(number)
    for process in running.values():
        process.wait()
    names = [folder.name for folder in running]
    running.clear()
    return names
