"""Access to the C kernels of the distribution `rlgf_native`, if it is installed."""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlgf.kernels.processor import has_full_width_avx512


@cache
def _module() -> Any:
    """Return the module `rlgf_native`, or None if it is not installed."""
    try:
        return importlib.import_module("rlgf_native")
    except ImportError:
        return None


VECTOR_WIDTH = 16  # last dimensions are multiples of this
_enabled = True


def set_enabled(enabled: bool) -> None:
    """Allow or forbid the C kernels in the whole process."""
    global _enabled
    _enabled = enabled


@cache
def unavailable_reason() -> str | None:
    """Return why the C kernels are unavailable, or None."""
    module = _module()
    return "rlgf_native is not installed: pip install ./native" if module is None else module.unavailable_reason()


def library() -> Any:
    """Return the module of the C kernels, which must be available."""
    return _module()


def describe() -> str:
    """Describe the C kernels that can be used here, and whether their product is."""
    unused = library().has_matmul() and not has_matmul()
    return str(library().describe()) + (" (unused: torch multiplies faster here)" if unused else "")


def has_matmul() -> bool:
    """Return whether the C kernels have a product that is faster than the default library's.

    On matrix units (AMX) it is; on AVX-512, only where the default library leaves half of the width
    unused.
    """
    if not _enabled or unavailable_reason() is not None:
        return False
    unit = library().matmul_unit()
    return unit == "AMX" or (unit == "AVX-512" and has_full_width_avx512())


def supports_contiguous(*tensors: Tensor) -> bool:
    """Return whether the C kernels accept these tensors and all of them are contiguous."""
    return supports(*tensors) and all(t.is_contiguous() for t in tensors)


def supports(*tensors: Tensor) -> bool:
    """Return whether the C kernels are available and accept these tensors.

    They must be in fp32 on a CPU and not empty, with a contiguous last dimension that is a multiple
    of `VECTOR_WIDTH`.
    """
    if not _enabled or unavailable_reason() is not None:
        return False
    return all(
        t.device.type == "cpu"
        and t.dtype == torch.float32
        and t.numel() > 0
        and t.stride(-1) == 1
        and t.shape[-1] % VECTOR_WIDTH == 0
        for t in tensors
    )
