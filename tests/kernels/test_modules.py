"""The faster parts against the parts they replace."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import NewGELUActivation

from helpers import NEEDS_ONEDNN, largest_difference, use_fast_products_at_any_size, with_gradients
from rlgf.kernels.dispatch import PATHS
from rlgf.kernels.linear import FastConv1D, FastLinear
from rlgf.kernels.modules import TanhGELU, replace_modules


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch):
    use_fast_products_at_any_size(monkeypatch)


def test_gelu_is_that_of_transformers_with_its_gradient():
    states = torch.cat([torch.linspace(-8, 8, 801), torch.tensor([0.0, -1e-3, 30.0, -30.0])])
    assert largest_difference(with_gradients(TanhGELU(), states), with_gradients(NewGELUActivation(), states)) < 3e-6


def test_gelu_has_the_values_one_can_look_up():
    found = TanhGELU()(torch.tensor([0.0, 1.0, -1.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.841192, -0.158808]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("grad", [True, False])
def test_gelu_leaves_what_it_reads_as_it_was(grad: bool):
    states = torch.linspace(-2, 2, 9, requires_grad=grad)
    before = states.detach().clone()
    TanhGELU()(states)
    assert torch.equal(states.detach(), before)


@NEEDS_ONEDNN
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_sped_up_model_gives_the_same_loss_and_gradients(kind: str):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    plain = (
        GPT2LMHeadModel(GPT2Config(**shape, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
        if kind == "gpt2"
        else LlamaForCausalLM(LlamaConfig(**shape, **small)).eval()
    )
    fast = copy.deepcopy(plain)
    replace_modules(fast, PATHS)
    replace_modules(fast, PATHS)  # twice does not matter
    replaced = {type(module) for module in fast.modules()} - {type(module) for module in plain.modules()}
    assert replaced == ({FastConv1D, FastLinear, TanhGELU} if kind == "gpt2" else {FastLinear})
    assert set(fast.state_dict()) == set(plain.state_dict())
    ids = torch.arange(36).view(3, 12) % 50
    losses: list[Tensor] = []
    for model in (fast, plain):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    for (name, one), (_, other) in zip(fast.named_parameters(), plain.named_parameters()):
        assert one.grad is not None, name
        assert other.grad is not None, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)
