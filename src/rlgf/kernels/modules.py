"""Faster ways to the same numbers on a CPU. Each replaces a part of a model; none defines a model.

`speed_up` puts them in where a model has the part; on other devices, in other precisions and for sizes at which nothing is
won, every part does what it did before.
"""

import math
import threading
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation, SiLUActivation
from transformers.pytorch_utils import Conv1D

from rlgf.kernels import native
from rlgf.kernels.concurrency import loans

LEAST_PRODUCT = 2**22  # see `least_product`
LEAST_ROWS = 256  # of a product, from which on what is compiled is asked: for fewer, packing costs more
LEAST_COLUMNS = 32  # and from which columns on: fewer are filled up
LEAST_LENT = 300_000_000  # multiplications of a gradient from which on another lane may compute it: below, its way costs more


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies matrices in fp32 faster than the default library: with AVX-512 on AMD's processors, by a tenth.

    That library is Intel's: on Intel's processors it is the faster one, and layers that need no Python backward beside it.
    """
    able = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return able and not native.made_by_intel()


def least_product() -> int:
    """Multiplications of a product from which on oneDNN is asked: below, the way there costs more than it saves."""
    return LEAST_PRODUCT // 4 if native.has_wide_units() else LEAST_PRODUCT


@cache
def multiplies_bf16() -> bool:
    """Whether the processor has instructions for bf16; without them such products are far slower than those of fp32."""
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.mkldnn.is_available() and any(ask is not None and ask() for ask in known)


def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`states` [..., in] times `weight` [out, in] transposed, plus `bias`, by the library that is the fastest one."""
    if _is_compiled(states, weight, weight.shape[0]):
        made = native.product(states.reshape(-1, states.shape[-1]), weight.t(), None if bias is None else bias.contiguous())
        return made.view(*states.shape[:-1], weight.shape[0])
    if states.dtype == torch.float32 and not prefers_onednn():
        return nn.functional.linear(states, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def _is_compiled(states: Tensor, others: Tensor, columns: int) -> bool:
    """Whether a product in fp32 is made by what is compiled, where that takes less time than the libraries."""
    if columns < LEAST_COLUMNS:
        return False
    rows = states.numel() // states.shape[-1]
    laid = (states.is_contiguous() or (states.dim() == 2 and states.stride(1) == 1)) and 1 in others.stride()
    return rows >= LEAST_ROWS and laid and states.dtype == torch.float32 and native.multiplies()


class _Product(torch.autograd.Function):
    """The same with a gradient. That of the weight is never oneDNN's, which must copy an operand first. Where it takes long, it
    is lent out: another lane may have the time.

    Where `used` is the weight in bf16, all products are in bf16, as autocast has them, and the gradients of parameters in fp32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, used: Tensor, layer: "_Fast") -> Tensor:
        ctx.layer, ctx.read_as = layer, states.dtype
        states, bias = states.to(used.dtype), None if bias is None else bias.to(used.dtype)
        ctx.save_for_backward(states, used)
        return product(states, used.t() if layer.CONV else used, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        states, weight = ctx.saved_tensors
        for_states, for_weight, for_bias = None, None, None
        if ctx.needs_input_grad[0]:
            for_states = product(gradient, weight if ctx.layer.CONV else weight.t()).to(ctx.read_as)
        flat = gradient.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            for_weight = _own_or_lent(ctx.layer, flat, states.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            for_bias = flat.sum(0).float()  # summed in fp32 inside and rounded once, as autocast has it
        return for_states, for_weight, for_bias, None, None


class _Joint(torch.autograd.Function):
    """What several layers without biases make of the same states, [..., out of all], as one product."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, layers: tuple["FastLinear", ...], *weights: Tensor) -> Tensor:
        joint = torch.cat(weights)
        ctx.layers = layers
        ctx.save_for_backward(states, joint)
        return product(states, joint)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        states, joint = ctx.saved_tensors
        for_states = product(gradient, joint.t()) if ctx.needs_input_grad[0] else None
        parts = gradient.flatten(0, -2).split([layer.weight.shape[0] for layer in ctx.layers], 1)
        asked = zip(ctx.layers, parts, ctx.needs_input_grad[2:])
        rows = states.flatten(0, -2)
        return for_states, None, *(_own_or_lent(layer, part, rows) if wanted else None for layer, part, wanted in asked)


def _own_or_lent(layer: Any, gradient: Tensor, states: Tensor) -> Tensor | None:
    """The gradient of a layer's weight, of that of its result [rows, out] and what it read [rows, in]; None: it is lent out."""
    layer.in_bf16 = None  # an optimizer is about to change the weight, and a fused one does not count as a version
    lent = loans() if _multiplications(states, layer.weight) >= LEAST_LENT else None
    if lent is None:
        return _for_weight(gradient, states, layer.CONV)
    lent.lend(layer.weight, partial(_for_weight, gradient, states, layer.CONV))
    return None


def _for_weight(gradient: Tensor, states: Tensor, conv: bool) -> Tensor:
    """The gradient of a weight, of that of the product [rows, out] and of what was multiplied [rows, in]."""
    left, right = (states, gradient) if conv else (gradient, states)
    if _is_compiled(left, right, min(left.shape[1], right.shape[1])):
        return native.product(left.t(), right)
    return (left.t() @ right).float()


def _multiplications(states: Tensor, weight: Tensor) -> int:
    return states.numel() * weight.numel() // states.shape[-1]


def _way(states: Tensor, weight: Tensor) -> torch.dtype | None:
    """In which precision `_Product` is to multiply.

    None, as it is anyway: where nothing is won, and where it is neither in fp32 nor in autocast's bf16.
    """
    multiplications = _multiplications(states, weight)
    if states.device.type != "cpu" or weight.dtype != torch.float32 or multiplications < least_product():
        return None
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        return half if half == torch.bfloat16 and states.dtype in (half, torch.float32) and multiplies_bf16() else None
    lends = multiplications >= LEAST_LENT and loans() is not None and torch.is_grad_enabled()
    faster = prefers_onednn() or _is_compiled(states, weight, weight.numel() // states.shape[-1])
    return states.dtype if states.dtype == torch.float32 and (faster or lends) else None


class _Fast(nn.Module):
    """What the two kinds of linear layer share: the way chosen, and the weight in bf16, cast once for many readings."""

    CONV: bool  # whether the weight is [in, out], as GPT-2 has it
    in_bf16: tuple[int, Tensor] | None = None  # the version of the weight that was cast, and what came of it

    def multiply(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The layer's result by `_Product`, None where that is not to be asked."""
        way = _way(states, weight)
        if way is None:
            return None
        used = weight if way == weight.dtype else self.weight_in(way, weight)
        if torch.is_grad_enabled():
            result: Tensor = _Product.apply(states, weight, bias, used, self)
            return result
        return product(states.to(way), used.t() if self.CONV else used, None if bias is None else bias.to(way))

    def weight_in(self, way: torch.dtype, weight: Tensor) -> Tensor:
        """The weight in bf16."""
        if self.in_bf16 is None or self.in_bf16[0] != weight._version:
            self.in_bf16 = (weight._version, weight.detach().to(way))
        return self.in_bf16[1]


_mine = threading.local()


def _made() -> dict[nn.Module, Tensor]:
    """What layers are about to be asked for in this thread, where it was made already."""
    if not hasattr(_mine, "made"):
        _mine.made = {}
    return _mine.made


class FastLinear(nn.Linear, _Fast):
    """`nn.Linear`, faster where it can be."""

    CONV = False

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if (made := _made().pop(self, None)) is not None:
            return made
        result = self.multiply(input, self.weight, self.bias)
        return super().forward(input) if result is None else result


class FastConv1D(Conv1D, _Fast):
    """GPT-2's linear layer, its weight the other way round, faster where it can be."""

    CONV = True

    def forward(self, x: Tensor) -> Tensor:
        """As `Conv1D`."""
        result = self.multiply(x, self.weight, self.bias)
        return super().forward(x) if result is None else result


class TanhGELU(nn.Module):
    """GELU's tanh approximation by the logistic function, ½(1 + tanh u) = σ(2u), which costs a CPU a third of a tanh."""

    def forward(self, states: Tensor) -> Tensor:
        """The activation of `states`, any shape."""
        if states.device.type != "cpu":
            return nn.functional.gelu(states, approximate="tanh")
        result: Tensor = _TanhGELU.apply(states)
        return result


SCALE, CUBE = 2 * (2 / math.pi) ** 0.5, 0.044715


def _whole(*tensors: Tensor) -> bool:
    """Whether `native` takes these as they are."""
    return native.takes(*tensors) and all(t.is_contiguous() for t in tensors)


class _TanhGELU(torch.autograd.Function):
    """By torch's operations it keeps the derivative instead of the argument, so that the backward pass is one product."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.compiled = _whole(states)
        if ctx.compiled:
            ctx.save_for_backward(states)
            return native.gelu(states)
        gate = torch.addcmul(states.new_tensor(SCALE), states, states, value=SCALE * CUBE).mul_(states).sigmoid_()
        if not ctx.needs_input_grad[0]:
            return gate.mul_(states)
        result = states * gate
        slope = torch.addcmul(states.new_tensor(SCALE), states, states, value=3 * SCALE * CUBE).mul_(result)
        ctx.save_for_backward(torch.lerp(slope, torch.ones_like(gate), gate))  # σ + (1 − σ) x σ · d(2u)/dx
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return native.gelu_back(kept, gradients[0].contiguous()) if ctx.compiled else kept.mul_(gradients[0])


class _Gated(torch.autograd.Function):
    """silu(x) · y of [..., x and y], in one pass over memory and one back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        return native.gated(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (states,) = ctx.saved_tensors
        return native.gated_back(states, gradients[0].contiguous())


class _Turned(torch.autograd.Function):
    """Rotary positions of heads [1, heads, tokens, size], in one pass over memory and one back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return native.turned(states[0], cosines[0], sines[0])[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        gradient = gradients[0] if gradients[0].stride(-1) == 1 else gradients[0].contiguous()
        return native.turned(gradient[0], cosines[0], sines[0], back=True)[None], None, None


class _RMSNorm(torch.autograd.Function):
    """x · r · w with r = 1 / √(mean x² + ε), in one pass over memory and one back, where single operations take twenty."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        result, scales = native.rms_norm(states, weight, epsilon)
        ctx.save_for_backward(states, weight, scales)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        states, weight, scales = ctx.saved_tensors
        return *native.rms_norm_back(states, weight, scales, gradients[0].contiguous()), None


RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "T5LayerNorm")  # all the same, under five names


@cache
def _with_fast_norm(kind: type) -> type:
    """A class of `RMS_NORMS` that works by `_RMSNorm` where `native` takes what it is given."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not _whole(hidden_states, self.weight):
            return kind.forward(self, hidden_states)  # pyright: ignore
        result: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return result

    return type(f"Fast{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


GATED = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")  # down(act(gate(x)) · up(x)), under four names


@cache
def _with_fast_gate(kind: type) -> type:
    """A class of `GATED` with one product for gate and up, and one step for the activation, silu, and what it multiplies."""

    def forward(self: Any, x: Tensor) -> Tensor:
        able = getattr(self.up_proj, "out_features", 1) % native.LANES == 0 and native.takes(x)
        joint = _joint(x, self.gate_proj, self.up_proj) if able else None
        return kind.forward(self, x) if joint is None else self.down_proj(_Gated.apply(joint))  # pyright: ignore

    return type(f"Fast{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


def _joint(states: Tensor, *layers: Any) -> Tensor | None:
    """What layers make of the same states, side by side; None where they are not to be asked at once."""
    if states.numel() < LEAST_ROWS * states.shape[-1] or states.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return None
    biases: list[Tensor | None] = [layer.bias for layer in layers if type(layer) is FastLinear]
    plain = len(biases) == len(layers) and not any(bias is not None for bias in biases)
    if not plain or any(layer.weight.dtype != states.dtype for layer in layers):
        return None
    result: Tensor = _Joint.apply(states, layers, *(layer.weight for layer in layers))
    return result


ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")  # q, k, v, then rotary positions


@cache
def _with_fast_attention(kind: Any) -> type:
    """A class of `ATTENTIONS` with one product for q, k and v.

    The rest is transformers' own code, in which the function that turns heads by their positions is `_turn`.
    """
    code = kind.forward
    own = FunctionType(code.__code__, {**code.__globals__, TURN: partial(_turn, code.__globals__[TURN])}, code.__name__)
    own.__kwdefaults__, own.__defaults__ = code.__kwdefaults__, code.__defaults__

    def forward(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        joint = _joint(hidden_states, *layers)
        if joint is None:
            return own(self, hidden_states, *arguments, **options)
        _made().update(zip(layers, joint.split([layer.weight.shape[0] for layer in layers], -1)))
        try:
            return own(self, hidden_states, *arguments, **options)
        finally:
            _made().clear()  # where an error came between

    return type(f"Fast{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


TURN = "apply_rotary_pos_emb"  # what transformers calls it


def _turn(plain: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """`plain`, faster for a line of tokens in fp32 whose heads have halves of whole vectors."""
    able = not arguments and not options and q.dim() == 4 and q.shape[0] == k.shape[0] == cos.shape[0] == 1
    if able and q.shape[3] % (2 * native.LANES) == 0 and q.shape[3] == cos.shape[2] and native.takes(q, k) and _whole(cos, sin):
        return _Turned.apply(q, cos, sin), _Turned.apply(k, cos, sin)
    return plain(q, k, cos, sin, *arguments, **options)


REPLACEMENTS: dict[type, type] = {nn.Linear: FastLinear, Conv1D: FastConv1D}


def speed_up(model: nn.Module) -> None:
    """Put the faster parts into a model. Names, parameters and what is saved stay as they are."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, TanhGELU())
            elif type(child).__name__ in RMS_NORMS and hasattr(child, "variance_epsilon"):
                child.__class__ = _with_fast_norm(type(child))
            elif type(child).__name__ in GATED and isinstance(child.act_fn, nn.SiLU | SiLUActivation):
                child.__class__ = _with_fast_gate(type(child))
            elif type(child).__name__ in ATTENTIONS and TURN in getattr(type(child).forward, "__globals__", {}):
                child.__class__ = _with_fast_attention(type(child))
            elif type(child) in REPLACEMENTS:
                child.__class__ = REPLACEMENTS[type(child)]
