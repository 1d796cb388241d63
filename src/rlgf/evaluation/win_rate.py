"""Win rates: comparisons of completions with their prompts' references by a judge.

The judge is a reward model, or a chat model on a server. The chat model is queried as in the
paper's appendix C.2. The order of the two texts is sampled per row, a function of seed and row, or
every row is queried in both orders.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from rlgf.rewards.base import score
from rlgf.types import Prompt, RewardFunction

REFUSED: Literal["refused"] = "refused"
Verdict = float | Literal["refused"] | None
"""1 if a text is better, 0 if the other is, ½ for a tie; None if it is unclear; or refused."""


class PairJudge(Protocol):
    """A judge that compares texts in pairs."""

    @property
    def name(self) -> str:
        """Return the name of the judge, for results."""
        ...

    def compare(self, prompts: Sequence[Prompt], texts: Sequence[str], others: Sequence[str]) -> list[Verdict]:
        """Compare each text with the other one for the same prompt."""
        ...


@dataclass(frozen=True)
class RewardJudge:
    """A judge that prefers the text with the higher reward."""

    reward: RewardFunction
    name: str

    def compare(self, prompts: Sequence[Prompt], texts: Sequence[str], others: Sequence[str]) -> list[Verdict]:
        """Compare the scores of the texts."""
        pairs = zip(score(self.reward, prompts, texts), score(self.reward, prompts, others))
        return [0.5 + 0.5 * (first > second) - 0.5 * (first < second) for first, second in pairs]


def win_rate(judge: PairJudge, prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, float]:
    """Compute how often a judge prefers a completion to its prompt's first reference.

    Ties count half. Rows with an unparseable response, and those whose question was refused, are
    counted, but excluded from the rate. Prompts without a reference are excluded.
    """
    rows = [(prompt, text) for prompt, text in zip(prompts, texts) if prompt.references]
    verdicts = judge.compare([p for p, _ in rows], [text for _, text in rows], [p.references[0] for p, _ in rows])
    values = [verdict for verdict in verdicts if isinstance(verdict, float)]
    refused = sum(verdict == REFUSED for verdict in verdicts)
    return {
        **win_rate_metrics(values), "unparseable": len(verdicts) - len(values) - refused,
        **({"judge_refused": refused} if refused else {}),
    }  # fmt: skip


def win_rate_metrics(values: Sequence[float]) -> dict[str, float]:
    """Return the mean of wins (1), ties (½) and losses (0).

    The result also has the standard error of the mean and the number of each.
    """
    mean = sum(values) / len(values) if values else math.nan
    spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    counts = {"wins": 1.0, "ties": 0.5, "losses": 0.0}
    return {
        "win_rate": mean,
        "win_rate_standard_error": math.sqrt(spread / len(values)) if values else math.nan,
        **{name: float(sum(v == value for v in values)) for name, value in counts.items()},
    }


def summary(result: Mapping[str, float]) -> str:
    """Return a win rate as a line of text."""
    refused = f", {result['judge_refused']:.0f} refused" if result.get("judge_refused") else ""
    return (
        f"{100 * result['win_rate']:.1f} % ± {100 * result['win_rate_standard_error']:.1f}: {result['wins']:.0f} wins, "
        f"{result['ties']:.0f} ties, {result['losses']:.0f} losses, {result['unparseable']:.0f} unparseable responses"
        f"{refused}"
    )
