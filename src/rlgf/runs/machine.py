"""The machine and the software versions of a result."""

import platform
from importlib.metadata import version
from typing import Any

import torch

from rlgf.kernels import dispatch


def describe_machine() -> dict[str, Any]:
    """Return a description of the machine and the software versions."""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": dispatch.describe(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("rlgf", "torch", "transformers")},
    }
