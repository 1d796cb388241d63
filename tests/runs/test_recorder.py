"""The record of a run: the order of writing, and what is left of a loop that ends early."""

import builtins
import io
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import FinishedRun, config_of, experience_of, known_word, rollout_of, tiny_trainer
from rlgf.algorithms import registry
from rlgf.config.base import to_dict
from rlgf.config.loading import override
from rlgf.config.runtime import RuntimeConfig
from rlgf.data.checksums import read_checked_json
from rlgf.data.files import read_complete_lines
from rlgf.errors import Interrupted, TrainingError
from rlgf.guides.base import Completion, CompletionRequest
from rlgf.guides.local import FunctionGuide
from rlgf.pipeline.run import train
from rlgf.runs.checkpoints import load_state
from rlgf.runs.directory import RunDirectory
from rlgf.runs.recorder import RunRecorder
from rlgf.tasks import toy_reviews
from rlgf.trainer import Progress, Trainer
from rlgf.types import Prompt

TIMES = ("seconds", "tokens_per_second")


class NotingDirectory:
    """Notes the calls of a recorder instead of writing; fails at the one that it is told to fail at."""

    def __init__(self, folder: Path, fails_at: str = "") -> None:
        self.folder, self.fails_at = folder, fails_at
        self.calls: list[str] = []

    def note(self, call: str) -> None:
        if call == self.fails_at:
            raise OSError("no space")
        self.calls.append(call)

    def load_checkpoint(self) -> None:
        self.note("load checkpoint")

    def load_guide_usage(self) -> dict[str, float]:
        self.note("load guide usage")
        return {}

    def drop_lines_after(self, iteration: int) -> None:
        self.note(f"drop lines from {iteration}")

    def read_metrics(self) -> list[dict[str, Any]]:
        return []

    def save_guide_usage(self, state: Mapping[str, Any]) -> None:
        self.note("guide usage")

    def log(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self.note(name)

    def save_checkpoint(self, iteration: int, state: Mapping[str, Any]) -> None:
        self.note(f"checkpoint {iteration}")

    def save_model(self, name: str, save: Callable[[Path], None]) -> None:
        self.note(name)


class Words:
    """A codec that spells a token by its id."""

    def decode(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[str]:
        return [" ".join(map(str, ids)) for ids in completions]


class Loop:
    """The least that a recorder keeps: a count of iterations, and a guide with costs."""

    num_iterations, codec = 5, Words()

    def __init__(self) -> None:
        self.iteration = 0
        self.is_between_iterations = True

    def state(self) -> dict[str, Any]:
        return {}

    def is_evaluation_due(self) -> bool:
        return True

    def evaluate_if_due(self) -> dict[str, Any]:
        raise AssertionError("no evaluation is missing")

    def save_policy(self, folder: Path) -> None:
        raise AssertionError("the directory decides")

    def guide_usage(self) -> dict[str, float]:
        return {"requests": float(self.iteration)}

    def load_guide_usage(self, usage: Mapping[str, float]) -> None:
        pass


def recorded(directory: NotingDirectory, iterations: int, every: int, error: BaseException | None = None) -> list[str]:
    """The calls of a recorder over so many iterations, after which the loop raises an error or ends."""
    loop: Any = Loop()
    files: Any = directory
    with RunRecorder(loop, files, RuntimeConfig(trackers=(), checkpoint_every=every), {}) as recorder:
        for iteration in range(iterations):
            loop.iteration = iteration + 1
            recorder.write({"iteration": iteration}, experience_of(rollout_of(["xGP"])))
        if error is not None:
            raise error
    return directory.calls


OPENING = ["load checkpoint", "load guide usage", "drop lines from 0"]
ITERATION = ["guide usage", "rollouts.jsonl", "metrics.jsonl"]


def test_costs_come_first_and_the_checkpoint_last(tmp_path: Path) -> None:
    calls = recorded(NotingDirectory(tmp_path), iterations=5, every=2)
    second, fourth, last = [*ITERATION, "checkpoint 2"], [*ITERATION, "checkpoint 4"], [*ITERATION, "checkpoint 5"]
    assert calls == [*OPENING, *ITERATION, *second, *ITERATION, *fourth, *last, "guide usage"]


@pytest.mark.parametrize("fails_at", ["rollouts.jsonl", "metrics.jsonl", "checkpoint 1"])
def test_costs_are_kept_if_writing_fails(tmp_path: Path, fails_at: str) -> None:
    directory = NotingDirectory(tmp_path, fails_at)
    with pytest.raises(OSError, match="no space"):
        recorded(directory, iterations=1, every=1)
    written = [*ITERATION, "checkpoint 1"]
    assert directory.calls == [*OPENING, *written[: written.index(fails_at)], "guide usage"]


ERRORS = [TrainingError("no"), KeyboardInterrupt(), Interrupted(15), MemoryError(), ValueError("a bug")]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("every", "left"), [(100, ["checkpoint 1"]), (1, ["checkpoint 1"])])
def test_whatever_ends_a_run_between_iterations_leaves_one_checkpoint(
    tmp_path: Path, error: BaseException, every: int, left: list[str]
) -> None:
    directory = NotingDirectory(tmp_path)
    with pytest.raises(type(error)):
        recorded(directory, iterations=1, every=every, error=error)
    assert directory.calls == [*OPENING, *ITERATION, *left, "guide usage"]


@pytest.mark.parametrize("attribute", ["is_between_iterations", "is_writing"])
def test_what_is_half_done_is_not_kept(tmp_path: Path, attribute: str) -> None:
    directory = NotingDirectory(tmp_path)
    loop: Any = Loop()
    files: Any = directory
    recorder = RunRecorder(loop, files, RuntimeConfig(trackers=()), {})

    def run() -> None:
        with recorder:
            if attribute == "is_writing":
                recorder.is_writing = True
            else:
                loop.is_between_iterations = False
            raise Interrupted(15, lost="iteration 1 of 5")

    with pytest.raises(Interrupted):
        run()
    assert directory.calls == [*OPENING, "guide usage"]


class PricedGuide(FunctionGuide):
    """A guide that counts the requests of the whole run."""

    def __init__(self) -> None:
        super().__init__(known_word)
        self.requests = 0.0

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        self.requests += len(requests)
        return super().complete(requests)

    def pop_metrics(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, float]:
        return {"requests": self.requests}

    def load_state(self, state: Mapping[str, float]) -> None:
        self.requests += state.get("requests", 0.0)


class NotingPrefetcher:
    """Counts how often it is closed."""

    closed = 0

    def wait_for(self, iteration: int) -> None:
        pass

    def close(self) -> None:
        self.closed += 1


def guided_trainer(**values: Any) -> tuple[Trainer, PricedGuide, NotingPrefetcher]:
    """A trainer of PPO++ whose rollins all come from a guide with costs, prefetched."""
    guide, prefetcher = PricedGuide(), NotingPrefetcher()
    trainer = tiny_trainer(registry.ppo_pp(1.0).build(), config_of(**values), guide)
    trainer.prefetcher = prefetcher  # pyright: ignore[reportAttributeAccessIssue]
    return trainer, guide, prefetcher


def run_recorded(trainer: Trainer, folder: Path, until: Callable[[Progress], bool]) -> None:
    """Run a trainer as `train` does, and abandon the loop as soon as `until` says so."""
    config = config_of()
    directory = RunDirectory(folder, config)
    directory.create(config)
    with (
        RunRecorder(trainer, directory, trainer.config.runtime, to_dict(config)) as recorder,
        closing(trainer.iterate(recorder.run_step)) as iterations,
    ):
        for progress in iterations:
            recorder.write(progress.metrics, progress.experience)
            if until(progress):
                break


def iterations_in(path: Path) -> set[int]:
    return {row["iteration"] for row in read_complete_lines(path)}


UNTRACKED = {"runtime__trackers": [], "runtime__checkpoint_every": 100}


def test_an_abandoned_loop_leaves_lines_and_costs_but_no_checkpoint(tmp_path: Path) -> None:
    trainer, guide, prefetcher = guided_trainer(ppo__iterations=4, evaluation__every=0, **UNTRACKED)
    run_recorded(trainer, tmp_path / "run", lambda progress: progress.iteration == 2)
    assert iterations_in(tmp_path / "run" / "metrics.jsonl") == iterations_in(tmp_path / "run" / "rollouts.jsonl") == {0, 1}
    assert guide.requests > 0
    assert read_checked_json(tmp_path / "run" / "guide.json") == {"requests": guide.requests}
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert prefetcher.closed == 1


def test_an_interrupted_evaluation_leaves_its_iteration_and_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made up for when the run goes on: tests/runs/test_signals.py."""

    def interrupted(self: Trainer, prompts: Sequence[Any]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "evaluate", interrupted)
    trainer, guide, prefetcher = guided_trainer(evaluation__every=2, **UNTRACKED)
    with pytest.raises(KeyboardInterrupt):
        run_recorded(trainer, tmp_path / "run", lambda progress: False)
    rows = read_complete_lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1]
    assert not any("evaluation" in row for row in rows)
    assert iterations_in(tmp_path / "run" / "rollouts.jsonl") == {0, 1}
    assert read_checked_json(tmp_path / "run" / "guide.json") == {"requests": guide.requests}
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration-000002"]
    assert prefetcher.closed == 1


def timeless(path: Path) -> list[dict[str, Any]]:
    """The lines of a file without times."""
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in read_complete_lines(path)]


@pytest.mark.integration
def test_after_a_training_error_the_same_command_goes_on_bit_for_bit(
    finished_run: Callable[[str], FinishedRun], tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, parts, reward = finished_run("d2lols"), tmp_path / "parts", toy_reviews.reward
    config = override(run.config, [("runtime.checkpoint_every", 100)])
    is_broken, seen = False, list[int]()

    def breaks(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        if is_broken:
            raise OSError("gone")
        return reward(prompts, texts)

    def break_after_two(progress: Progress) -> None:
        nonlocal is_broken
        is_broken = progress.iteration == 2

    monkeypatch.setattr(toy_reviews, "reward", breaks)
    with pytest.raises(TrainingError, match="reward"):
        train(config, parts, stages, on_progress=break_after_two)
    assert [folder.name for folder in (parts / "checkpoints").iterdir()] == ["iteration-000002"]
    assert iterations_in(parts / "metrics.jsonl") == iterations_in(parts / "rollouts.jsonl") == {0, 1}

    is_broken = False
    train(config, parts, stages, on_progress=lambda progress: seen.append(progress.iteration))
    assert seen == [3]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert timeless(parts / name) == timeless(run.folder / name)
    states = [load_state(folder / "checkpoints" / "iteration-000003") for folder in (run.folder, parts)]
    assert_equal(*states)


def assert_equal(some: Any, other: Any, place: str = "state") -> None:
    """Compare two checkpoints bit for bit."""
    assert type(some) is type(other), place
    if isinstance(some, Mapping):
        assert list(some) == list(other), place
        for key in some:
            assert_equal(some[key], other[key], f"{place}/{key}")
    elif isinstance(some, list | tuple):
        assert len(some) == len(other), place
        for i, pair in enumerate(zip(some, other)):
            assert_equal(*pair, f"{place}/{i}")
    elif isinstance(some, torch.Tensor):
        assert torch.equal(some, other), place
    else:
        assert some == other, place


class WritesError(Exception):
    """Something was written."""


@pytest.fixture
def no_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a file to write, and making a folder, fail."""

    def guard_open(original: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if set(mode) & set("wax+"):
                raise WritesError(f"{file} is opened with mode {mode}")
            return original(file, mode, *rest, **options)

        return guarded

    def guarded_os_open(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise WritesError(f"{path} is opened with flags {flags}")
        return os_open(path, flags, *rest, **options)

    def refused(*arguments: Any, **options: Any) -> None:
        raise WritesError(str(arguments))

    os_open = os.open
    monkeypatch.setattr(builtins, "open", guard_open(builtins.open))
    monkeypatch.setattr(io, "open", guard_open(io.open))  # of Path.open
    monkeypatch.setattr(os, "open", guarded_os_open)
    monkeypatch.setattr(os, "mkdir", refused)
    monkeypatch.setattr(torch, "save", refused)  # opens its file in C++


def test_a_trainer_without_a_recorder_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_writing: None) -> None:
    monkeypatch.chdir(tmp_path)
    trainer, *_ = guided_trainer(ppo__iterations=2, evaluation__every=1, runtime__checkpoint_every=1)
    assert [progress.iteration for progress in trainer.iterate()] == [1, 2]
    assert list(tmp_path.iterdir()) == []
    for write in (lambda: Path("x").write_text(""), lambda: Path("x").mkdir(), lambda: os.open("x", os.O_CREAT)):
        with pytest.raises(WritesError):
            write()


def test_the_policy_of_the_best_evaluation_is_kept(tmp_path: Path) -> None:
    directory, loop = NotingDirectory(tmp_path), Loop()
    files: Any = directory
    with RunRecorder(loop, files, RuntimeConfig(trackers=(), checkpoint_every=100), {}) as recorder:  # pyright: ignore[reportArgumentType]
        for iteration, score in enumerate((0.5, 0.4, None, 0.5, 0.6)):
            loop.iteration = iteration + 1
            found = {} if score is None else {"evaluation": {"score": score}}
            recorder.write({"iteration": iteration, **found}, experience_of(rollout_of(["xGP"])))
            directory.calls.append(f"wrote {iteration}")
    order = [call for call in directory.calls if call == "best-policy" or call.startswith("wrote")]
    assert order == ["best-policy", "wrote 0", "wrote 1", "wrote 2", "wrote 3", "best-policy", "wrote 4"]
