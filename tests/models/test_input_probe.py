"""The inputs of models that are not known by their class: what is tried, and what a failure says."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import WORDS
from rlgf.config.sections import LoraConfig
from rlgf.models import input_probe, lora
from rlgf.models.forward import input_format
from rlgf.models.loading import wrap_model
from rlgf.rl.model_check import check_model

SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 2, "vocab_size": len(WORDS),
}  # fmt: skip


def random_model(kind: str, **shape: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SHAPE, **shape})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_a_model_that_makes_masks_of_its_own_is_not_packed() -> None:
    model = wrap_model(random_model("doge"), WORDS, "doge")
    assert input_format(model.model).rows == "padded"
    assert check_model(model).agreement.max_error < 1e-5


def test_linear_layers_of_a_class_of_the_model_get_adapters_if_they_are_products() -> None:
    model = random_model("falcon", num_kv_heads=1)
    lora.add(model, "new", LoraConfig(rank=2), seed=0)
    assert "query_key_value" in lora.adapted_names(model)


@pytest.mark.parametrize(
    "failure",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), torch.OutOfMemoryError("CUDA out of memory")],
)
def test_a_full_memory_says_nothing_about_a_model(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*arguments: Any) -> Any:
        raise failure

    monkeypatch.setattr(input_probe, "evaluate_rows", evaluate)
    monkeypatch.setattr(input_probe, "_known", {})
    monkeypatch.setattr(input_probe, "is_plain", lambda model: False)
    with pytest.raises(type(failure)):
        input_probe.probe_input_format(random_model("llama"))


def test_a_mistake_of_ours_is_not_taken_for_a_model_that_refuses_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*arguments: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(input_probe, "evaluate_rows", evaluate)
    monkeypatch.setattr(input_probe, "_known", {})
    monkeypatch.setattr(input_probe, "is_plain", lambda model: False)
    with pytest.raises(ZeroDivisionError):
        input_probe.probe_input_format(random_model("llama"))
