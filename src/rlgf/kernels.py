"""Faster ways to the same numbers on a CPU. Each replaces a part of a model; none defines a model.

`speed_up` puts them in where a model has the part; on other devices, in other precisions and for sizes at which nothing is
won, every part does what it did before.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

LEAST_PRODUCT = 2**22  # multiplications of a product from which on the other library is asked: below, the way there costs more


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies matrices faster than the default library: with AVX-512, by a tenth on AMD's processors."""
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def product(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`states` [..., in] times `weight` [out, in] transposed, plus `bias`, by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    """The same with a gradient. That of the weight is left to the default library, which is the faster one there."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, conv: bool) -> Tensor:
        ctx.save_for_backward(states, weight)
        ctx.conv = conv  # whether the weight is [in, out], as GPT-2 has it
        return product(states, weight.t() if conv else weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        states, weight = ctx.saved_tensors
        for_states, for_weight, for_bias = None, None, None
        if ctx.needs_input_grad[0]:
            for_states = product(gradient, weight if ctx.conv else weight.t())
        flat, rows = gradient.flatten(0, -2), states.flatten(0, -2)
        if ctx.needs_input_grad[1]:
            for_weight = rows.t() @ flat if ctx.conv else flat.t() @ rows
        if ctx.needs_input_grad[2]:
            for_bias = flat.sum(0)
        return for_states, for_weight, for_bias, None


def _suits(states: Tensor, weight: Tensor) -> bool:
    """Whether the product is large enough, and in full precision on a CPU."""
    multiplications = states.numel() * weight.numel() // states.shape[-1]
    exact = states.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return states.device.type == "cpu" and exact and multiplications >= LEAST_PRODUCT


class FastLinear(nn.Linear):
    """`nn.Linear` by oneDNN where that is faster."""

    def forward(self, input: Tensor) -> Tensor:
        """As `nn.Linear`."""
        if not _suits(input, self.weight):
            return super().forward(input)
        if not torch.is_grad_enabled():
            return product(input, self.weight, self.bias)
        result: Tensor = _Product.apply(input, self.weight, self.bias, False)
        return result


class FastConv1D(Conv1D):
    """GPT-2's linear layer, its weight the other way round, by oneDNN where that is faster."""

    def forward(self, x: Tensor) -> Tensor:
        """As `Conv1D`."""
        if not _suits(x, self.weight):
            return super().forward(x)
        if not torch.is_grad_enabled():
            return product(x, self.weight.t(), self.bias)
        result: Tensor = _Product.apply(x, self.weight, self.bias, True)
        return result


class TanhGELU(nn.Module):
    """GELU's tanh approximation by the logistic function, ½(1 + tanh u) = σ(2u), which costs a CPU a third of a tanh."""

    def forward(self, states: Tensor) -> Tensor:
        """The activation of `states`, any shape."""
        if states.device.type != "cpu":
            return nn.functional.gelu(states, approximate="tanh")
        result: Tensor = _TanhGELU.apply(states)
        return result


class _TanhGELU(torch.autograd.Function):
    """Keeps the derivative instead of the argument, so that the backward pass is one product."""

    SCALE, CUBE = 2 * (2 / math.pi) ** 0.5, 0.044715

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        cubic = _TanhGELU.CUBE * _TanhGELU.SCALE
        linear = states.new_tensor(_TanhGELU.SCALE)
        gate = torch.addcmul(linear, states, states, value=cubic).mul_(states).sigmoid_()
        if not ctx.needs_input_grad[0]:
            return gate.mul_(states)
        result = states * gate
        slope = torch.addcmul(linear, states, states, value=3 * cubic).mul_(result)  # x σ · d(2u)/dx
        ctx.save_for_backward(torch.lerp(slope, slope.new_ones(()), gate, out=slope))  # σ + (1 − σ) x σ · d(2u)/dx
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope


REPLACEMENTS: dict[type, type] = {nn.Linear: FastLinear, Conv1D: FastConv1D}


def speed_up(model: nn.Module) -> None:
    """Put the faster parts into a model. Names, parameters and what is saved stay as they are."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, TanhGELU())
            elif prefers_onednn() and type(child) in REPLACEMENTS:
                child.__class__ = REPLACEMENTS[type(child)]
