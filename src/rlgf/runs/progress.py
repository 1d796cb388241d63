"""The progress of a run as lines of text, for any terminal and for notebooks."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from rlgf.evaluation.intervals import FEW, interval_in, show_interval, show_mean
from rlgf.untrusted_text import escape_control_characters


class Step(Protocol):
    """The progress after an iteration (`rlgf.trainer.Progress`)."""

    @property
    def iteration(self) -> int:
        """Return the number of iterations done."""
        ...

    @property
    def iterations(self) -> int:
        """Return the number of iterations of the whole run."""
        ...

    @property
    def metrics(self) -> Mapping[str, Any]:
        """Return the metrics of the iteration."""
        ...

    @property
    def experience(self) -> Any:
        """Return the experience of the iteration."""
        ...

    @property
    def guide_usage(self) -> Mapping[str, float]:
        """Return the guide's usage over the whole run."""
        ...


def write_line(line: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(escape_control_characters(line) + "\n")
    sys.stderr.flush()


def with_interval(name: str, metrics: Mapping[str, float], digits: str = ".4g") -> str:
    """Return a metric as text, over few prompts with its interval."""
    return f"{metrics[name]:{digits}}{show_interval(interval_in(name, metrics), digits)}"


class ProgressLines:
    """A reporter of the progress: a line every few seconds, and after the last iteration.

    A line has the reward (with the guide's part, and of the policy alone where there are such
    completions), the last validation, the KL and the speed.
    """

    def __init__(self, report: Callable[[str], None] = write_line, every_seconds: float = 10.0) -> None:
        self.report, self.every, self.last = report, every_seconds, 0.0
        self.began, self.first = 0.0, 0  # start time, iterations before it
        self.validation = ""  # the last evaluation on the validation split

    def __call__(self, step: Step) -> None:
        """Report the progress after one more iteration, if it is time."""
        self.show(step, self.describe(step))

    def show(self, step: Step, line: str) -> None:
        """Report a line, if it is time."""
        now = time.monotonic()
        if step.iteration <= self.first or not self.began:
            self.began, self.first = now - step.metrics["seconds"], step.iteration - 1
        if step.iteration == step.iterations or now - self.last > self.every:
            self.last = now
            left = (now - self.began) / (step.iteration - self.first) * (step.iterations - step.iteration)
            self.report(f"{step.iteration}/{step.iterations} iterations · {line} · {left:.0f} s left")
        if step.iteration == step.iterations:
            self.began, self.first, self.validation = 0.0, 0, ""

    def describe(self, step: Step) -> str:
        """Return the numbers of an iteration in words."""
        metrics, scores = step.metrics, step.experience.score
        shown = show_mean([float(value) for value in scores]) if 1 < len(scores) < FEW else f"{metrics['score']:.3f}"
        alone = metrics.get("score_policy_only", math.nan)
        if metrics.get("guide_completions"):  # the reward of both: AggreVaTeD's is the guide's merit
            shown += " with the guide" + (f", {alone:.3f} alone" if math.isfinite(alone) else "")
        if "evaluation" in metrics:
            found = metrics["evaluation"]
            self.validation = f" · validation {with_interval('pass_rate' if 'pass_rate' in found else 'score', found, '.3f')}"
        line = f"reward {shown}{self.validation} · KL {metrics['kl_k1']:.2f} · {metrics['tokens_per_second']:,.0f} tokens/s"
        return line + guide_progress(metrics, step.guide_usage)


def guide_progress(metrics: Mapping[str, Any], spent: Mapping[str, float]) -> str:
    """Summarize an iteration's guide requests, their latency, and the run's cost so far.

    Empty for a guide in this process.
    """
    if "guide_attempts" not in metrics:
        return ""
    shown = f" · guide {metrics['guide_attempts']:,.0f} requests"
    if metrics["guide_latency_mean"]:  # zero in a replay
        shown += f", {metrics['guide_latency_mean']:.2f} s each"
    if metrics["guide_rows_cached"]:
        shown += f", {metrics['guide_rows_cached']:,.0f} completions from the cache"
    if failed := metrics["guide_retried"] + metrics["guide_given_up"]:
        shown += f", {failed:,.0f} failed"
    if metrics.get("guide_refused"):
        shown += f", {metrics['guide_refused']:,.0f} refused"
    return shown + (f", cost {spent['cost']:.4g} so far" if "cost" in spent else "")
