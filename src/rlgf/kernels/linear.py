"""Linear layers whose products are computed by the fastest available library.

On other devices, in other precisions, and for sizes at which nothing is gained, every layer runs
its original code.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rlgf.kernels import native
from rlgf.kernels.concurrency import deferred_gradients
from rlgf.kernels.processor import has_full_width_avx512, is_intel

MIN_MULTIPLICATIONS = 2**22  # see `min_multiplications`
MIN_ROWS = 256  # of a product for `native.matmul`: with fewer, packing costs more
MIN_COLUMNS = 32  # of a product for `native.matmul`: fewer are padded
# multiplications of a gradient that may be deferred: with fewer, the transfer costs more
MIN_DEFERRED = 300_000_000


@cache
def prefers_onednn() -> bool:
    """Return whether oneDNN multiplies fp32 matrices faster than the default library.

    With AVX-512 on AMD processors it is faster by a tenth. The default library is Intel's MKL: on
    Intel processors it is the faster one, and layers without a Python backward pass are faster,
    too.
    """
    able = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return able and not is_intel()


def min_multiplications() -> int:
    """Return the number of multiplications from which oneDNN is used.

    Below, the call costs more than it saves.
    """
    return MIN_MULTIPLICATIONS // 4 if has_full_width_avx512() else MIN_MULTIPLICATIONS


@cache
def has_bf16_matmul() -> bool:
    """Return whether the processor has bf16 instructions.

    Without them, matrix products are far slower in bf16 than in fp32.
    """
    known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return torch.backends.mkldnn.is_available() and any(ask is not None and ask() for ask in known)


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `states` · `weight`ᵀ + `bias` with the fastest available library.

    `states` is [..., in], `weight` [out, in] and `bias` [out]; returns [..., out].
    """
    if _uses_native_matmul(states, weight, weight.shape[0]):
        made = native.library().matmul(
            states.reshape(-1, states.shape[-1]), weight.t(), None if bias is None else bias.contiguous()
        )
        return made.view(*states.shape[:-1], weight.shape[0])
    if states.dtype == torch.float32 and not prefers_onednn():
        return nn.functional.linear(states, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def _uses_native_matmul(states: Tensor, others: Tensor, columns: int) -> bool:
    """Return whether `native` supports an fp32 product and takes less time than the libraries."""
    if columns < MIN_COLUMNS:
        return False
    rows = states.numel() // states.shape[-1]
    laid = (states.is_contiguous() or (states.dim() == 2 and states.stride(1) == 1)) and 1 in others.stride()
    return rows >= MIN_ROWS and laid and states.dtype == torch.float32 and native.has_matmul()


class _Linear(torch.autograd.Function):
    """A linear layer with its gradient, computed by the fastest available library.

    The weight gradient never uses oneDNN, which must copy an operand first. A large one is
    deferred, so that a concurrent task can compute it.

    If `used` is the weight in bf16, all products are in bf16, as under autocast, and the gradients
    of parameters in fp32.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, used: Tensor, layer: "_FastLayer") -> Tensor:
        ctx.layer, ctx.read_as = layer, states.dtype
        states, bias = states.to(used.dtype), None if bias is None else bias.to(used.dtype)
        ctx.save_for_backward(states, used)
        return linear(states, used.t() if layer.CONV else used, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        states, weight = ctx.saved_tensors
        for_states, for_weight, for_bias = None, None, None
        if ctx.needs_input_grad[0]:
            for_states = linear(gradient, weight if ctx.layer.CONV else weight.t()).to(ctx.read_as)
        flat = gradient.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            for_weight = _weight_grad(ctx.layer, flat, states.flatten(0, -2))
        if ctx.needs_input_grad[2]:
            for_bias = flat.sum(0).float()  # summed in fp32 and rounded once, as under autocast
        return for_states, for_weight, for_bias, None, None


def _weight_grad(layer: Any, gradient: Tensor, states: Tensor) -> Tensor | None:
    """Compute the gradient of a layer's weight, or defer it and return None.

    `gradient` [rows, out] is the gradient of the layer's output, `states` [rows, in] its input.
    """
    # the optimizer changes the weight next, and a fused one does not increment its version
    layer.in_bf16 = None
    queue = deferred_gradients() if _multiplications(states, layer.weight) >= MIN_DEFERRED else None
    if queue is None:
        return _compute_weight_grad(gradient, states, layer.CONV)
    queue.defer(layer.weight, partial(_compute_weight_grad, gradient, states, layer.CONV))
    return None


def _compute_weight_grad(gradient: Tensor, states: Tensor, conv: bool) -> Tensor:
    """Compute the gradient of a weight.

    `gradient` [rows, out] is the gradient of the product, `states` [rows, in] its input. `conv`:
    the weight is [in, out].
    """
    left, right = (states, gradient) if conv else (gradient, states)
    if _uses_native_matmul(left, right, min(left.shape[1], right.shape[1])):
        return native.library().matmul(left.t(), right)
    return (left.t() @ right).float()


def _multiplications(states: Tensor, weight: Tensor) -> int:
    return states.numel() * weight.numel() // states.shape[-1]


def _matmul_dtype(states: Tensor, weight: Tensor) -> torch.dtype | None:
    """Return the precision in which `_Linear` multiplies; None selects the original layer.

    It is None where nothing is gained, and where the precision is neither fp32 nor autocast's bf16.
    """
    multiplications = _multiplications(states, weight)
    if states.device.type != "cpu" or weight.dtype != torch.float32 or multiplications < min_multiplications():
        return None
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        return half if half == torch.bfloat16 and states.dtype in (half, torch.float32) and has_bf16_matmul() else None
    lends = multiplications >= MIN_DEFERRED and deferred_gradients() is not None and torch.is_grad_enabled()
    faster = prefers_onednn() or _uses_native_matmul(states, weight, weight.numel() // states.shape[-1])
    return states.dtype if states.dtype == torch.float32 and (faster or lends) else None


class _FastLayer(nn.Module):
    """The shared part of both linear layers: the choice of library and the bf16 weight.

    The weight is cast to bf16 once for several forward passes.
    """

    CONV: bool  # whether the weight is [in, out], as in GPT-2
    in_bf16: tuple[int, Tensor] | None = None  # the weight's version, and its cast

    def multiply(self, states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """Compute the layer by `_Linear`; return None to have the original layer used."""
        way = _matmul_dtype(states, weight)
        if way is None:
            return None
        used = weight if way == weight.dtype else self.weight_in(way, weight)
        if torch.is_grad_enabled():
            result: Tensor = _Linear.apply(states, weight, bias, used, self)
            return result
        return linear(states.to(way), used.t() if self.CONV else used, None if bias is None else bias.to(way))

    def weight_in(self, way: torch.dtype, weight: Tensor) -> Tensor:
        """Return the weight in bf16, cast again only if it has changed."""
        if self.in_bf16 is None or self.in_bf16[0] != weight._version:
            self.in_bf16 = (weight._version, weight.detach().to(way))
        return self.in_bf16[1]


class FastLinear(nn.Linear, _FastLayer):
    """A linear layer as `nn.Linear`, with faster products where available."""

    CONV = False

    def forward(self, input: Tensor) -> Tensor:
        """Compute the same as `nn.Linear`."""
        result = self.multiply(input, self.weight, self.bias)
        return super().forward(input) if result is None else result


class FastConv1D(Conv1D, _FastLayer):
    """GPT-2's linear layer (weight [in, out]), with faster products where available."""

    CONV = True

    def forward(self, x: Tensor) -> Tensor:
        """Compute the same as `Conv1D`."""
        result = self.multiply(x, self.weight, self.bias)
        return super().forward(x) if result is None else result
