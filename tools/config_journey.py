"""Count how a config travels through `rlgf.train`: `python tools/config_journey.py a054cfe HEAD`.

One short run on toy reviews is traced: two iterations of D2LOLS with a guide, a reward model and a
judge that are trained here, distillation, and an evaluation with every baseline. Recorded is each
function of the package that receives the whole `Config` as an argument, passes it to a function
that receives it, or reads a field of it, wherever it is stored. Counted are these functions, with
what is nested in them; a step leads from one to another, and a step back up to one that the config
has left before. The same is counted for files, of which only the changes from file to file are
steps.

At a054cfe this gives 60 functions and 131 steps back up; an earlier count, by another method,
gave 58 and 127. Moving a function to another file changes the counts of files only.
Each further iteration adds the functions of the training loop again. Not counted are sections
(`config.ppo`), objects that hold them other than a `ResolvedRun`, the construction of the config
before `train`, and threads other than the one of `train`. Commits are extracted from git; `.` is
the working tree.
"""

import argparse
import dataclasses
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
Place = tuple[str, str]  # a file of the package and a function in it

SETTINGS: dict[str, Any] = {
    "task.max_new_tokens": 4, "task.min_new_tokens": 2, "sft.steps": 2, "guide.spec": "trained", "guide.sft.steps": 2,
    "distill.num_completions": 4, "distill.steps": 2, "algorithm.name": "d2lols", "reward.path": "preferences",
    "judge.spec": "preferences", "preferences.min_words": 0, "preferences.training.steps": 2,
    "preferences.training.batch_size": 4, "ppo.iterations": 2, "ppo.completions_per_iteration": 4,
    "ppo.minibatch_size": 4, "ppo.mle_coefficient": 0.1, "evaluation.every": 1, "evaluation.prompts": 4,
    "evaluation.final_prompts": 4, "evaluation.output_perplexity": True, "evaluation.best_of": 2,
    "evaluation.baselines": ("zero_shot", "sft", "guide"), "runtime.kernels": "off",
}  # fmt: skip
TASK_OPTIONS = {"task.options.train_prompts": 16, "task.options.held_out_prompts": 8}
FIRST, SECOND = ("acting", "plot", "music", "script", "cast", "pacing"), ("ending", "camera", "sound", "story", "editing")


@dataclass(frozen=True)
class Journey:
    """The counts of a sequence of functions or files."""

    places: int
    steps: int
    back_up: Counter[tuple[Any, Any]]  # every step back up, from where to where


def main() -> int:
    """Trace each commit; print its counts and the last one's most frequent steps back up."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("commits", nargs="*", default=["."], help="commits to measure; '.' is the working tree")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="list the N functions with most steps back up")
    parser.add_argument("--record", type=Path, metavar="FILE", help=argparse.SUPPRESS)  # what a subprocess does
    options = parser.parse_args()
    if options.record:
        options.record.write_text(json.dumps(trace_training()), encoding="utf-8")
        return 0
    ways = {commit: trace(commit) for commit in options.commits}
    print(f"{'commit':<12} {'functions':>9} {'steps':>6} {'back up':>8}   {'files':>6} {'steps':>6} {'back up':>8}")
    for commit, way in ways.items():
        print(f"{commit:<12} {describe(count(way))}   {describe(count([file for file, _ in way]))}")
    for line in most_frequent(count(ways[options.commits[-1]]), options.show):
        print(line)
    return 0


def count(way: Sequence[Any]) -> Journey:
    """Return the counts of a sequence of places, in which immediate repetitions are one place."""
    steps = [(start, end) for start, end in pairwise(way) if start != end]
    seen = set(way[:1])
    back_up: Counter[tuple[Any, Any]] = Counter()
    for start, end in steps:
        if end in seen:
            back_up[start, end] += 1
        seen.add(end)
    return Journey(len(seen), len(steps), back_up)


def describe(journey: Journey) -> str:
    """Return the counts as three columns."""
    return f"{journey.places:>6} {journey.steps:>6} {journey.back_up.total():>8}"


def most_frequent(journey: Journey, number: int) -> list[str]:
    """Return a line for each function with the most steps back up, with their origins."""
    lines: list[str] = []
    ends: Counter[Place] = Counter()
    for (_, end), times in journey.back_up.items():
        ends[end] += times
    for end, times in ends.most_common(number):
        origins = {start[1]: n for (start, target), n in journey.back_up.most_common() if target == end}
        lines.append(f"{times:>4}  {':'.join(end)}, from {', '.join(f'{name} ({n})' for name, n in origins.items())}")
    return lines


def trace(commit: str) -> list[Place]:
    """Return the places that a config passes in a commit, traced in a separate process."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tree = ROOT if commit == "." else extract(commit, folder / "tree")
        environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "PYTHONHASHSEED": "0"}
        out = folder / "way.json"
        command = [sys.executable, __file__, "--record", str(out)]
        run = subprocess.run(command, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)
        if run.returncode:
            sys.exit(f"{run.stderr}\nconfig_journey: the run of {commit} failed: fix the error above, or leave the commit out.")
        return [(file, function) for file, function in json.loads(out.read_text(encoding="utf-8"))]


def extract(commit: str, folder: Path) -> Path:
    """Write the sources of a commit to a folder and return it."""
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", commit, "src"], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def trace_training() -> list[Place]:
    """Train a short run in the current folder and return its places."""
    import golden
    import torch

    import rlgf

    torch.set_num_threads(1)
    Path("pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in preference_pairs()), encoding="utf-8")
    config = golden.configure(rlgf, [*SETTINGS.items(), ("preferences.data", "pairs.jsonl")])
    config = rlgf.override(config, list(TASK_OPTIONS.items()))
    recorder = Recorder((type(config), *resolved_run()), Path(rlgf.__file__).parent)
    return recorder.run(lambda: rlgf.train(config, out=Path("run")))


def resolved_run() -> tuple[type, ...]:
    """Return the class of resolved runs, traced like a config; empty if there is none."""
    try:
        from rlgf.pipeline.resolve import ResolvedRun
    except ImportError:
        return ()
    return (ResolvedRun,)


def preference_pairs() -> list[dict[str, str]]:
    """Return enough pairs for a reward model, a judge and a held-out split."""
    prompts = [f"review of : {first} {second} =>" for first in FIRST for second in SECOND]
    return [{"prompt": prompt, "chosen": " great plot", "rejected": " dull"} for prompt in prompts]


class Recorder:
    """The places in a package that instances of dataclasses pass while a function runs."""

    def __init__(self, kinds: tuple[type, ...], package: Path) -> None:
        self.kinds, self.package = kinds, package
        self.way: list[Place] = []

    def run(self, function: Callable[[], Any]) -> list[Place]:
        """Call the function and return the places in order; immediate repetitions are one place."""
        thread = threading.get_ident()

        def reader(fields: set[str]) -> Callable[[Any, str], Any]:
            def read(instance: Any, name: str) -> Any:
                if name in fields and threading.get_ident() == thread:
                    self._add(sys._getframe(1))
                return object.__getattribute__(instance, name)

            return read

        for kind in self.kinds:
            setattr(kind, "__getattribute__", reader({field.name for field in dataclasses.fields(kind)}))  # noqa: B010
        sys.setprofile(self._on_event)
        try:
            function()
        finally:
            sys.setprofile(None)
            for kind in self.kinds:
                delattr(kind, "__getattribute__")
        return self.way

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        """Add the caller and the called function if an argument is an instance."""
        if event == "call" and self._is_inside(frame) and self._is_passed_to(frame):
            self._add(frame.f_back)
            self._add(frame)

    def _is_inside(self, frame: FrameType) -> bool:
        return frame.f_code.co_filename.startswith(f"{self.package}{os.sep}")

    def _is_passed_to(self, frame: FrameType) -> bool:
        code, values = frame.f_code, frame.f_locals
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        return any(isinstance(values.get(name), self.kinds) for name in names)

    def _add(self, frame: FrameType | None) -> None:
        """Add the place of the package's innermost frame, unless it was added last."""
        while frame is not None and not self._is_inside(frame):
            frame = frame.f_back
        if frame is not None:
            code = frame.f_code
            file = Path(code.co_filename).relative_to(self.package).as_posix()
            place = (file, code.co_qualname.partition(".<locals>")[0])
            if self.way[-1:] != [place]:
                self.way.append(place)


if __name__ == "__main__":
    sys.exit(main())
