"""Models whose weights lie in the host's memory while nobody reads with them, so that a GPU holds what is at work.

A model is parked once; from then on whoever reads with it, or trains it, does so within `awake`.
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
class _Parked:
    device: torch.device  # where the model works
    readers: int = 0  # how many are within `awake`: one may call another


_parked: WeakKeyDictionary[nn.Module, _Parked] = WeakKeyDictionary()


def park(model: nn.Module, device: torch.device) -> None:
    """Keep a model in the host's memory from now on; within `awake` it is on `device`."""
    _parked[model] = _Parked(device)
    model.to(HOST)


@contextmanager
def awake(model: Any, optimizer: torch.optim.Optimizer | None = None) -> Generator[None]:
    """Within it a parked model, and what its optimizer remembers, are where they work; any other model stays as it is."""
    place = _parked.get(model)
    if place is None:
        yield
        return
    if place.readers == 0:
        _move(model, optimizer, place.device)
    place.readers += 1
    try:
        yield
    finally:
        place.readers -= 1
        if place.readers == 0:
            _move(model, optimizer, HOST)


def _move(model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device) -> None:
    model.to(device)  # parameters stay the same objects, which is how the optimizer knows them
    states: Any = optimizer.state.values() if optimizer is not None else ()
    for state in states:
        state.update({name: value.to(device) for name, value in state.items() if isinstance(value, Tensor)})
