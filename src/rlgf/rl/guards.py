"""Guards of training: numbers that are not finite, and iterations without a learning signal."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlgf.distributed import all_reduce_sum
from rlgf.errors import TrainingError
from rlgf.rl.tensors import Experience, Rollout

LARGEST_REWARD = math.sqrt(torch.finfo(torch.float32).max)  # losses square it in fp32
DIVERGED_ITERATIONS = 5  # in a row, before a critic is reported as diverging
SHOWN_ROWS = 3
LOWER = "lower ppo.learning_rate and critic.learning_rate, raise kl.coefficient, or set ppo.max_grad_norm lower"
HINTS = {
    "reward": "bound the reward in its function, or set reward.clip",
    "log-probability": f"{LOWER}; with runtime.precision=bf16 try fp32",
    "value": LOWER,
}


class NonFiniteError(TrainingError):
    """A number that is not finite, found before an optimizer step used it.

    `experience` and `rows` are the completions that it belongs to.
    """

    def __init__(self, message: str, experience: Experience, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.experience, self.rows = experience, list(rows)


@dataclass
class Guard:
    """The reaction to a number that is not finite: stop, or leave optimizer steps out."""

    on_nonfinite: str  # 'stop' or 'skip'
    max_skipped: int  # optimizer steps in a row
    skipped_in_a_row: int = 0

    def check_experience(self, experience: Experience, rewards: Sequence[float], iteration: int, steps: int) -> bool:
        """Return whether an experience is finite.

        Args:
            experience: the experience.
            rewards: the shaped rewards, [rows].
            iteration: the 0-based iteration.
            steps: the optimizer steps that are left out if it is not.

        Raises:
            NonFiniteError: it is not, and the run stops or has left out too many steps.
        """
        found = _find_nonfinite(experience, rewards)
        if not all_reduce_sum(float(found is not None)):
            return True
        quantity, rows = found or ("a number of another process", [])
        self._react(f"{quantity} is not finite", experience, rows, iteration, steps)
        return False

    def check_step(self, values: Mapping[str, float], experience: Experience, rows: Tensor, iteration: int) -> bool:
        """Return whether losses and gradient norms of an optimizer step are finite.

        Raises `NonFiniteError` as `check_experience`; `rows` are those of the minibatch.
        """
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        if not all_reduce_sum(float(bool(wrong))):
            self.skipped_in_a_row = 0
            return True
        name = f"{wrong[0]} ({values[wrong[0]]})" if wrong else "a number of another process"
        self._react(f"{name} is not finite", experience, rows.tolist(), iteration, 1)
        return False

    def _react(self, problem: str, experience: Experience, rows: Sequence[int], iteration: int, steps: int) -> None:
        skipped = self.skipped_in_a_row + steps
        if self.on_nonfinite == "skip" and skipped <= self.max_skipped:
            self.skipped_in_a_row = skipped
            return
        hint = next((text for name, text in HINTS.items() if name in problem), LOWER)
        shown = ", ".join(repr(experience.rollout.completions[row][:40]) for row in rows[:SHOWN_ROWS])
        rest = f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else ""
        left_out = f" after {skipped} optimizer steps in a row" if self.on_nonfinite == "skip" else ""
        raise NonFiniteError(
            f"iteration {iteration}: {problem}{left_out}, in the completions {shown}{rest}: {hint}; no optimizer step used it.",
            experience,
            rows,
        )


def _find_nonfinite(experience: Experience, rewards: Sequence[float]) -> tuple[str, list[int]] | None:
    """Return the first quantity of an experience that is not finite, and its rows."""
    reward = torch.tensor([value if abs(value) <= LARGEST_REWARD else math.inf for value in rewards])
    quantities = {
        "the reward in fp32": experience.score[:, None],
        "the square of the shaped reward in fp32": reward[:, None],
        "the policy's log-probability": experience.old_log_probs,
        "the reference's log-probability": experience.reference_log_probs,
        "the critic's value": experience.values,
        "the return of a value target": experience.returns,
        "the advantage of a value": experience.advantages,
    }
    for name, values in quantities.items():
        wrong = ~values.isfinite().all(1)
        if bool(wrong.any()):
            return name, wrong.nonzero().flatten().tolist()
    return None


def check_kl(kl: float, bound: float | None, iteration: int) -> None:
    """Raise `TrainingError` if the KL, in nats per completion, is above its bound."""
    if bound is not None and kl > bound:
        raise TrainingError(
            f"iteration {iteration}: the KL is {kl:.4g} nats per completion, above kl.stop_above={bound:g}: raise "
            "kl.coefficient or lower ppo.learning_rate, and start again, for example from best-policy."
        )


def find_warning_flags(rollout: Rollout, scores: Sequence[float], stats: Mapping[str, float]) -> dict[str, float]:
    """Return the flags of an iteration without a learning signal, 1 or 0 by name.

    See docs/metrics.md.
    """
    return {
        "identical_rewards": float(len(set(scores)) == 1 and len(scores) > 1),
        "no_policy_tokens": float(stats["trained_tokens"] == 0),
        "critic_diverges": float(stats["explained_variance"] < -1),
    }


class TrainingWarnings:
    """Warnings about metrics of an iteration, each reported once."""

    def __init__(self) -> None:
        self.reported: set[str] = set()
        self.diverged = 0  # iterations in a row

    def new_warnings(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the warnings that the metrics of an iteration give for the first time."""
        self.diverged = self.diverged + 1 if metrics.get("critic_diverges") else 0
        texts = {
            "identical_rewards": "all completions of the iteration have the same reward, so nothing is learned from it",
            "no_policy_tokens": "no token of the iteration is trained on: the guide generated all of them",
            "critic_diverges": (
                f"the critic predicts worse than its mean for {DIVERGED_ITERATIONS} iterations (explained variance below -1): "
                "lower critic.learning_rate or set reward.normalize"
            ),
        }
        shows = {name: bool(metrics.get(name)) for name in texts} | {"critic_diverges": self.diverged >= DIVERGED_ITERATIONS}
        new = [name for name, shown in shows.items() if shown and name not in self.reported]
        self.reported.update(new)
        return [f"iteration {metrics['iteration']}: {texts[name]} (reported once; metric {name})" for name in new]
