"""Kill training runs with SIGKILL and compare their results with uninterrupted runs.

`python tools/kill.py --trials 50` trains a small run once without interruption, then kills it in
each trial at a random instant or within a named phase, starts it again until it ends, and compares
metrics, rollouts, evaluations, weights and checkpoints bit for bit. `--signal TERM` sends a signal
that the run handles: it leaves by itself, with a checkpoint. Settings are the algorithms
times the numbers of threads. The exit status is 0 where every trial is equal.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ALGORITHMS: dict[str, tuple[str, ...]] = {"ppo_pp": (), "d2lols": ("algorithm.options.d2lols.switch_iteration=3",)}
TIMES = ("seconds", "tokens_per_second")
SIGNALS = ("KILL", "INT", "TERM", "HUP", "USR1")
MAX_STARTS = 6  # of one trial; only the first start is killed
CHANGES = (
    "task.options={slots: 2, train_prompts: 64, held_out_prompts: 16}", "task.max_new_tokens=5", "task.min_new_tokens=0",
    "model.layers=1", "model.width=16", "model.heads=2", "guide.model.layers=1", "guide.model.width=16",
    "guide.model.heads=2", "sft.steps=12", "sft.batch_size=8", "guide.sft.steps=12", "guide.sft.batch_size=8",
    "guide.spec=trained", "ppo.iterations=6", "ppo.completions_per_iteration=8", "ppo.minibatch_size=4",
    "evaluation.every=2", "evaluation.prompts=4",
    "evaluation.final_prompts=8", "runtime.trackers=[]", "runtime.checkpoint_every=2", "reward.normalize=true",
    "kl.controller=adaptive",
)  # fmt: skip
FILES = (  # compared byte for byte
    "policy/model.safetensors", "best-policy/model.safetensors", "checkpoints/iteration-000004/tensors.safetensors",
    "checkpoints/iteration-000006/tensors.safetensors", "checkpoints/iteration-000006/state.json",
)  # fmt: skip
LOGS = ("metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl")
PHASES: dict[str, tuple[str, str, int]] = {  # a phase: module, attribute, largest number of calls to let pass
    "stage": ("rlgf.supervised.loop", "learning_rate_factor", 24),
    "stage written": ("rlgf.pipeline.stage_cache", "write_manifest", 2),
    "stage renamed": ("rlgf.pipeline.stage_cache", "replace_folder", 2),
    "rollout": ("rlgf.trainer", "collect_rollout", 6),
    "experience": ("rlgf.trainer", "make_experience", 6),
    "update": ("rlgf.rl.update", "learning_rate_factor", 24),
    "lines": ("rlgf.runs.logs", "to_checked_line", 48),
    "best policy": ("rlgf.runs.directory", "write_manifest", 3),
    "checkpoint": ("rlgf.runs.checkpoints", "save_state", 3),
    "checkpoint written": ("rlgf.runs.checkpoints", "write_manifest", 3),
    "checkpoint renamed": ("rlgf.runs.checkpoints", "replace_folder", 3),
    "evaluation": ("rlgf.trainer", "evaluate_policy", 3),
    "finishing": ("rlgf.pipeline.run", "final_results", 1),
    "any rename": ("os", "rename", 20),
    "any replacement": ("os", "replace", 20),
}


def main() -> int:
    """Run the trials and print how many were equal, by setting and phase."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=50, help="of each setting")
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=ALGORITHMS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument(
        "--signal", default="KILL", choices=SIGNALS, help="all but KILL are handled: the run may leave by itself"
    )
    options = parser.parse_args()
    number = signal.Signals[f"SIG{options.signal}"]
    failures = 0
    with tempfile.TemporaryDirectory(prefix="rlgf-kill-") as work:
        for algorithm in options.algorithms:
            for threads in options.threads:
                folder = Path(work) / f"{algorithm}-{threads}"
                failures += run_setting(folder, algorithm, threads, options.trials, random.Random(options.seed), number)
    print(f"{failures} trials differ" if failures else "every trial is equal")
    return min(failures, 1)


def run_setting(folder: Path, algorithm: str, threads: int, trials: int, draws: random.Random, number: signal.Signals) -> int:
    """Run all trials of one setting; return the number of those that differ."""
    arguments = [
        "train",
        "quickstart",
        "--algorithm",
        algorithm,
        *CHANGES,
        *ALGORITHMS[algorithm],
        f"runtime.threads={threads}",
    ]
    began = time.monotonic()
    status = wait(start([*arguments, "--out", str(folder / "whole")], folder / "whole.log"))
    if status:
        raise SystemExit(f"the run that is left alone failed: {(folder / 'whole.log').read_text()[-2000:]}")
    seconds = time.monotonic() - began
    outcomes, killed = Counter[str](), 0
    for trial in range(trials):
        out = folder / f"trial-{trial}"
        phase = None if trial % 2 else draws.choice(list(PHASES))
        was_killed, different = run_trial(arguments, out, phase, draws, seconds, number)
        killed += was_killed
        outcomes[phase or "any instant"] += 1
        if different:
            outcomes["DIFFERENT"] += 1
            print(f"{algorithm}, {threads} threads, trial {trial} ({phase or 'any instant'}): {different}", flush=True)
        else:
            shutil.rmtree(out)
    equal = trials - outcomes.pop("DIFFERENT", 0)
    print(
        f"{algorithm}, {threads} thread{'s' * (threads > 1)}: {equal} of {trials} equal, {killed} killed; "
        + ", ".join(f"{phase} {count}" for phase, count in sorted(outcomes.items())),
        flush=True,
    )
    return trials - equal


def run_trial(
    arguments: Sequence[str], out: Path, phase: str | None, draws: random.Random, seconds: float, signal_number: signal.Signals
) -> tuple[bool, str]:
    """Kill a run once, resume it, and return whether it was killed and what differs."""
    command, log = [*arguments, "--out", str(out)], out.with_suffix(".log")
    hook: Callable[[], None] | None = None
    if phase is not None:
        module, name, calls = PHASES[phase]
        number = draws.randrange(calls)

        def hook() -> None:
            die_at_call(module, name, number, signal_number)

    process = start(command, log, hook)
    if phase is None:
        time.sleep(draws.uniform(0, seconds))
        os.kill(process, signal_number)
    status = wait(process)  # minus the number where no handler was installed yet
    was_killed = status in (-signal_number, 128 + signal_number)
    if status and not was_killed:
        return False, f"it ends with {status}: {log.read_text()[-500:]}"
    for _ in range(MAX_STARTS):
        status = wait(start(command, log))
        if status == 0:
            return was_killed, compare(out.parent / "whole", out, keeps_earlier=signal_number == signal.SIGKILL)
    return was_killed, f"it does not end: {log.read_text()[-500:]}"


def start(arguments: Sequence[str], log: Path, hook: Callable[[], None] | None = None) -> int:
    """Start the command line in a fork of this process; return its pid."""
    import rlgf.cli.console
    import rlgf.pipeline.run  # noqa: F401

    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        if hook is not None:
            hook()
        sys.argv = ["rlgf", *arguments]
        from rlgf.cli import app

        app.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int) -> int:
    """Wait for a process; return its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die_at_call(module: str, name: str, number: int, signal_number: signal.Signals) -> None:
    """Send a signal to this process at a function's call, or after it for odd numbers."""
    import importlib

    place = importlib.import_module(module)
    original, seen = getattr(place, name), [0]

    def counted(*arguments: Any, **values: Any) -> Any:
        seen[0] += 1
        if seen[0] == number + 1:
            if number % 2:
                result = original(*arguments, **values)
                os.kill(os.getpid(), signal_number)
                return result
            os.kill(os.getpid(), signal_number)
        return original(*arguments, **values)

    setattr(place, name, counted)


def compare(whole: Path, parts: Path, keeps_earlier: bool) -> str:
    """Return the first difference of two runs, or an empty string.

    Without `keeps_earlier` the checkpoint before the last may be missing: a run that was signaled
    writes one more, and the last two are kept.
    """
    import json

    from rlgf.data.files import read_complete_lines

    for name in LOGS:
        rows = [
            [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in read_complete_lines(run / name)]
            for run in (whole, parts)
        ]
        if rows[0] != rows[1]:
            return f"{name} differs"
    for name in FILES:
        if name == FILES[2] and not keeps_earlier and not (parts / name).exists():
            continue
        if (whole / name).read_bytes() != (parts / name).read_bytes():
            return f"{name} differs"
    results = [json.loads((run / "results.json").read_text())["evaluation"] for run in (whole, parts)]
    if results[0] != results[1]:
        return "results.json differs"
    stray = [str(path.relative_to(parts)) for path in parts.rglob(".*")]
    return f"scratch is left: {', '.join(stray)}" if stray else ""


if __name__ == "__main__":
    sys.exit(main())
