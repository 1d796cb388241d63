"""Offloading of models that are not in use to host memory, to save GPU memory.

A model is offloaded once; from then on it is evaluated and trained inside `on_device`.
"""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

HOST = torch.device("cpu")


@dataclass
class _Offloaded:
    device: torch.device  # of the model inside `on_device`
    depth: int = 0  # of nested `on_device` blocks


_offloaded: WeakKeyDictionary[nn.Module, _Offloaded] = WeakKeyDictionary()


def offload(model: nn.Module, device: torch.device) -> None:
    """Keep a model in host memory from now on; `on_device` moves it to `device`."""
    _offloaded[model] = _Offloaded(device)
    model.to(HOST)


@contextmanager
def on_device(model: Any, optimizer: torch.optim.Optimizer | None = None) -> Generator[None]:
    """Move an offloaded model and its optimizer state to its device within the block.

    Any other model stays as it is.
    """
    place = _offloaded.get(model)
    if place is None:
        yield
        return
    if place.depth == 0:
        _move(model, optimizer, place.device)
    place.depth += 1
    try:
        yield
    finally:
        place.depth -= 1
        if place.depth == 0:
            _move(model, optimizer, HOST)


def _move(model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device) -> None:
    model.to(device)  # parameters stay the same objects, which the optimizer refers to
    states: Any = optimizer.state.values() if optimizer is not None else ()
    for state in states:
        state.update({name: value.to(device) for name, value in state.items() if isinstance(value, Tensor)})
