"""Linear layers against the layers they replace."""

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from helpers import NEEDS_ONEDNN, largest_difference, requires_bf16_products, use_fast_products_at_any_size, with_gradients
from rlgf.kernels import linear, native
from rlgf.kernels.linear import FastConv1D, FastLinear
from rlgf.kernels.modules import LINEAR_LAYERS


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch):
    use_fast_products_at_any_size(monkeypatch)


@NEEDS_ONEDNN
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_multiply_as_before(bias: bool):
    plain = nn.Linear(24, 40, bias=bias)
    fast = copy.deepcopy(plain)
    fast.__class__ = FastLinear
    states = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))
    assert largest_difference(with_gradients(fast, states), with_gradients(plain, states)) < 1e-5
    with torch.no_grad():
        assert largest_difference([fast(states)], [plain(states)]) < 1e-5


@NEEDS_ONEDNN
def test_gpt2s_layers_multiply_as_before():
    plain = Conv1D(40, 24)
    nn.init.normal_(plain.bias)
    fast = copy.deepcopy(plain)
    fast.__class__ = FastConv1D
    states = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0))
    assert largest_difference(with_gradients(fast, states), with_gradients(plain, states)) < 1e-5


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_layers_and_their_gradients_are_products_in_c(kind: type, monkeypatch: pytest.MonkeyPatch):
    if (reason := native.unavailable_reason()) or not native.library().has_matmul():
        pytest.skip(reason or "this processor has no AVX-512, which products in C need")
    monkeypatch.setattr(native, "has_matmul", lambda: True)
    made, matmul = list[tuple[int, int]](), native.library().matmul
    monkeypatch.setattr(native.library(), "matmul", lambda *given: made.append(matmul(*given).shape) or matmul(*given))
    torch.manual_seed(0)
    plain = nn.Linear(48, 80) if kind is nn.Linear else Conv1D(80, 48)
    fast = copy.deepcopy(plain)
    fast.__class__ = LINEAR_LAYERS[kind]
    found = with_gradients(fast, states := torch.randn(3, 100, 48))
    assert made == [(300, 80), (300, 48), tuple(plain.weight.shape)]  # the result, and both gradients
    exact = with_gradients(plain.double(), states.double())
    assert largest_difference([t.double() for t in found], exact) < 2e-6


def test_other_precisions_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear, "has_bf16_matmul", lambda: False)
    layer = FastLinear(8, 8)
    states = torch.randn(4, 8)
    assert linear._matmul_dtype(states, layer.weight) == torch.float32
    assert linear._matmul_dtype(states.double(), layer.weight) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert linear._matmul_dtype(states, layer.weight) is None
        assert layer(states).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert linear._matmul_dtype(states, layer.weight) is None


@NEEDS_ONEDNN
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_in_bf16_layers_give_what_autocast_gives(kind: type, monkeypatch: pytest.MonkeyPatch):
    requires_bf16_products()
    monkeypatch.setattr(linear, "has_bf16_matmul", lambda: True)
    torch.manual_seed(0)
    plain = nn.Linear(24, 40) if kind is nn.Linear else Conv1D(40, 24)
    fast = copy.deepcopy(plain)
    fast.__class__ = LINEAR_LAYERS[kind]
    states = torch.randn(3, 7, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear._matmul_dtype(states, fast.weight) == torch.bfloat16
        found, expected = with_gradients(fast, states), with_gradients(plain, states)
        assert fast(states).dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(fast(states), found[0])
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert largest_difference([t.float() for t in found], [t.float() for t in expected]) < 2**-7  # a rounding to 8 bits


@NEEDS_ONEDNN
def test_the_weight_in_bf16_follows_the_weight(monkeypatch: pytest.MonkeyPatch):
    requires_bf16_products()
    monkeypatch.setattr(linear, "has_bf16_matmul", lambda: True)
    layer, states = FastLinear(8, 8, bias=False), torch.eye(8)
    other = {"weight": torch.full((8, 8), 3.0)}
    with torch.autocast("cpu", torch.bfloat16):
        first = layer(states)
        assert layer.weight_in(torch.bfloat16, layer.weight) is layer.weight_in(torch.bfloat16, layer.weight)  # cast once
        first.float().sum().backward()
        torch.optim.AdamW(layer.parameters(), 0.5, fused=True).step()
        assert torch.equal(layer(states).float(), layer.weight.t().bfloat16().float())
        layer.load_state_dict(other)
        assert torch.equal(layer(states), torch.full((8, 8), 3.0, dtype=torch.bfloat16))
