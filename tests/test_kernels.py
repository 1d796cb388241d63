"""The faster parts against the parts they replace."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from rlgf import kernels
from rlgf.kernels import FastConv1D, FastLinear, TanhGELU, speed_up

AVAILABLE = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch):
    """Replaced whatever the processor, and used however small the product is."""
    monkeypatch.setattr(kernels, "LEAST_PRODUCT", 0)
    monkeypatch.setattr(kernels, "prefers_onednn", torch.backends.mkldnn.is_available)


def with_gradients(module: nn.Module, states: Tensor) -> list[Tensor]:
    """What a module makes of states, and the gradients of a weighted sum of it."""
    read = states.clone().requires_grad_(True)
    result = module(read)
    upstream = torch.linspace(-1, 2, result.numel()).view(result.shape)
    gradients = torch.autograd.grad((result * upstream).sum(), [read, *module.parameters()])
    return [result.detach(), *gradients]


def largest_difference(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of each tensor."""
    assert len(some) == len(others)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(some, others))


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


@AVAILABLE
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_multiply_as_before(bias: bool):
    plain = nn.Linear(24, 40, bias=bias)
    fast = copy.deepcopy(plain)
    fast.__class__ = FastLinear
    states = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))
    assert largest_difference(with_gradients(fast, states), with_gradients(plain, states)) < 1e-5
    with torch.no_grad():
        assert largest_difference([fast(states)], [plain(states)]) < 1e-5


@AVAILABLE
def test_gpt2s_layers_multiply_as_before():
    plain = Conv1D(40, 24)
    nn.init.normal_(plain.bias)
    fast = copy.deepcopy(plain)
    fast.__class__ = FastConv1D
    states = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))
    assert largest_difference(with_gradients(fast, states), with_gradients(plain, states)) < 1e-5


@AVAILABLE
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
    speed_up(fast)
    assert any(isinstance(module, (FastLinear, FastConv1D)) for module in fast.modules())
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


def test_other_precisions_are_left_to_torch():
    layer = FastLinear(8, 8)
    states = torch.randn(4, 8)
    assert kernels._suits(states, layer.weight)
    assert not kernels._suits(states.double(), layer.weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert not kernels._suits(states, layer.weight)
        assert layer(states).dtype == torch.bfloat16
