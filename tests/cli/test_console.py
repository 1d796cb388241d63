"""The plan of a run, as it is printed."""

import pytest

from helpers import small
from rlgf.cli.console import print_plan


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
