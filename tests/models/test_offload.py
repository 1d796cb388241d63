"""Models in host memory while they are not used."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import config_of, tiny_model, tiny_parts
from rlgf.algorithms.base import Algorithm
from rlgf.algorithms.registry import d2lols
from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.errors import ConfigError
from rlgf.guides.local import ModelGuide
from rlgf.models import offload as offloading
from rlgf.models.offload import offload, on_device
from rlgf.pipeline.preflight import check
from rlgf.pipeline.resolve import resolve
from rlgf.trainer import Trainer
from rlgf.types import SamplingParams

CPU = torch.device("cpu")


def trainer_of(algorithm: Algorithm, device: str = "cpu", **values: Any) -> Trainer:
    parts = tiny_parts(algorithm, config_of(**values), None, tiny_model())
    if algorithm.needs_guide_rollout:
        parts = replace(parts, guide=ModelGuide(tiny_model(seed=3), SamplingParams()))
    for module in (parts.models.policy.model, parts.models.reference.model, *parts.models.critics.values()):
        module.to(device)
    return Trainer(parts)


def parked(trainer: Trainer) -> Trainer:
    """With reference and critics parked; whoever reads with one that rests fails."""
    models = trainer.components.models
    for module in (models.reference.model, *models.critics.values()):
        offload(module, CPU)

        def works(module: Any, arguments: Any) -> None:
            assert offloading._offloaded[module].depth > 0, "read while it rests"

        module.register_forward_pre_hook(works)
    return trainer


@pytest.mark.integration
def test_models_that_rest_are_awake_whenever_they_read_and_nothing_else_changes():
    resting, plain = parked(trainer_of(d2lols(0.5, 0.5, 1).build())), trainer_of(d2lols(0.5, 0.5, 1).build())
    for iteration in range(3):
        found, expected = (
            {key: repr(value) for key, value in trainer.step(iteration)[0].items() if "second" not in key}
            for trainer in (resting, plain)
        )
        assert found == expected
    test = resting.components.task.test[:3]
    assert resting.evaluate(test)[0] == plain.evaluate(test)[0]


def test_an_optimizer_moves_with_its_model(monkeypatch: pytest.MonkeyPatch):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, fused=True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    monkeypatch.setattr(
        offloading, "HOST", torch.device("meta")
    )  # stands for the other device here; there is no way back from it
    offload(model, CPU)
    monkeypatch.setattr(offloading, "_move", moves := Moves())
    with on_device(model, optimizer), on_device(model, optimizer):
        assert moves.seen == [CPU]
    assert moves.seen == [CPU, torch.device("meta")]
    monkeypatch.undo()
    offloading._move(model, optimizer, torch.device("meta"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    states = [value for state in optimizer.state.values() for value in state.values()]
    assert {value.device.type for value in states} == {"meta"}


class Moves:
    """Record the devices that models were moved to."""

    def __init__(self) -> None:
        self.seen: list[torch.device] = []

    def __call__(self, model: Any, optimizer: Any, device: torch.device) -> None:
        self.seen.append(device)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([("runtime.offload", ["reference"])], "runtime.device is the CPU"),
        ([("runtime.offload", ["reference"]), ("lora.rank", 2), ("runtime.device", "cuda")], "no weights of its own"),
        (
            [("runtime.offload", ["critic"]), ("critic.kind", "value_head"), ("runtime.device", "cuda")],
            "uses the policy's weights",
        ),
    ],
)
def test_what_cannot_be_offloaded_is_refused(
    changes: list[tuple[str, Any]], words: str, monkeypatch: pytest.MonkeyPatch
):  # also of a GPU that this machine lacks
    monkeypatch.setattr("rlgf.pipeline.resolve.choose_device", lambda name: "cpu" if name == "auto" else name)
    with pytest.raises(ConfigError, match=words):
        check(resolve(override(Config(), changes)))


@pytest.mark.gpu
def test_on_a_gpu_offloaded_models_leave_room_and_a_budget_is_found():
    plain, resting = (trainer_of(d2lols(0.5, 0.5, 1).build(), "cuda") for _ in range(2))
    assert plain.forward_config.token_budget >= 2048
    models = resting.components.models
    for module in (models.reference.model, *models.critics.values()):
        offload(module, torch.device("cuda"))
        assert next(module.parameters()).device.type == "cpu"
    for iteration in range(3):
        found, expected = (trainer.step(iteration)[0] for trainer in (resting, plain))
        assert found["policy_loss"] == pytest.approx(expected["policy_loss"], rel=1e-4, abs=1e-6)
    assert next(models.reference.model.parameters()).device.type == "cpu"
