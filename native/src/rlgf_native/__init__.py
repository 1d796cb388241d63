"""C kernels for language models on CPUs, as functions on tensors.

They take one or two passes over memory where torch's operations take many, and run without Python
in between. All tensors are fp32 on the CPU, with a contiguous last dimension that is a multiple of
`VECTOR_WIDTH`, unless noted; nothing is checked. Results agree with torch's up to rounding.

Importing never fails: `unavailable_reason` tells why the kernels cannot be used on a processor.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from rlgf_native import library
from rlgf_native.library import unavailable_reason

__version__ = "0.1.0"
__all__ = [
    "VECTOR_WIDTH", "attention", "attention_backward", "attention_decode", "describe", "gelu",
    "gelu_backward", "has_matmul", "log_prob_backward", "logsumexp", "matmul", "matmul_unit",
    "unavailable_reason",
]  # fmt: skip

VECTOR_WIDTH = 16  # last dimensions are multiples of this


def describe() -> str:
    """Return which kernels can be used, for a run's record."""
    if unavailable_reason() is not None:
        return "nothing"
    unit = matmul_unit()
    return "attention, activations, log-probabilities" + (f", products on {unit}" if unit else "")


def gelu(states: Tensor) -> Tensor:
    """Compute the tanh approximation of GELU of contiguous `states`, any shape."""
    result = torch.empty_like(states)
    library.call("gelu", states.numel(), states, result)
    return result


def gelu_backward(states: Tensor, gradient: Tensor) -> Tensor:
    """Compute the gradient of `states` from the `gradient` of `gelu`'s result."""
    result = torch.empty_like(states)
    library.call("gelu_backward", states.numel(), states, gradient, result)
    return result


def logsumexp(logits: Tensor) -> Tensor:
    """Compute log Σ exp(logits) of contiguous `logits` [rows, vocabulary] -> [rows]."""
    result = logits.new_empty(logits.shape[0])
    library.call("logsumexp", *logits.shape, logits, result)
    return result


def log_prob_backward(logits: Tensor, normalizers: Tensor, tokens: Tensor, gradient: Tensor) -> Tensor:
    """Overwrite `logits` with the gradient of Σ gradient · log p(tokens) and return them.

    `logits` is [rows, vocabulary]; the other tensors are [rows].
    """
    library.call("log_prob_backward", *logits.shape, logits, normalizers, tokens, gradient)
    return logits


def has_matmul() -> bool:
    """Return whether `matmul` is available: on processors with AVX-512."""
    return matmul_unit() is not None


def matmul_unit() -> str | None:
    """Return the unit that `matmul` uses, 'AMX' (matrix units) or 'AVX-512', or None."""
    return {None: None, "amx": "AMX", "avx512": "AVX-512"}[library.matmul_variant()]


def matmul(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `left` [rows, depth] · `right` [depth, columns] + `bias` [columns].

    One stride of each matrix is 1, and `bias` is contiguous; sizes need not be multiples of
    `VECTOR_WIDTH`. Only for processors with AVX-512 (`has_matmul`). Raises MemoryError without
    memory for a workspace.

    On AMX (`matmul_unit`), numbers are sums of three in bf16. The result is as exact as in fp32 for
    numbers, and products of two numbers, between 1e-30 and 3e38 in magnitude. Smaller ones lose
    digits, and those below 1e-38 are zero. Larger ones and infinities become NaN, and a NaN stays
    NaN, in the same rows and columns of the result as in fp32.
    """
    result = left.new_empty(left.shape[0], right.shape[1])
    rows, depth, columns = (*left.shape, right.shape[1])
    if not rows * depth * columns:
        return result.zero_() if bias is None else result.copy_(bias.expand_as(result))
    if library.call("matmul", rows, columns, depth, left, *left.stride(), right, *right.stride(), bias, result):
        raise MemoryError(f"no memory for the workspace of a {rows} × {depth} × {columns} product: use smaller batches")
    return result


class AttentionArgs(ctypes.Structure):
    """The struct `Attention` of attention.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("sequences", "heads", "groups", "size", "query_tokens", "key_tokens")),
        *((name, ctypes.c_int64) for name in ("causal", "bias_rows", "bias_columns")),
        *((name, ctypes.c_void_p) for name in ("starts", "num_skipped", "lengths", "key_starts", "key_lengths")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "bias")),
        *((name, ctypes.c_int64) for name in ("query_token", "query_head", "key_token", "key_head")),
        *((name, ctypes.c_int64) for name in ("value_token", "value_head")),
        *((name, ctypes.c_void_p) for name in ("out", "normalizers", "grad_out")),
        *((name, ctypes.c_int64) for name in ("grad_out_token", "grad_out_head")),
        *((name, ctypes.c_void_p) for name in ("grad_query", "grad_key", "grad_value", "grad_bias")),
        ("scale", ctypes.c_float),
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, spans: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention of a packed row to another one within the same sequences.

    `query` is [heads, tokens, size], `key` and `value` [heads / groups, other tokens, size], with
    any strides but a contiguous last dimension. `bias` [heads, width, width] is added to the
    scores; it is contiguous, and its width is a multiple of `VECTOR_WIDTH`.

    `spans` are, for each sequence of the query's packed row: its start, the number of its first
    tokens that are skipped and get zeros, and the number of all its tokens; then its start and
    number of tokens in the other packed row; each int64 [sequences].

    Returns the result [tokens, heads, size] and the normalizers for the backward pass
    [tokens, heads, 2].
    """
    out, normalizers = query.new_empty(query.shape[1], query.shape[0], query.shape[2]), query.new_empty(*query.shape[1::-1], 2)
    _attend(_attention_args(query, key, value, bias, causal, spans, scale, out, normalizers), backward=False)
    return out, normalizers


def attention_backward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, spans: Sequence[Tensor], scale: float,
    out: Tensor, normalizers: Tensor, gradient: Tensor, bias_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute the gradients of query, key, value and bias from the `gradient` of `out`.

    Those of query, key and value are [tokens, heads, size]. That of `bias` is None unless
    `bias_too`.
    """
    args = _attention_args(query, key, value, bias, causal, spans, scale, out, normalizers)
    args.grad_out, args.grad_out_token, args.grad_out_head = gradient.data_ptr(), *gradient.stride()[:2]
    grad_query, grad_key, grad_value = (t.new_empty(t.shape[1], t.shape[0], t.shape[2]) for t in (query, key, value))
    grad_bias = torch.zeros_like(bias) if bias is not None and bias_too else None
    args.grad_query, args.grad_key, args.grad_value = (t.data_ptr() for t in (grad_query, grad_key, grad_value))
    args.grad_bias = None if grad_bias is None else grad_bias.data_ptr()
    _attend(args, backward=True)
    return grad_query, grad_key, grad_value, grad_bias


def attention_decode(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Compute attention of one query per row, [rows, heads, 1, size], to keys and values.

    These are [rows, heads / groups, columns, size], with any strides but a contiguous last
    dimension. `seen` is bool [rows, columns]. Returns [rows, 1, heads, size].
    """
    (rows, heads, _, size), columns = query.shape, key.shape[2]
    out = query.new_empty(rows, 1, heads, size)
    weights = query.new_empty(rows * heads, -(-columns // VECTOR_WIDTH) * VECTOR_WIDTH)
    library.call(
        "attention_decode", rows, heads, heads // key.shape[1], columns, size, query, *query.stride()[:2],
        key, *key.stride()[:3], value, *value.stride()[:3], seen, 0 if seen is None else seen.stride(0), scale, weights, out,
    )  # fmt: skip
    return out


def _attention_args(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, spans: Sequence[Tensor], scale: float,
    out: Tensor, normalizers: Tensor,
) -> AttentionArgs:  # fmt: skip
    starts, num_skipped, lengths, key_starts, key_lengths = (span.data_ptr() for span in spans)
    return AttentionArgs(
        sequences=len(spans[0]), heads=query.shape[0], groups=query.shape[0] // key.shape[0], size=query.shape[2],
        query_tokens=query.shape[1], key_tokens=key.shape[1], causal=causal, scale=scale,
        bias_rows=0 if bias is None else bias.shape[1], bias_columns=0 if bias is None else bias.shape[2],
        starts=starts, num_skipped=num_skipped, lengths=lengths, key_starts=key_starts, key_lengths=key_lengths,
        query=query.data_ptr(), key=key.data_ptr(), value=value.data_ptr(), bias=None if bias is None else bias.data_ptr(),
        query_token=query.stride(1), query_head=query.stride(0), key_token=key.stride(1), key_head=key.stride(0),
        value_token=value.stride(1), value_head=value.stride(0), out=out.data_ptr(), normalizers=normalizers.data_ptr(),
    )  # fmt: skip


def _attend(args: AttentionArgs, backward: bool) -> None:
    function = library.find_function("attention", library.variant())
    if function(ctypes.byref(args), ctypes.c_int(backward), ctypes.c_int(torch.get_num_threads())):
        raise MemoryError("no memory for the workspace of attention: use smaller batches or shorter sequences")
