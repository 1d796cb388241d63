"""The supervised loop: a training that a signal stops goes on as if it had not been."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlgf.config.sections import SupervisedConfig
from rlgf.errors import Interrupted, TrainingError
from rlgf.interrupts import handle_signals
from rlgf.runs.steps import StepStore
from rlgf.supervised.loop import training_loop

CONFIG = SupervisedConfig(
    steps=6, batch_size=3, learning_rate=0.1, schedule="linear", warmup_steps=2, weight_decay=0.1, adam_beta2=0.95
)
EXAMPLES = [torch.linspace(-1, 1, 4) * number for number in range(5)]  # a pass ends within a batch


def train(
    store: StepStore | None = None, stop_after: int = 0, lines: list[str] | None = None
) -> tuple[dict[str, Any], list[Any]]:
    """Train a model with dropout; a signal comes in a step, if asked for. Returns metrics and weights."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    calls = list[int]()

    def backward(batch: Sequence[torch.Tensor]) -> tuple[float, int]:
        calls.append(len(batch))
        if len(calls) == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = (model(torch.stack(list(batch))) - 1).square().mean()
        loss.backward()
        return float(loss.detach()), len(batch)

    report = (lines if lines is not None else list[str]()).append
    found = training_loop(model, list(model.parameters()), EXAMPLES, CONFIG, 3, backward, report, "rows", str, store)
    found.pop("seconds")
    return found, [parameter.detach().clone() for parameter in model.parameters()]


def stop(folder: Path, after: int) -> None:
    """Train until a signal stops it."""
    with pytest.raises(Interrupted), handle_signals(), StepStore(folder, print) as store:
        train(store, after)


@pytest.mark.parametrize("after", range(1, 7))
def test_stopped_after_any_step_it_ends_bit_for_bit_as_without(tmp_path: Path, after: int) -> None:
    metrics, weights = train()
    scratch = tmp_path / ".sft-1.making-f-host-1"
    scratch.mkdir()
    stop(scratch, after)
    lines = list[str]()
    with StepStore(scratch, print) as store:
        again, found = train(store, lines=lines)
    assert lines[0] == f"going on after step {after} of 6"
    assert again == metrics
    assert all(torch.equal(*pair) for pair in zip(weights, found, strict=True))
    assert list(scratch.iterdir()) == []


def test_stopped_twice_it_still_does(tmp_path: Path) -> None:
    metrics, weights = train()
    stop(tmp_path, 2)
    stop(tmp_path, 3)
    with StepStore(tmp_path, print) as store:
        again, found = train(store)
    assert again == metrics
    assert all(torch.equal(*pair) for pair in zip(weights, found, strict=True))


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_damaged_step_is_not_used(tmp_path: Path, name: str) -> None:
    metrics, _ = train()
    stop(tmp_path, 2)
    path = tmp_path / "step" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    lines = list[str]()
    with StepStore(tmp_path, lines.append) as store:
        assert train(store)[0] == metrics
    assert [line.partition(" (")[0] for line in lines] == ["warning: the step of an interrupted training is damaged"]


def test_a_failure_keeps_no_step(tmp_path: Path) -> None:
    def fail() -> None:
        with StepStore(tmp_path, print) as store:
            store.capture = lambda: {"step": 1}
            raise TrainingError("no")

    with pytest.raises(TrainingError):
        fail()
    assert list(tmp_path.iterdir()) == []
