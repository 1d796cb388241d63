"""The only module that imports the fast paths: their switches and calls.

Every fast path computes what torch and transformers compute, up to rounding. A call returns None
where no fast path applies, and the caller then uses torch. Nothing else of this folder is imported
from outside it; with `runtime.kernels` 'off' nothing else of it is loaded.
"""

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, device, nn

from rlgf.errors import ConfigError, unknown

if TYPE_CHECKING:
    from rlgf.kernels.concurrency import ConcurrentPair

S = TypeVar("S")
T = TypeVar("T")

MODES = ("auto", "native", "torch", "off")
PATHS = {
    "attention": "attention within packed sequences, and of single queries, in C: 5 to 8 % of S",
    "log_softmax": "log-probabilities of tokens and their gradient in one pass, in C: 7 % of S with AVX2, 0 with AVX-512",
    "activations": "GELU in one pass over memory, in C or few torch operations: 12 to 14 % of S",
    "products": "matrix products by oneDNN or in C, where torch's default library is slower: 13 % of S with AMX",
    "concurrency": "policy or reference, and critic, at once on half of the cores each: 5 to 11 % of S",
}
"""The fast paths by name.

The shares of an iteration that they save are from an EPYC with AVX2 and a Xeon with AVX-512 and AMX
(`make bench-kernels`, bench/results/kernels-*.json; that of AMX: docs/log.md).
"""

_mode = "auto"
_without: frozenset[str] = frozenset()
_pair: "ConcurrentPair | None" = None


def select(mode: str, without: Collection[str] = ()) -> None:
    """Select the fast paths of this process and of the models loaded from now on.

    Args:
        mode: 'auto': all that this machine has; 'native': the same, but raise without the C
            kernels; 'torch': all but the C kernels; 'off': the code of transformers.
        without: names of `PATHS` to switch off.

    Raises:
        ConfigError: the C kernels are required and unavailable.
    """
    global _mode, _without
    for name in without:
        if name not in PATHS:
            raise unknown("fast path", name, PATHS)
    if mode not in MODES:
        raise unknown("runtime.kernels", mode, MODES)
    if mode != "off":
        from rlgf.kernels import native

        if mode == "native" and (reason := native.unavailable_reason()):
            raise ConfigError(f"runtime.kernels is native, but there are no C kernels ({reason}): or set runtime.kernels=auto.")
        native.set_enabled(mode != "torch")
    _mode, _without = mode, frozenset(without)


def is_on(path: str) -> bool:
    """Return whether a path of `PATHS` is on."""
    return _mode != "off" and path not in _without


def uses_native(path: str) -> bool:
    """Return whether a path may use the C kernels."""
    return is_on(path) and _mode != "torch"


def is_off() -> bool:
    """Return whether all fast paths are off, those of `rlgf.models.padding_free` too."""
    return _mode == "off"


def unavailable_reason() -> str | None:
    """Return why the C kernels are unavailable, or None."""
    if _mode in ("torch", "off"):
        return f"runtime.kernels is {_mode}"
    from rlgf.kernels import native

    return native.unavailable_reason()


def describe() -> str:
    """Describe the fast paths in use, for the run's record."""
    if _mode == "off":
        return "off"
    reason = unavailable_reason()
    if reason is not None:
        return f"torch ({reason})"
    from rlgf.kernels import native

    return f"native ({native.describe()})"


def replace_modules(model: nn.Module) -> nn.Module:
    """Replace layers of a model by faster ones, in place, and return the model."""
    if _mode != "off":
        from rlgf.kernels.modules import replace_modules as replace

        replace(model, [path for path in PATHS if is_on(path)])
    return model


def logsumexp(logits: Tensor) -> Tensor | None:
    """Compute `logits.logsumexp(1)` of [rows, vocabulary], or return None."""
    if not uses_native("log_softmax"):
        return None
    from rlgf.kernels import native

    return native.library().logsumexp(logits) if native.supports(logits) and logits.is_contiguous() else None


def log_softmax_backward(logits: Tensor, normalizers: Tensor, tokens: Tensor, gradient: Tensor) -> Tensor | None:
    """Overwrite `logits` with the gradient of Σ gradient · log p(tokens), or return None.

    `logits` is [rows, vocabulary], the others are [rows]; `normalizers` are from `logsumexp`.
    """
    if not uses_native("log_softmax"):
        return None
    from rlgf.kernels import native

    if not native.supports(logits) or not logits.is_contiguous():
        return None
    return native.library().log_prob_backward(logits, normalizers, tokens.contiguous(), gradient.contiguous())


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, offsets: Sequence[Tensor], scale: float
) -> Tensor | None:
    """Compute attention within the sequences of packed rows, or return None.

    Args:
        query: [1, heads, tokens, size].
        key: [1, key heads, other tokens, size]; query heads are a multiple of key heads.
        value: as `key`.
        bias: [heads, width, width], added to the scores, or None.
        causal: whether a token attends only to those before it and itself.
        offsets: five int64 [sequences]: start, number of skipped first tokens, and number of tokens
            of each sequence in the query's row; start and number of tokens in the key's row.
        scale: the factor of the scores.

    Returns:
        [1, tokens, heads, size]; zero at skipped tokens.
    """
    if not uses_native("attention"):
        return None
    from rlgf.kernels import attention

    return attention.packed(query, key, value, bias, causal, offsets, scale)


def decode_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """Compute attention of one query per row without gradients, or return None.

    `query` is [rows, heads, 1, size], `key` and `value` are [rows, key heads, columns, size], and
    `mask` is bool [rows or 1, columns] or None. Returns [rows, 1, heads, size].
    """
    if not uses_native("attention"):
        return None
    from rlgf.kernels import attention

    return attention.decode(query, key, value, mask, scale)


def run_concurrently(first: Callable[[], S], second: Callable[[], T], where: device) -> tuple[S, T]:
    """Run two functions that share nothing, and return both results.

    On a CPU they run at the same time, on half of the cores each; elsewhere one after the other.
    """
    global _pair
    if where.type != "cpu" or not is_on("concurrency"):
        return first(), second()
    if _pair is None:
        from rlgf.kernels.concurrency import ConcurrentPair

        _pair = ConcurrentPair()
    return _pair.run(first, second)
