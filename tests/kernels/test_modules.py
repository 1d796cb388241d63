"""The faster parts against the parts they replace."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from helpers import NEEDS_ONEDNN, largest_difference, use_fast_products_at_any_size, with_gradients
from rlgf.kernels import modules, native
from rlgf.kernels.dispatch import PATHS
from rlgf.kernels.linear import FastConv1D, FastLinear, precomputed
from rlgf.kernels.modules import TanhGELU, replace_modules


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch):
    use_fast_products_at_any_size(monkeypatch)


def states_gradient(module: nn.Module, states: Tensor) -> list[Tensor]:
    """The gradient of the states alone, of a module whose parameters have none."""
    read = states.clone().requires_grad_(True)
    return list(torch.autograd.grad(module(read).square().sum(), read))


def test_gelu_is_that_of_transformers_with_its_gradient():
    states = torch.cat([torch.linspace(-8, 8, 801), torch.tensor([0.0, -1e-3, 30.0, -30.0])])
    assert largest_difference(with_gradients(TanhGELU(), states), with_gradients(NewGELUActivation(), states)) < 3e-6


def test_gelu_has_the_values_one_can_look_up():
    found = TanhGELU()(torch.tensor([0.0, 1.0, -1.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.841192, -0.158808]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm])
def test_a_norm_is_that_of_transformers_with_its_gradient(kind: Any):
    torch.manual_seed(0)
    plain = nn.Sequential(kind(6, eps=1e-2))
    nn.init.normal_(plain[0].weight)
    fast = copy.deepcopy(plain)
    replace_modules(fast, PATHS)
    replace_modules(fast, PATHS)  # twice does not matter
    assert type(fast[0]).__name__ == f"Fast{kind.__name__}"
    states = torch.randn(2, 5, 6) * torch.tensor([1e-3, 1.0])[:, None, None]
    before = states.clone()
    assert largest_difference(with_gradients(fast, states), with_gradients(plain, states)) < 1e-5
    assert torch.equal(states, before)
    assert torch.equal(fast(states.bfloat16()), plain(states.bfloat16()))  # left to transformers
    assert torch.equal(copy.deepcopy(fast)(states), fast(states))
    frozen, reference = (module.requires_grad_(False) for module in (fast, plain))
    assert largest_difference(states_gradient(frozen, states), states_gradient(reference, states)) < 1e-5


@pytest.mark.parametrize("grad", [True, False])
def test_gelu_leaves_what_it_reads_as_it_was(grad: bool):
    states = torch.linspace(-2, 2, 9, requires_grad=grad)
    before = states.detach().clone()
    TanhGELU()(states)
    assert torch.equal(states.detach(), before)


@NEEDS_ONEDNN
@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama of an odd width"])
def test_a_sped_up_model_gives_the_same_loss_and_gradients(kind: str):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 0}
    wide = 72 if "odd" in kind else 64
    small = {"hidden_size": 32, "intermediate_size": wide, "num_hidden_layers": 2, "num_attention_heads": 2}
    plain = (
        GPT2LMHeadModel(GPT2Config(**shape, n_embd=32, n_layer=2, n_head=2, n_positions=32)).eval()
        if kind == "gpt2"
        else LlamaForCausalLM(LlamaConfig(**shape, **small)).eval()
    )
    fast = copy.deepcopy(plain)
    replace_modules(fast, PATHS)
    assert any(isinstance(module, (FastLinear, FastConv1D)) for module in fast.modules())
    assert not precomputed()
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


def test_q_k_and_v_are_one_product_and_nothing_of_it_is_left_behind(monkeypatch: pytest.MonkeyPatch):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, bos_token_id=0, eos_token_id=0, num_key_value_heads=1, **small)).eval()
    plain = copy.deepcopy(model)
    replace_modules(model, PATHS)
    attention: Any = model.model.layers[0].self_attn
    made: list[tuple[int, ...]] = []
    joint = modules.fused_projection
    monkeypatch.setattr(
        modules, "fused_projection", lambda states, *layers: made.append(states.shape) or joint(states, *layers)
    )
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    # attention's, and with the C kernels the feed-forward part's
    assert made == [(1, 40, 64)] * (1 if native.unavailable_reason() else 2)
    assert (
        joint(torch.zeros(40, 64), attention.q_proj, nn.Identity()) is None
    )  # a layer that is something else: each for itself
    with pytest.raises(TypeError):
        attention(torch.zeros(1, 40, 64), None, None)  # no positions: stops after the products
    assert not precomputed()
