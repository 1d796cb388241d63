"""Faster activations and linear layers of models on a CPU, with the same results.

Each replaces a layer of a model; none defines a model. `replace_modules` inserts them where a model
has the layer. On other devices, in other precisions, and for sizes at which nothing is gained,
every layer runs its original code.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from rlgf.kernels import native
from rlgf.kernels.linear import FastConv1D, FastLinear


class TanhGELU(nn.Module):
    """GELU's tanh approximation, computed by the logistic function.

    ½(1 + tanh u) = σ(2u), which costs a CPU a third of a tanh.
    """

    def forward(self, states: Tensor) -> Tensor:
        """Compute the activation of `states`, any shape."""
        if states.device.type != "cpu":
            return nn.functional.gelu(states, approximate="tanh")
        result: Tensor = _TanhGELU.apply(states)
        return result


SCALE, CUBE = 2 * (2 / math.pi) ** 0.5, 0.044715


class _TanhGELU(torch.autograd.Function):
    """The tanh approximation of GELU, with a backward pass of one product.

    With torch's operations it saves the derivative instead of the argument.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.native = native.supports_contiguous(states)
        if ctx.native:
            ctx.save_for_backward(states)
            return native.library().gelu(states)
        gate = torch.addcmul(states.new_tensor(SCALE), states, states, value=SCALE * CUBE).mul_(states).sigmoid_()
        if not ctx.needs_input_grad[0]:
            return gate.mul_(states)
        result = states * gate
        slope = torch.addcmul(states.new_tensor(SCALE), states, states, value=3 * SCALE * CUBE).mul_(result)
        # σ + (1 − σ) x σ · d(2u)/dx
        ctx.save_for_backward(torch.lerp(slope, torch.ones_like(gate), gate))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return native.library().gelu_backward(kept, gradients[0].contiguous()) if ctx.native else kept.mul_(gradients[0])


LINEAR_LAYERS: dict[type, type] = {nn.Linear: FastLinear, Conv1D: FastConv1D}


def replace_modules(model: nn.Module, paths: Collection[str]) -> None:
    """Replace layers of a model by faster ones, in place.

    Names, parameters and saved files stay as they are.

    Args:
        model: a transformers model.
        paths: the fast paths that are on, names of `dispatch.PATHS`.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation) and "activations" in paths:
                setattr(module, name, TanhGELU())
            elif type(child) in LINEAR_LAYERS and "products" in paths:
                child.__class__ = LINEAR_LAYERS[type(child)]
