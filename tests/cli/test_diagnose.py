"""Findings of `rlgf check` in a task and its reward."""

from rlgf.cli.task_checks import check_reward
from rlgf.tasks.base import Task
from rlgf.types import Prompt


def test_targets_that_score_nothing_are_told_to_be_noisy_demonstrations_or_a_mistake():
    prompts = [Prompt(f"review {i}", (" good plot",), (" good plot",)) for i in range(4)]
    found = check_reward(Task("t", prompts, prompts, prompts), lambda prompts, texts: [0.0] * len(texts))
    none = "0.000 [0.000, 0.490]"  # of four prompts
    warned = f"targets ({none}) do not outscore empty texts ({none}): expected of noisy demonstrations"
    assert any(finding.level == "warning" and finding.text.startswith(warned) for finding in found)
