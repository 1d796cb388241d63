"""Faster activations, norms and blocks of models on a CPU, with the same results.

Each replaces a layer of a model; none defines a model. `replace_modules` inserts them where a model
has the layer. On other devices, in other precisions, and for sizes at which nothing is gained,
every layer runs its original code.
"""

import math
from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation, SiLUActivation
from transformers.pytorch_utils import Conv1D

from rlgf.kernels import native
from rlgf.kernels.linear import FastConv1D, FastLinear, fused_projection, precomputed


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


class _SiluAndMul(torch.autograd.Function):
    """silu(x) · y of [..., x and y], in one pass over memory and one back."""

    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        ctx.save_for_backward(states)
        return native.library().silu_and_mul(states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (states,) = ctx.saved_tensors
        return native.library().silu_and_mul_backward(states, gradients[0].contiguous())


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in one pass over memory and one back.

    It is x · r · w with r = 1 / √(mean x² + ε). Single torch operations take twenty passes.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        result, scales = native.library().rms_norm(states, weight, epsilon)
        ctx.save_for_backward(states, weight, scales)
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        states, weight, scales = ctx.saved_tensors
        return *native.library().rms_norm_backward(states, weight, scales, gradients[0].contiguous()), None


# five names of the same layer
RMS_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "T5LayerNorm")


@cache
def _with_fast_norm(kind: type) -> type:
    """Return a subclass of a class of `RMS_NORMS` that uses `_RMSNorm` where supported."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not native.supports_contiguous(hidden_states, self.weight):
            return kind.forward(self, hidden_states)  # pyright: ignore
        result: Tensor = _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)
        return result

    return type(f"Fast{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


# four names of down(act(gate(x)) · up(x))
GATED_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")


@cache
def _with_fast_gate(kind: type) -> type:
    """Return a subclass of a class of `GATED_MLPS` with a fused gate.

    Gate and up projection are one product; the SiLU activation and its multiplication are one step.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        able = getattr(self.up_proj, "out_features", 1) % native.VECTOR_WIDTH == 0 and native.supports(x)
        joint = fused_projection(x, self.gate_proj, self.up_proj) if able else None
        return kind.forward(self, x) if joint is None else self.down_proj(_SiluAndMul.apply(joint))  # pyright: ignore

    return type(f"Fast{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


# four names of attention with the layers q_proj, k_proj and v_proj
ATTENTIONS = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")


@cache
def _with_qkv_projection(kind: Any) -> type:
    """Return a subclass of a class of `ATTENTIONS` with one product for q, k and v.

    The layers return their parts of it when transformers' own code calls them.
    """

    def forward(self: Any, hidden_states: Tensor, *arguments: Any, **options: Any) -> Any:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        joint = fused_projection(hidden_states, *layers)
        if joint is None:
            return kind.forward(self, hidden_states, *arguments, **options)
        precomputed().update(zip(layers, joint.split([layer.weight.shape[0] for layer in layers], -1)))
        try:
            return kind.forward(self, hidden_states, *arguments, **options)
        finally:
            precomputed().clear()  # unused outputs are left after an error

    return type(f"Fast{kind.__name__}", (kind,), {"forward": forward, "__module__": __name__})


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
            elif type(child).__name__ in RMS_NORMS and hasattr(child, "variance_epsilon") and "norms" in paths:
                child.__class__ = _with_fast_norm(type(child))
            elif type(child).__name__ in GATED_MLPS and isinstance(child.act_fn, nn.SiLU | SiLUActivation):
                if "gated_mlps" in paths:
                    child.__class__ = _with_fast_gate(type(child))
            elif type(child).__name__ in ATTENTIONS and "qkv_projections" in paths:
                child.__class__ = _with_qkv_projection(type(child))
            elif type(child) in LINEAR_LAYERS and "products" in paths:
                child.__class__ = LINEAR_LAYERS[type(child)]
