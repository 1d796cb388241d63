"""The largest micro-batch that fits, and what a run makes of it."""

from typing import Any

import pytest
import torch

from helpers import config_of, parameters, tiny_trainer
from rlgf.algorithms.registry import ppo
from rlgf.errors import ConfigError
from rlgf.models.memory import find_micro_batch_size
from rlgf.trainer import Trainer


def trainer_of(**values: Any) -> Trainer:
    return tiny_trainer(ppo().build(), config_of(**values))


@pytest.mark.parametrize(("room", "most", "found"), [(5000, 10**6, 4096), (10**9, 5000, 8192), (10**9, 10, 2048)])
def test_the_largest_micro_batch_that_fits_is_found(room: int, most: int, found: int):
    tried: list[int] = []

    def attempt(tokens: int) -> None:
        tried.append(tokens)
        if tokens > room:
            raise torch.OutOfMemoryError

    assert find_micro_batch_size(attempt, most) == found
    assert max(tried) <= 2 * found
    with pytest.raises(ConfigError, match="does not fit in the accelerator's memory"):
        find_micro_batch_size(lambda tokens: attempt(10**10), most)


@pytest.mark.integration
@pytest.mark.parametrize("kind", ["separate", "value_head"])
def test_a_rehearsal_reads_as_many_tokens_as_asked_and_leaves_nothing_behind(kind: str):
    trainer, plain = (trainer_of(critic__kind=kind) for _ in range(2))
    before = parameters(trainer.components.models.policy.model)
    read: list[int] = []
    hook = trainer.components.models.policy.model.register_forward_pre_hook(
        lambda module, arguments, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    trainer.updater.trained_models.probe(96, 12, 5)
    hook.remove()
    assert sum(read) == 96  # eight rows, their last tokens not read: 88, filled up
    assert all(torch.equal(one, other) for one, other in zip(before, parameters(trainer.components.models.policy.model)))
    assert all(p.grad is None for p in trainer.components.models.policy.trainable_parameters())
    found, expected = trainer.step(0)[0], plain.step(0)[0]
    assert found["policy_loss"] == expected["policy_loss"]


def test_a_budget_that_was_found_is_kept_for_the_rest_of_a_run():
    trainer, again = trainer_of(), trainer_of()
    assert trainer.forward_config.token_budget == config_of().runtime.micro_batch_tokens == 2048
    trainer._set_token_budget(4096)
    assert trainer.updater.forward_config.token_budget == trainer.evaluation_context.forward_config.token_budget == 4096
    assert trainer.state()["token_budget"] == 4096
    assert again.forward_config.token_budget == 2048
