"""Findings of `rlgf check` in a task and its reward."""

from pathlib import Path

from rlgf.cli import diagnose
from rlgf.cli.task_checks import check_reward
from rlgf.models.language_model import LanguageModel
from rlgf.tasks.base import Task
from rlgf.types import Prompt


def test_targets_that_score_nothing_are_told_to_be_noisy_demonstrations_or_a_mistake():
    prompts = [Prompt(f"review {i}", (" good plot",), (" good plot",)) for i in range(4)]
    found = check_reward(Task("t", prompts, prompts, prompts), lambda prompts, texts: [0.0] * len(texts))
    none = "0.000 [0.000, 0.490]"  # of four prompts
    warned = f"targets ({none}) do not outscore empty texts ({none}): expected of noisy demonstrations"
    assert any(finding.level == "warning" and finding.text.startswith(warned) for finding in found)


def test_a_model_is_described_by_what_it_supports(tiny_model: LanguageModel, tmp_path: Path) -> None:
    tiny_model.save(tmp_path)
    findings = diagnose.check_model(str(tmp_path), "cpu", "fp32")
    assert {finding.level for finding in findings} == {"ok"}
    told = "\n".join(finding.text for finding in findings)
    assert "causal model" in told
    assert "log-probabilities of sampling and training agree" in told
    assert "with the cache of rlgf (fast)" in told
    assert "packed rows without padding" in told
    assert "LoRA: " in told
    assert "a value head on its states can be its critic" in told
    assert "vLLM" in told
