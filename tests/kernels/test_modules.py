"""The faster parts against the parts they replace."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from helpers import requires_bf16_products, tiny_model
from rlgf.kernels import modules
from rlgf.kernels.modules import FastConv1D, FastLinear, TanhGELU, replace_modules
from rlgf.models import loading, padding_free

AVAILABLE = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture(autouse=True)
def at_any_size(monkeypatch: pytest.MonkeyPatch):
    """Replaced whatever the processor, and used however small the product is."""
    monkeypatch.setattr(modules, "MIN_MULTIPLICATIONS", 0)
    monkeypatch.setattr(modules, "MIN_ROWS", 0)
    monkeypatch.setattr(modules, "MIN_COLUMNS", 0)
    monkeypatch.setattr(modules, "prefers_onednn", torch.backends.mkldnn.is_available)


def with_gradients(module: nn.Module, states: Tensor) -> list[Tensor]:
    """What a module makes of states, and the gradients of a weighted sum of it."""
    read = states.clone().requires_grad_(True)
    result = module(read)
    upstream = torch.linspace(-1, 2, result.numel()).view(result.shape)
    gradients = torch.autograd.grad((result * upstream).sum(), [read, *module.parameters()])
    return [result.detach(), *gradients]


def states_gradient(module: nn.Module, states: Tensor) -> list[Tensor]:
    """The gradient of the states alone, of a module whose parameters have none."""
    read = states.clone().requires_grad_(True)
    return list(torch.autograd.grad(module(read).square().sum(), read))


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


@pytest.mark.parametrize("kind", [LlamaRMSNorm, T5LayerNorm])
def test_a_norm_is_that_of_transformers_with_its_gradient(kind: Any):
    torch.manual_seed(0)
    plain = nn.Sequential(kind(6, eps=1e-2))
    nn.init.normal_(plain[0].weight)
    fast = copy.deepcopy(plain)
    replace_modules(fast)
    replace_modules(fast)  # twice does not matter
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
    replace_modules(fast)
    assert any(isinstance(module, (FastLinear, FastConv1D)) for module in fast.modules())
    assert not modules._precomputed()
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


def test_other_precisions_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(modules, "has_bf16_matmul", lambda: False)
    layer = FastLinear(8, 8)
    states = torch.randn(4, 8)
    assert modules._matmul_dtype(states, layer.weight) == torch.float32
    assert modules._matmul_dtype(states.double(), layer.weight) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert modules._matmul_dtype(states, layer.weight) is None
        assert layer(states).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        assert modules._matmul_dtype(states, layer.weight) is None


@AVAILABLE
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_in_bf16_layers_give_what_autocast_gives(kind: type, monkeypatch: pytest.MonkeyPatch):
    requires_bf16_products()
    monkeypatch.setattr(modules, "has_bf16_matmul", lambda: True)
    torch.manual_seed(0)
    plain = nn.Linear(24, 40) if kind is nn.Linear else Conv1D(40, 24)
    fast = copy.deepcopy(plain)
    fast.__class__ = modules.REPLACEMENTS[kind]
    states = torch.randn(3, 7, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert modules._matmul_dtype(states, fast.weight) == torch.bfloat16
        found, expected = with_gradients(fast, states), with_gradients(plain, states)
        assert fast(states).dtype == torch.bfloat16
        with torch.no_grad():
            assert torch.equal(fast(states), found[0])
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert largest_difference([t.float() for t in found], [t.float() for t in expected]) < 2**-7  # a rounding to 8 bits


@AVAILABLE
def test_the_weight_in_bf16_follows_the_weight(monkeypatch: pytest.MonkeyPatch):
    requires_bf16_products()
    monkeypatch.setattr(modules, "has_bf16_matmul", lambda: True)
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


def test_models_are_left_alone_on_request(tmp_path: Path):
    torch.manual_seed(0)
    tiny_model().save(tmp_path)
    kinds: dict[str, set[type]] = {}
    losses: dict[str, Tensor] = {}
    try:
        for which in ("auto", "off"):
            loading.use_kernels(which)
            model = loading.load_language_model(str(tmp_path)).model
            kinds[which] = {type(module) for module in model.modules()}
            assert padding_free.is_enabled(model) == (which == "auto")
            losses[which] = model(input_ids=torch.tensor([[1, 2, 3, 1]]), labels=torch.tensor([[1, 2, 3, 1]])).loss
    finally:
        loading.use_kernels("auto")
    assert FastConv1D in kinds["auto"]
    assert not kinds["off"] & {FastConv1D, FastLinear, TanhGELU}
    torch.testing.assert_close(losses["auto"], losses["off"], rtol=1e-6, atol=0)


def test_q_k_and_v_are_one_product_and_nothing_of_it_is_left_behind(monkeypatch: pytest.MonkeyPatch):
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, bos_token_id=0, eos_token_id=0, num_key_value_heads=1, **small)).eval()
    plain = copy.deepcopy(model)
    replace_modules(model)
    attention: Any = model.model.layers[0].self_attn
    made: list[tuple[int, ...]] = []
    joint = modules._fused_projection
    monkeypatch.setattr(
        modules, "_fused_projection", lambda states, *layers: made.append(states.shape) or joint(states, *layers)
    )
    ids = torch.arange(40)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert made == [(1, 40, 64), (1, 40, 64)]  # attention's, and the feed-forward part's
    assert (
        joint(torch.zeros(40, 64), attention.q_proj, nn.Identity()) is None
    )  # a layer that is something else: each for itself
    with pytest.raises(TypeError):
        attention(torch.zeros(1, 40, 64), None, None)  # no positions: stops after the products
    assert not modules._precomputed()
