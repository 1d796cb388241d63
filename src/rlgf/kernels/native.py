"""What `native.c`, `avx512.c` and `amx.c` do, on tensors: one pass over memory where torch's operations take many, no Python
meanwhile, and products at the rate of the processor's widest units.

It is compiled for this very processor when it is first asked for, in a second or two, by the C compiler of the machine, and
kept in the user's cache. Where there is none, everybody takes torch's operations, which come to the same numbers.
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
LANES = 16  # numbers come in multiples of this

_asked = True


def use(asked: bool) -> None:
    """Whether what is compiled may be used, here and everywhere."""
    global _asked
    _asked = asked


def takes(*tensors: Tensor) -> bool:
    """Whether these can be handed over: in fp32 on a CPU, their last numbers next to each other and in whole vectors."""
    fits = all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.numel() > 0 and t.stride(-1) == 1 and t.shape[-1] % LANES == 0
        for t in tensors
    )
    return fits and _asked and library()[0] is not None


def why_not() -> str | None:
    """What is in the way of a library that is asked for, None where nothing is."""
    return library()[1] if _asked else None


def describe() -> str:
    """What is used of it, for the record."""
    if not _asked or library()[0] is None:
        return "nothing"
    return "attention, activations, norms, log-probabilities" + (f", products on {UNITS[_product()]}" if multiplies() else "")


@cache
def library() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled functions, or why there are none."""
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
    """The functions of these sources, compiled by this compiler for this processor, now or earlier."""
    told = subprocess.run([*compiler, "--version"], check=True, capture_output=True, timeout=60).stdout
    made_of = b"\n".join([*(source.read_bytes() for source in SOURCES), told, repr((compiler, FLAGS, processor())).encode()])
    name, folder = f"native-{hashlib.sha256(made_of).hexdigest()[:16]}.so", _cache()
    with suppress(OSError):  # there is none yet, or one that was made elsewhere and cannot be loaded here
        return ctypes.CDLL(str(folder / name if folder else Path("none")))
    writable = folder is not None and os.access(folder, os.W_OK)
    with tempfile.TemporaryDirectory(dir=folder if writable else None) as room:
        made = Path(room) / name
        _compile(compiler, made)
        found = ctypes.CDLL(str(made))  # stays loaded when the file is gone
        if folder is not None and writable:
            made.replace(folder / name)
    return found


def _cache() -> Path | None:
    """The folder in which what was compiled is kept; None where there can be none."""
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
    """What the system says of the processor, as far as machine code and what is fast depend on it."""
    told = ("vendor_id", "cpu family", "model name", "flags", "Features", "isa", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


@cache
def made_by_intel() -> bool:
    """Whether the processor is Intel's, as far as the system says."""
    return "GenuineIntel" in processor()


@cache
def has_wide_units() -> bool:
    """Whether this is AMD's Zen 5 (family 26) or later, with AVX-512: Intel's library uses half of the width of its units."""
    family = re.search(r"^cpu family\s*: (\d+)", processor(), re.MULTILINE)
    return "AuthenticAMD" in processor() and "avx512f" in processor() and family is not None and int(family[1]) >= 26


def _call(function: str, *arguments: Tensor | int | float | None) -> int:
    """Call by name: tensors as where they begin, whole numbers of 64 bits, and the threads there are."""
    called = getattr(library()[0], function)
    if called.argtypes is None:
        kinds: dict[type, Any] = {int: ctypes.c_int64, float: ctypes.c_float}
        called.argtypes = [*(kinds.get(type(argument), ctypes.c_void_p) for argument in arguments), ctypes.c_int]
    return called(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())


def gelu(states: Tensor) -> Tensor:
    """The tanh approximation of GELU of contiguous `states`, any shape."""
    result = torch.empty_like(states)
    _call("gelu", states.numel(), states, result)
    return result


def gelu_back(states: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of `states`, of that of `gelu`."""
    result = torch.empty_like(states)
    _call("gelu_back", states.numel(), states, gradient, result)
    return result


def gated(states: Tensor) -> Tensor:
    """silu(x) · y of contiguous `states` [..., 2 · width], which hold x and y -> [..., width]."""
    width = states.shape[-1] // 2
    result = states.new_empty(*states.shape[:-1], width)
    _call("gated", result.numel() // width, width, states, result)
    return result


def gated_back(states: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of `states`."""
    result, width = torch.empty_like(states), gradient.shape[-1]
    _call("gated_back", gradient.numel() // width, width, states, gradient, result)
    return result


def turned(states: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> Tensor:
    """Heads [heads, tokens, size], in any order of memory whose last numbers lie together, by their tokens' angles.

    `cosines` and `sines` [tokens, size] are contiguous. `back`: the gradient of the heads, of that of the turned ones.
    """
    heads, tokens, size = states.shape
    result = states.new_empty(tokens, heads, size)
    _call("turned", tokens, heads, size, states, states.stride(1), states.stride(0), cosines, sines, int(back), result)
    return result.transpose(0, 1)


def log_normalisers(logits: Tensor) -> Tensor:
    """log Σ exp(logits) of contiguous `logits` [rows, vocabulary] -> [rows]."""
    result = logits.new_empty(logits.shape[0])
    _call("log_normalisers", *logits.shape, logits, result)
    return result


def log_probabilities_back(logits: Tensor, normalisers: Tensor, tokens: Tensor, gradient: Tensor) -> Tensor:
    """`logits` [rows, vocabulary] as the gradient of Σ gradient · log p(tokens), written over them; the others are [rows]."""
    _call("log_probabilities_back", *logits.shape, logits, normalisers, tokens, gradient)
    return logits


def rms_norm(states: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """x · r · w of contiguous `states` [..., width], and r = 1 / √(mean x² + ε) of each row."""
    result, scales = torch.empty_like(states), states.new_empty(states.shape[:-1])
    _call("rms_norm", scales.numel(), states.shape[-1], states, weight, float(epsilon), result, scales)
    return result, scales


def rms_norm_back(states: Tensor, weight: Tensor, scales: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `states` and of `weight`."""
    for_states, for_weight = torch.empty_like(states), states.new_zeros(torch.get_num_threads(), states.shape[-1])
    _call("rms_norm_back", scales.numel(), states.shape[-1], states, weight, scales, gradient, for_states, for_weight)
    return for_states, for_weight.sum(0)


UNITS = {"amx_product": "AMX", "avx512_product": "AVX-512"}


def multiplies() -> bool:
    """Whether `product` may be asked: it is faster than the default library here."""
    return _asked and _product() != ""


@cache
def _product() -> str:
    """By which function: on units for matrices where the processor has them and this process may use them, otherwise on AVX-512
    where the default library does not make use of it. Empty: by none.
    """
    found = library()[0]
    if found is None:
        return ""
    if found.amx_ready():
        return "amx_product"
    return "avx512_product" if found.avx512_ready() and has_wide_units() else ""


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """`left` [rows, depth] times `right` [depth, columns], plus contiguous `bias`; of each one stride is 1.

    On AMX as exact as in fp32 for numbers between 1e-33 and 3e38; smaller ones lose digits, and infinity becomes NaN.
    """
    result = left.new_empty(left.shape[0], right.shape[1])
    rows, depth, columns = (*left.shape, right.shape[1])
    if not rows * depth * columns:
        return result.zero_() if bias is None else result.copy_(bias.expand_as(result))
    if _call(_product(), rows, columns, depth, left, *left.stride(), right, *right.stride(), bias, result):
        raise MemoryError("no memory for a product's working space")
    return result


class Heads(ctypes.Structure):
    """`Attention` of native.c, number for number."""

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
    """What each token of one line makes of those of another that belong to the same text, and what the way back needs of it.

    `query` [heads, tokens, size], `key` and `value` [heads / groups, others, size], in any order of memory whose last numbers
    lie together; `bias` [heads, width, width] is added to the scores, contiguous and as wide as a multiple of 16. `spans` are,
    of each text, where it begins, its idle first tokens, which get zeros, and all its tokens; where in the other line it
    begins, and its tokens there; each int64 [texts]. Returns [tokens, heads, size] and [tokens, heads, 2].
    """
    out, normalisers = query.new_empty(query.shape[1], query.shape[0], query.shape[2]), query.new_empty(*query.shape[1::-1], 2)
    _attend(_heads(query, key, value, bias, causal, spans, scale, out, normalisers), False)
    return out, normalisers


def attention_back(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, spans: Sequence[Tensor], scale: float,
    out: Tensor, normalisers: Tensor, gradient: Tensor, bias_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The gradients of query, key, value, each as [tokens, heads, size], and bias, of the `gradient` of `out`."""
    heads = _heads(query, key, value, bias, causal, spans, scale, out, normalisers)
    heads.gradient, heads.gradient_token, heads.gradient_head = gradient.data_ptr(), *gradient.stride()[:2]
    for_query, for_key, for_value = (t.new_empty(t.shape[1], t.shape[0], t.shape[2]) for t in (query, key, value))
    for_bias = torch.zeros_like(bias) if bias is not None and bias_too else None
    heads.for_query, heads.for_key, heads.for_value = (t.data_ptr() for t in (for_query, for_key, for_value))
    heads.for_bias = None if for_bias is None else for_bias.data_ptr()
    _attend(heads, True)
    return for_query, for_key, for_value, for_bias


def attention_step(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float) -> Tensor:
    """Attention of one query of each text, [rows, heads, 1, size], to keys and values [rows, heads / groups, columns, size].

    These lie in any order of memory whose last numbers lie together; `seen` is bool [rows, columns]. Returns
    [rows, 1, heads, size].
    """
    (rows, heads, _, size), columns = query.shape, key.shape[2]
    out = query.new_empty(rows, 1, heads, size)
    weights = query.new_empty(rows * heads, -(-columns // LANES) * LANES)
    _call(
        "attention_step", rows, heads, heads // key.shape[1], columns, size, query, *query.stride()[:2], key, *key.stride()[:3],
        value, *value.stride()[:3], seen, 0 if seen is None else seen.stride(0), scale, weights, out,
    )  # fmt: skip
    return out


def _heads(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, spans: Sequence[Tensor], scale: float,
    out: Tensor, normalisers: Tensor,
) -> Heads:  # fmt: skip
    starts, idle, lengths, asked_starts, asked_lengths = (span.data_ptr() for span in spans)
    return Heads(
        texts=len(spans[0]), heads=query.shape[0], groups=query.shape[0] // key.shape[0], size=query.shape[2],
        asking=query.shape[1], asked=key.shape[1], causal=causal, scale=scale,
        width=0 if bias is None else bias.shape[1], seen_width=0 if bias is None else bias.shape[2],
        starts=starts, idle=idle, lengths=lengths, asked_starts=asked_starts, asked_lengths=asked_lengths,
        query=query.data_ptr(), key=key.data_ptr(), value=value.data_ptr(), bias=None if bias is None else bias.data_ptr(),
        query_token=query.stride(1), query_head=query.stride(0), key_token=key.stride(1), key_head=key.stride(0),
        value_token=value.stride(1), value_head=value.stride(0), out=out.data_ptr(), normalisers=normalisers.data_ptr(),
    )  # fmt: skip


def _attend(heads: Heads, back: bool) -> None:
    found = library()[0]
    assert found is not None
    if found.attention(ctypes.byref(heads), ctypes.c_int(back), ctypes.c_int(torch.get_num_threads())):
        raise MemoryError("no memory for attention's working space")
