"""The compiled library: loading, and calls of the functions for this processor."""

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PATH = Path(__file__).with_name("libkernels.so")
VARIANTS = ("avx512", "avx2", "generic")  # fastest first; suffixes of the C functions


@cache
def load() -> tuple[ctypes.CDLL | None, str | None]:
    """Return the loaded library and None, or None and the reason for its absence."""
    if sys.platform == "darwin":
        return None, "the C kernels do not support macOS, where torch brings a second OpenMP library"
    if not PATH.exists():
        return None, f"{PATH} is missing: reinstall rlgf-native on Linux with a C compiler (pip install ./native)"
    try:
        return ctypes.CDLL(str(PATH)), None
    except OSError as error:
        return None, f"{PATH} cannot be loaded ({error}): reinstall rlgf-native (pip install ./native)"


@cache
def supported_variants() -> tuple[str, ...]:
    """Return the variants of the kernels that this processor can run, fastest first."""
    library = load()[0]
    if library is None:
        return ()
    return tuple(variant for variant in VARIANTS if getattr(library, f"supports_{variant}")())


def variant() -> str | None:
    """Return the variant of the kernels that is used, or None if there is none."""
    return next(iter(supported_variants()), None)


def matmul_variant() -> str | None:
    """Return the variant of `matmul` in use: 'amx', 'avx512', or None if there is none."""
    if variant() != "avx512":
        return None
    return "amx" if supports_amx() else "avx512"


@cache
def supports_amx() -> bool:
    """Return whether `matmul` can use matrix units (AMX) in this process.

    Asks the system's permission, which holds for all threads. Older compilers build no such kernel.
    """
    library = load()[0]
    return library is not None and hasattr(library, "matmul_amx") and bool(library.supports_amx())


def unavailable_reason() -> str | None:
    """Return why the kernels cannot be used on this machine, or None."""
    library, reason = load()
    if library is not None and variant() is None:
        return "this processor has neither AVX-512 nor AVX2 with FMA, which the C kernels need"
    return reason


def call(name: str, *arguments: Tensor | int | float | None) -> int:
    """Call a C function by name, with the number of threads as last argument.

    Tensors are passed as addresses, integers with 64 bits.
    """
    function = find_function(name, (matmul_variant() if name == "matmul" else None) or variant())
    if function.argtypes is None:
        kinds: dict[type, Any] = {int: ctypes.c_int64, float: ctypes.c_float}
        function.argtypes = [*(kinds.get(type(argument), ctypes.c_void_p) for argument in arguments), ctypes.c_int]
    return function(*(a.data_ptr() if isinstance(a, Tensor) else a for a in arguments), torch.get_num_threads())


@cache
def find_function(name: str, variant: str | None) -> Any:
    """Return a C function of a variant; raise RuntimeError without one."""
    library = load()[0]
    if library is None or variant is None:
        raise RuntimeError(f"the C kernel {name!r} cannot be used: {unavailable_reason()}")
    if not hasattr(library, f"{name}_{variant}"):
        raise RuntimeError(f"the C kernel {name!r} has no variant {variant!r}: check `has_{name}()` before the call")
    return getattr(library, f"{name}_{variant}")
