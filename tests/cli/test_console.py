"""The plan of a run, as it is printed."""

from types import SimpleNamespace
from typing import Any

import pytest

from helpers import small
from rlgf.cli.console import ProgressReporter, print_plan, print_summary
from rlgf.trainer import Progress


def test_a_plan_knows_the_size_of_an_encoder_decoder_and_of_adapters(capsys: pytest.CaptureFixture[str]):
    def told(*changes: tuple[str, object]) -> dict[str, str]:
        config = small(("algorithm.name", "ppo"), *changes)
        print_plan(config, config.algorithm.build())
        lines = [line.strip().split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
        return {line[0]: line[1] for line in lines if len(line) == 2}

    wide = ("model.width", 256), ("model.layers", 4), ("model.vocabulary", 8192)
    assert "unknown" not in told(("model.architecture", "t5"))["parameters"]
    whole, adapted = (
        told(*wide, ("critic.kind", kind), ("lora.rank", rank))["memory"] for kind, rank in (("value_head", 0), ("lora", 2))
    )
    assert megabytes(whole) - megabytes(adapted) == pytest.approx(4 * 4 * 5.3, abs=2)  # gradients, moments and a reference


def megabytes(line: str) -> int:
    return int(line.removeprefix("about ").partition(" MB")[0].replace(",", ""))


def step(**metrics: Any) -> Progress:
    found = {"score": 0.62, "score_policy_only": 0.31, "kl_k1": 1.2, "tokens_per_second": 1234.0, "seconds": 1.0, **metrics}
    return Progress(1, 9, found, SimpleNamespace(score=[0.5] * 64), {})  # type: ignore[arg-type]


def test_the_progress_tells_the_guides_merit_from_the_policys_and_keeps_the_last_validation(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = ProgressReporter(every_seconds=0)
    reporter(step(guide_completions=5, evaluation={"score": 0.4, "completions": 128}))
    reporter(step(guide_completions=5, score_policy_only=float("nan")))
    reporter(step(guide_completions=0))
    first, second, third = (" ".join(line.split()) for line in capsys.readouterr().err.split("s left") if line.strip())
    assert "reward 0.620 with the guide, 0.310 alone · validation 0.400 · KL 1.20" in first
    assert "reward 0.620 with the guide · validation 0.400 · KL" in second
    assert "reward 0.620 · validation 0.400 · KL" in third


def test_the_end_says_before_and_after_with_intervals_and_warns_of_few_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    def scored(value: float, count: float) -> dict[str, float]:
        return {"score": value, "score_standard_error": 0.02, "completions": count}

    results = {"title": "PPO++", "evaluation": scored(0.56, 256), "baselines": {}}
    results["baselines"] = {"sft": {"title": "start", **scored(0.31, 256)}, "guide": {"title": "guide", **scored(0.44, 256)}}
    print_summary(results)
    shown = capsys.readouterr()
    assert " ".join(shown.out.split()) == (
        "reward on 256 test prompts: start 0.310 [0.271, 0.349] → PPO++ 0.560 [0.521, 0.599]; guide 0.440 [0.401, 0.479] "
        "(95 % intervals)"
    )
    assert "warning" not in shown.err
    print_summary({"title": "PPO", "evaluation": {**scored(0.5, 8), "pass_rate": 0.5}})
    shown = capsys.readouterr()
    assert "pass rate on 8 test prompts: PPO 0.500 [0.215, 0.785]" in shown.out
    assert "warning: 8 test prompts are few" in shown.err
