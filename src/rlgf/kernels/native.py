"""The C kernels of `native.c`, `avx512.c` and `amx.c` as functions on tensors.

They take one pass over memory where torch's operations take many, run without Python in between,
and multiply matrices at the rate of the processor's widest units.

They are compiled for this processor at first use, in a second or two, by the C compiler of the
machine, and cached in the user's cache folder. Without a compiler, torch's operations are used,
with the same results.
"""

import ctypes
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", "avx512.c", "amx.c", "avx512.h"))
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fopenmp", "-fPIC", "-shared")
VECTOR_WIDTH = 16  # last dimensions are multiples of this

_enabled = True


def set_enabled(asked: bool) -> None:
    """Allow or forbid the native kernels in the whole process."""
    global _enabled
    _enabled = asked


def supports(*tensors: Tensor) -> bool:
    """Return whether the kernels accept these tensors.

    They must be in fp32 on a CPU and not empty, with a contiguous last dimension that is a multiple
    of `VECTOR_WIDTH`.
    """
    fits = all(
        t.device.type == "cpu"
        and t.dtype == torch.float32
        and t.numel() > 0
        and t.stride(-1) == 1
        and t.shape[-1] % VECTOR_WIDTH == 0
        for t in tensors
    )
    return fits and _enabled and library()[0] is not None


def unavailable_reason() -> str | None:
    """Return why the requested native kernels are unavailable, or None."""
    return library()[1] if _enabled else None


def describe() -> str:
    """Return which native kernels are used, for the run's record."""
    if not _enabled or library()[0] is None:
        return "nothing"
    return "attention, activations, norms, log-probabilities" + (
        f", products on {UNITS[_matmul_function()]}" if has_matmul() else ""
    )


@cache
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the compiled library and None, or None and the reason for its absence."""
    if sys.platform == "darwin":
        return None, "not on macOS, where threads of two libraries would meet"
    reasons: list[str] = []
    for named in filter(None, (os.environ.get("CC"), *COMPILERS)):
        compiler, *options = shlex.split(named)
        found = shutil.which(compiler)
        if found is None:
            continue
        try:
            return _load([found, *options]), None
        except (OSError, subprocess.SubprocessError) as error:
            told = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
            reasons.append(f"{found} could not compile the sources: {told.strip()[-300:]}")
    return None, reasons[0] if reasons else f"no C compiler found ({', '.join(COMPILERS)}, or what CC names)"


def _load(compiler: list[str]) -> ctypes.CDLL:
    """Load the library for this compiler and processor; compile it if it is not cached."""
    told = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    made_of = b"\n".join([*(source.read_bytes() for source in SOURCES), told, repr((compiler, FLAGS, processor())).encode()])
    name, folder = f"native-{hashlib.sha256(made_of).hexdigest()[:16]}.so", _cache()
    with suppress(OSError):  # not compiled yet, or compiled on another machine
        return ctypes.CDLL(str(folder / name if folder else Path("none")))
    writable = folder is not None and os.access(folder, os.W_OK)
    with tempfile.TemporaryDirectory(dir=folder if writable else None) as room:
        made = Path(room) / name
        _compile(compiler, made)
        found = ctypes.CDLL(str(made))  # stays loaded after the file is deleted
        if folder is not None and writable:
            made.replace(folder / name)
    return found


def _cache() -> Path | None:
    """Return the folder that caches compiled libraries, or None if there can be none."""
    with suppress(OSError, RuntimeError):
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlgf"
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return None


def _compile(compiler: list[str], to: Path) -> None:
    units = [str(source) for source in SOURCES if source.suffix == ".c"]
    command = [*compiler, *FLAGS, *units, "-o", str(to), "-lm"]
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=300)


@cache
def processor() -> str:
    """Return the system's description of the processor.

    It holds the lines on which machine code and speed depend.
    """
    told = ("vendor_id", "cpu family", "model name", "flags", "Features", "isa", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


@cache
def is_intel() -> bool:
    """Return whether the system reports an Intel processor."""
    return "GenuineIntel" in processor()


@cache
def has_full_width_avx512() -> bool:
    """Return whether this is AMD's Zen 5 (family 26) or later, with AVX-512.

    Intel's library uses half of the width of its units.
    """
    family = re.search(r"^cpu family\s*: (\d+)", processor(), re.MULTILINE)
    return "AuthenticAMD" in processor() and "avx512f" in processor() and family is not None and int(family[1]) >= 26


def _call(function: str, *arguments: Tensor | int | float | None) -> int:
    """Call a C function by name, with the number of threads as last argument.

    Tensors are passed as addresses, integers with 64 bits.
    """
    called = getattr(library()[0], function)
    if called.argtypes is None:
        kinds: dict[type, Any] = {int: ctypes.c_int64, float: ctypes.c_float}
        called.argtypes = [*(kinds.get(type(argument), ctypes.c_void_p) for argument in arguments), ctypes.c_int]
    return called(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())


def gelu(states: Tensor) -> Tensor:
    """Compute the tanh approximation of GELU of contiguous `states`, any shape."""
    result = torch.empty_like(states)
    _call("gelu", states.numel(), states, result)
    return result


def gelu_backward(states: Tensor, gradient: Tensor) -> Tensor:
    """Compute the gradient of `states` from the `gradient` of `gelu`'s result."""
    result = torch.empty_like(states)
    _call("gelu_back", states.numel(), states, gradient, result)
    return result


def silu_and_mul(states: Tensor) -> Tensor:
    """Compute silu(x) · y of contiguous `states` [..., 2 · width] -> [..., width].

    The last dimension of `states` holds x, then y.
    """
    width = states.shape[-1] // 2
    result = states.new_empty(*states.shape[:-1], width)
    _call("gated", result.numel() // width, width, states, result)
    return result


def silu_and_mul_backward(states: Tensor, gradient: Tensor) -> Tensor:
    """Compute the gradient of `states` from the `gradient` of `silu_and_mul`'s result."""
    result, width = torch.empty_like(states), gradient.shape[-1]
    _call("gated_back", gradient.numel() // width, width, states, gradient, result)
    return result


def apply_rotary(states: Tensor, cosines: Tensor, sines: Tensor, backward: bool = False) -> Tensor:
    """Apply rotary embeddings to heads [heads, tokens, size] (last dimension contiguous).

    The other dimensions may have any strides. `cosines` and `sines` [tokens, size] are contiguous.
    `backward`: compute the gradient of the heads from the gradient of the rotated ones.
    """
    heads, tokens, size = states.shape
    result = states.new_empty(tokens, heads, size)
    _call("turned", tokens, heads, size, states, states.stride(1), states.stride(0), cosines, sines, int(backward), result)
    return result.transpose(0, 1)


def logsumexp(logits: Tensor) -> Tensor:
    """Compute log Σ exp(logits) of contiguous `logits` [rows, vocabulary] -> [rows]."""
    result = logits.new_empty(logits.shape[0])
    _call("log_normalisers", *logits.shape, logits, result)
    return result


def log_prob_backward(logits: Tensor, normalisers: Tensor, tokens: Tensor, gradient: Tensor) -> Tensor:
    """Overwrite `logits` with the gradient of Σ gradient · log p(tokens) and return them.

    `logits` is [rows, vocabulary]; the other tensors are [rows].
    """
    _call("log_probabilities_back", *logits.shape, logits, normalisers, tokens, gradient)
    return logits


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Compute x · r · w of contiguous `states` [..., width]; return it and r.

    r = 1 / √(mean x² + ε) of each row.
    """
    result, scales = torch.empty_like(states), states.new_empty(states.shape[:-1])
    _call("rms_norm", scales.numel(), states.shape[-1], states, weight, float(epsilon), result, scales)
    return result, scales


def rms_norm_backward(states: Tensor, weight: Tensor, scales: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the gradients of `states` and of `weight`."""
    for_states, for_weight = torch.empty_like(states), states.new_zeros(torch.get_num_threads(), states.shape[-1])
    _call("rms_norm_back", scales.numel(), states.shape[-1], states, weight, scales, gradient, for_states, for_weight)
    return for_states, for_weight.sum(0)


UNITS = {"amx_product": "AMX", "avx512_product": "AVX-512"}


def has_matmul() -> bool:
    """Return whether `matmul` is available and faster than the default library."""
    return _enabled and _matmul_function() != ""


@cache
def _matmul_function() -> str:
    """Return the name of the fastest C matmul function, or an empty string.

    It uses matrix units (AMX) where the processor has them and this process may use them, otherwise
    AVX-512 where the default library does not make use of it. Empty: neither is available.
    """
    found = library()[0]
    if found is None:
        return ""
    if found.amx_ready():
        return "amx_product"
    return "avx512_product" if found.avx512_ready() and has_full_width_avx512() else ""


def matmul(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `left` [rows, depth] · `right` [depth, columns] + `bias` [columns].

    One stride of each matrix is 1, and `bias` is contiguous. On AMX the result is as exact as in
    fp32 for numbers between 1e-33 and 3e38; smaller ones lose digits, and infinity becomes NaN.
    Raises MemoryError without memory for a workspace.
    """
    result = left.new_empty(left.shape[0], right.shape[1])
    rows, depth, columns = (*left.shape, right.shape[1])
    if not rows * depth * columns:
        return result.zero_() if bias is None else result.copy_(bias.expand_as(result))
    if _call(_matmul_function(), rows, columns, depth, left, *left.stride(), right, *right.stride(), bias, result):
        raise MemoryError("no memory for a product's working space")
    return result


class AttentionArgs(ctypes.Structure):
    """The struct `Attention` of native.c, field by field."""

    _whole = ("texts", "heads", "groups", "size", "asking", "asked", "causal", "width", "seen_width")
    _spans = ("starts", "idle", "lengths", "asked_starts", "asked_lengths")
    _strides = ("query_token", "query_head", "key_token", "key_head", "value_token", "value_head")
    _made = ("for_query", "for_key", "for_value", "for_bias")
    _fields_ = (
        *((name, ctypes.c_int64) for name in _whole),
        *((name, ctypes.c_void_p) for name in (*_spans, "query", "key", "value", "bias")),
        *((name, ctypes.c_int64) for name in _strides),
        *((name, ctypes.c_void_p) for name in ("out", "normalisers", "gradient")),
        *((name, ctypes.c_int64) for name in ("gradient_token", "gradient_head")),
        *((name, ctypes.c_void_p) for name in _made),
        ("scale", ctypes.c_float),
    )


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, spans: Sequence[Tensor], scale: float
) -> tuple[Tensor, Tensor]:
    """Compute attention of a packed row to another one within the same sequences.

    `query` is [heads, tokens, size], `key` and `value` [heads / groups, other tokens, size], with
    any strides but a contiguous last dimension. `bias` [heads, width, width] is added to the
    scores; it is contiguous, and its width is a multiple of 16.

    `spans` are, for each sequence of the query's packed row: its start, the number of its first
    tokens that are skipped and get zeros, and the number of all its tokens; then its start and
    number of tokens in the other packed row; each int64 [sequences].

    Returns the result [tokens, heads, size] and the normalizers for the backward pass
    [tokens, heads, 2].
    """
    out, normalisers = query.new_empty(query.shape[1], query.shape[0], query.shape[2]), query.new_empty(*query.shape[1::-1], 2)
    _attend(_attention_args(query, key, value, bias, causal, spans, scale, out, normalisers), False)
    return out, normalisers


def attention_backward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, spans: Sequence[Tensor], scale: float,
    out: Tensor, normalisers: Tensor, gradient: Tensor, bias_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Compute the gradients of query, key, value and bias from the `gradient` of `out`.

    Those of query, key and value are [tokens, heads, size]. That of `bias` is None unless
    `bias_too`.
    """
    heads = _attention_args(query, key, value, bias, causal, spans, scale, out, normalisers)
    heads.gradient, heads.gradient_token, heads.gradient_head = gradient.data_ptr(), *gradient.stride()[:2]
    for_query, for_key, for_value = (t.new_empty(t.shape[1], t.shape[0], t.shape[2]) for t in (query, key, value))
    for_bias = torch.zeros_like(bias) if bias is not None and bias_too else None
    heads.for_query, heads.for_key, heads.for_value = (t.data_ptr() for t in (for_query, for_key, for_value))
    heads.for_bias = None if for_bias is None else for_bias.data_ptr()
    _attend(heads, True)
    return for_query, for_key, for_value, for_bias


def attention_decode(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Compute attention of one query per row, [rows, heads, 1, size], to keys and values.

    These are [rows, heads / groups, columns, size], with any strides but a contiguous last
    dimension. `seen` is bool [rows, columns]. Returns [rows, 1, heads, size].
    """
    (rows, heads, _, size), columns = query.shape, key.shape[2]
    out = query.new_empty(rows, 1, heads, size)
    weights = query.new_empty(rows * heads, -(-columns // VECTOR_WIDTH) * VECTOR_WIDTH)
    _call(
        "attention_step", rows, heads, heads // key.shape[1], columns, size, query, *query.stride()[:2], key, *key.stride()[:3],
        value, *value.stride()[:3], seen, 0 if seen is None else seen.stride(0), scale, weights, out,
    )  # fmt: skip
    return out


def _attention_args(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, spans: Sequence[Tensor], scale: float,
    out: Tensor, normalisers: Tensor,
) -> AttentionArgs:  # fmt: skip
    starts, idle, lengths, asked_starts, asked_lengths = (span.data_ptr() for span in spans)
    return AttentionArgs(
        texts=len(spans[0]), heads=query.shape[0], groups=query.shape[0] // key.shape[0], size=query.shape[2],
        asking=query.shape[1], asked=key.shape[1], causal=causal, scale=scale,
        width=0 if bias is None else bias.shape[1], seen_width=0 if bias is None else bias.shape[2],
        starts=starts, idle=idle, lengths=lengths, asked_starts=asked_starts, asked_lengths=asked_lengths,
        query=query.data_ptr(), key=key.data_ptr(), value=value.data_ptr(), bias=None if bias is None else bias.data_ptr(),
        query_token=query.stride(1), query_head=query.stride(0), key_token=key.stride(1), key_head=key.stride(0),
        value_token=value.stride(1), value_head=value.stride(0), out=out.data_ptr(), normalisers=normalisers.data_ptr(),
    )  # fmt: skip


def _attend(heads: AttentionArgs, back: bool) -> None:
    found = library()[0]
    assert found is not None
    if found.attention(ctypes.byref(heads), ctypes.c_int(back), ctypes.c_int(torch.get_num_threads())):
        raise MemoryError("no memory for attention's working space")
