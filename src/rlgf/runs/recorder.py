"""The record of a run: metrics, rollouts, trackers, guide usage and checkpoints.

The trainer opens no file: it yields iterations, and a recorder writes them.
"""

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from rlgf.config.runtime import RuntimeConfig
from rlgf.data.files import to_line, write_file
from rlgf.data.lock import FolderLock
from rlgf.data.tokenization import Codec
from rlgf.errors import CheckpointError, ConfigError
from rlgf.rl.guards import NonFiniteError
from rlgf.rl.tensors import Experience, Rollout
from rlgf.runs.checkpoints import Checkpoints
from rlgf.runs.directory import BEFORE_CONFIG, IDENTITY, RunDirectory, ignore
from rlgf.runs.profiling import run_with_profiler
from rlgf.runs.tracking import Trackers
from rlgf.types import Origin

NONFINITE = "nonfinite.jsonl"  # the completions of the number that stopped a run
Step = Callable[[int], tuple[dict[str, Any], Experience]]


# what a run writes into its folder, but for its stages
WRITTEN = (
    "config.yaml", "identity.json", "results.json", "results-after-*-iterations.json", "guide.json", "metrics.jsonl",
    "rollouts.jsonl", "evaluation.jsonl", "evaluation-*.jsonl", "nonfinite.jsonl", "*.jsonl.damaged-*", "checkpoints", "policy",
    "best-policy", "critic-policy", "critic-guide", "trackers", "profile", "table.md", "texts.md", "curves.png",
    "tradeoff.png", "difficulty.png", "log.txt", ".policy-*", ".best-policy-*", ".critic-*",
)  # fmt: skip


def clear_run(folder: Path) -> str | None:
    """Remove the run in a folder; return its progress in words, or None.

    Its stages stay. Raises `ConfigError` if another process trains it, or for files that no run
    writes.
    """
    if not (folder / "config.yaml").is_file() or not (folder / IDENTITY).is_file():
        return None
    known = {path for name in WRITTEN for path in folder.glob(name)}
    others = [path.name for path in folder.iterdir() if path not in known and path.name not in BEFORE_CONFIG]
    if others:
        raise ConfigError(
            f"{folder} holds files that no run writes ({', '.join(sorted(others)[:3])}), which --overwrite does not remove: "
            "move them away, or choose another --out."
        )
    with FolderLock(folder, "trains", ignore).held():
        done = Checkpoints(folder / "checkpoints", 1, "", (), ignore).iterations()
        finished = (folder / "results.json").is_file()
        # the config last, without which the rest is no run
        for name in (*WRITTEN[1:], WRITTEN[0]):
            for path in folder.glob(name):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return "finished" if finished else f"stopped after {done[-1] if done else 0} iterations"


class Recordable(Protocol):
    """The state of a training loop that a recorder saves and restores."""

    iteration: int  # number of iterations done
    is_between_iterations: bool  # whether `state` is that of the last iteration's end

    @property
    def num_iterations(self) -> int:
        """Return the number of iterations of the whole run."""
        ...

    @property
    def codec(self) -> Codec:
        """Return the codec of the policy."""
        ...

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        ...

    def load_state(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Load the state of a checkpoint after `iteration` iterations."""
        ...

    def evaluate_if_due(self) -> Mapping[str, Any]:
        """Return 'evaluation' on the validation split if one follows the iteration just done."""
        ...

    def is_evaluation_due(self) -> bool:
        """Return whether an evaluation after this iteration is due, whatever the run's length."""
        ...

    def save_policy(self, folder: Path) -> None:
        """Write the policy to a folder, for `from_pretrained`."""
        ...

    def guide_usage(self) -> Mapping[str, float]:
        """Return the guide's usage over the whole run; empty without counts."""
        ...

    def load_guide_usage(self, usage: Mapping[str, float]) -> None:
        """Add the guide's usage of an earlier part of the run."""
        ...


class RunRecorder:
    """A context manager that keeps a training loop in a run directory.

    Entering resumes from the last checkpoint and drops the lines after it. `write` keeps an
    iteration, in this order: guide usage, rollouts, metrics, best policy, checkpoint; so a run that
    is killed in between keeps its costs. Leaving by an error or a signal between two iterations
    writes a checkpoint; leaving in any way writes the guide usage and closes the trackers.
    """

    def __init__(
        self, loop: Recordable, directory: RunDirectory, runtime: RuntimeConfig, config_values: Mapping[str, Any]
    ) -> None:
        self.loop, self.directory, self.runtime, self.config_values = loop, directory, runtime, config_values
        self.profiled_iteration = -1
        self.best_score = -math.inf  # of the evaluations on the validation split
        self.saved_iteration = -1  # number of iterations in the last checkpoint; -1: there is none
        self.is_writing = False  # the logs do not have the last iteration yet

    def __enter__(self) -> Self:
        """Open the trackers and resume from the last checkpoint, if there is one."""
        checkpoint = self.directory.load_checkpoint()
        if checkpoint:
            self._load(*checkpoint)
        self.loop.load_guide_usage(self.directory.load_guide_usage())
        self.directory.drop_lines_after(self.loop.iteration)
        folder = self.directory.folder / "trackers"
        self.trackers = Trackers(self.runtime.trackers, folder, self.config_values, self.loop.iteration)
        if self.runtime.profile:  # the second iteration of this process, as the first one warms up
            self.profiled_iteration = min(self.loop.iteration + 1, self.loop.num_iterations - 1)
        try:
            self._make_up_evaluation()
        except BaseException:
            self.trackers.finish()
            raise
        return self

    def _make_up_evaluation(self) -> None:
        """Run the evaluation after the last iteration if it was interrupted."""
        done, metrics = self.loop.iteration, self.directory.read_metrics()
        if not metrics or metrics[-1]["iteration"] != done - 1 or "evaluation" in metrics[-1]:
            return
        found = self.loop.evaluate_if_due()
        if found:
            self._keep_best(found)
            self._save_checkpoint()  # with the best score
            self.directory.amend_metrics(done - 1, lambda row: {**row, **found})
            self.trackers.log(_tracked(found), done - 1)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Write a checkpoint after an error; write the guide usage; close the trackers."""
        try:
            if isinstance(error, NonFiniteError):
                self._write_nonfinite(error)
            if error is not None:
                self._keep_iterations(error)
        finally:
            try:
                self._save_guide_usage()  # also if interrupted: limits are per run
            finally:
                self.trackers.finish()

    def _keep_iterations(self, error: BaseException) -> None:
        """Write a checkpoint of completed iterations, unless one exists or the state is partial."""
        is_whole = self.loop.is_between_iterations and not self.is_writing
        if is_whole and self.loop.iteration != self.saved_iteration and not isinstance(error, OSError):
            self._save_checkpoint()

    def run_step(self, step: Step, iteration: int) -> tuple[dict[str, Any], Experience]:
        """Run a step of the loop, under the profiler if this iteration is profiled.

        After an error the checkpoint is written here, before the loop waits for requests in flight.
        """
        try:
            return self._run_step(step, iteration)
        except BaseException as error:
            self._keep_iterations(error)
            raise

    def _run_step(self, step: Step, iteration: int) -> tuple[dict[str, Any], Experience]:
        if iteration != self.profiled_iteration:
            return step(iteration)
        (metrics, experience), shares = run_with_profiler(partial(step, iteration), self.directory.folder / "profile")
        return {**metrics, "profile": shares}, experience

    def write(self, metrics: Mapping[str, Any], experience: Experience) -> None:
        """Write guide usage, rollouts, metrics and, when due, a checkpoint."""
        iteration, self.is_writing = metrics["iteration"], True
        self._save_guide_usage()
        scores = experience.score.tolist()
        self.directory.log("rollouts.jsonl", rollout_rows(experience.rollout, scores, iteration, self.loop.codec))
        self.directory.log("metrics.jsonl", [metrics])
        self.is_writing = False
        self.trackers.log(_tracked(metrics), iteration)
        self._keep_best(metrics)
        done = self.loop.iteration
        if done % self.runtime.checkpoint_every == 0 or done == self.loop.num_iterations:
            self._save_checkpoint()

    def _keep_best(self, metrics: Mapping[str, Any]) -> None:
        """Write the policy to `best-policy` if its score is the best so far."""
        score = metrics.get("evaluation", {}).get("score")
        if not self.loop.is_evaluation_due():  # the last iteration alone has others, and a run may be made longer
            return
        if score is not None and score > self.best_score:
            self.best_score = score
            self.directory.save_model("best-policy", self.loop.save_policy)

    def _save_checkpoint(self) -> None:
        self.directory.save_checkpoint(self.loop.iteration, {"loop": self.loop.state(), "best_score": self.best_score})
        self.saved_iteration = self.loop.iteration

    def _load(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Load a checkpoint; raise `CheckpointError` if it does not fit the models."""
        try:
            self.loop.load_state(iteration, state["loop"])
            self.best_score, self.saved_iteration = state["best_score"], iteration
        except (LookupError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint after {iteration} iterations in {self.directory.folder} does not fit this run "
                f"({type(error).__name__}): choose another --out, or remove the folder's checkpoints to begin again."
            ) from None

    def _write_nonfinite(self, error: NonFiniteError) -> None:
        """Write the completions that gave a non-finite number, and report their path."""
        experience = error.experience
        rows = rollout_rows(experience.rollout, experience.score.tolist(), self.loop.iteration, self.loop.codec)
        write_file(self.directory.folder / NONFINITE, "".join(to_line(rows[place]) for place in error.rows))
        error.args = (f"{error} The completions are in {self.directory.folder / NONFINITE}.",)

    def _save_guide_usage(self) -> None:
        """Write the guide's usage of the whole run, if it counts any."""
        if usage := self.loop.guide_usage():
            self.directory.save_guide_usage(usage)


def _tracked(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics with those of the evaluation by flat names, for trackers."""
    return {**metrics, **{f"evaluation/{key}": value for key, value in metrics.get("evaluation", {}).items()}}


def evaluation_rows(rollout: Rollout, scores: Sequence[float], iteration: int, codec: Codec) -> list[dict[str, Any]]:
    """Return the rows of a final evaluation: those of `rollout_rows`, with references."""
    rows = rollout_rows(rollout, scores, iteration, codec)
    return [{**row, "references": list(prompt.references)} for row, prompt in zip(rows, rollout.prompts)]


def rollout_rows(rollout: Rollout, scores: Sequence[float], iteration: int, codec: Codec) -> list[dict[str, Any]]:
    """Return the rows of a rollout as JSON objects.

    Each has the completion, its spans by origin, the switch position, the score, and the completion
    of a text guide.
    """
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(rollout.prompts):
        rows.append(
            {
                "iteration": iteration,
                "index": int(rollout.index[i]),
                "phase": int(rollout.phase[i]),
                "prompt": prompt.text,
                "text": rollout.completions[i],
                "spans": spans(rollout, i, codec),
                "switch_position": int(rollout.switch_position[i]),
                "rollout_by": Origin(int(rollout.rollout_by[i])).name.lower(),
                "ended_with_eos": bool(rollout.ended_with_eos[i]),
                "score": scores[i],
                "guide_completion": rollout.guide_completions[i] if rollout.guide_completions else None,
            }
        )
    return rows


def spans(rollout: Rollout, row: int, codec: Codec) -> list[dict[str, Any]]:
    """Return consecutive tokens of one origin as spans, with the text each adds."""
    length, start = int(rollout.lengths[row]), int(rollout.prompt_lengths[row])
    ids, origin = rollout.ids[row, :length].tolist(), rollout.origin[row, :length].tolist()
    prompt, found, done = ids[:start], list[dict[str, Any]](), ""
    at = start
    while at < length:
        end = at
        while end < length and origin[end] == origin[at]:
            end += 1
        whole = codec.decode([prompt], [ids[start:end]])[0]
        found.append({"origin": Origin(origin[at]).name.lower(), "tokens": end - at, "text": whole[len(done) :]})
        done, at = whole, end
    return found
