"""Attention by the C kernels: within packed sequences, and of single queries."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlgf.kernels import native


def packed(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, offsets: Sequence[Tensor], scale: float
) -> Tensor | None:
    """Compute attention as `dispatch.packed_attention` does."""
    plain = (bias is None or bias.dtype == torch.float32) and not torch.is_autocast_enabled("cpu")
    if not plain or not native.supports(query, key, value) or not query.shape[3] == key.shape[3] == value.shape[3]:
        return None
    result: Tensor = _Attention.apply(query, key, value, bias, causal, offsets, scale)
    return result


def decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """Compute attention as `dispatch.decode_attention` does."""
    able = query.shape[2] == 1 and query.shape[3] == key.shape[3] == value.shape[3]
    if not able or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or not native.supports(query, key, value):
        return None
    mask = None if mask is None else mask.expand(query.shape[0], key.shape[2]).contiguous()
    result: Tensor = native.library().attention_decode(query, key, value, mask, scale)
    return result


class _Attention(torch.autograd.Function):
    """Attention within the sequences of packed rows.

    It works sequence by sequence without padding, and computes its weights again in the backward
    pass.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, offsets: Sequence[Tensor],
        scale: float,
    ) -> Tensor:  # fmt: skip
        bias = None if bias is None else bias.contiguous()
        out, normalizers = native.library().attention(query[0], key[0], value[0], bias, causal, offsets, scale)
        ctx.save_for_backward(query, key, value, bias, out, normalizers)
        ctx.given = causal, offsets, scale
        return out[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, normalizers = ctx.saved_tensors
        gradient = gradients[0][0]
        gradient = gradient if gradient.stride(2) == 1 else gradient.contiguous()
        causal, offsets, scale = ctx.given
        *inputs, for_bias = native.library().attention_backward(
            query[0], key[0], value[0], bias, causal, offsets, scale, out, normalizers, gradient, ctx.needs_input_grad[3]
        )
        return *(part.transpose(0, 1)[None] for part in inputs), for_bias, None, None, None
