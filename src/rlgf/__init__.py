"""Reinforcement learning from guided feedback: a policy and a guide take turns writing; the policy learns to win.

The names below are the public interface; they are imported when first used, so that `import rlgf` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlgf.config import Config, override
    from rlgf.pipeline import prepare, train
    from rlgf.recipes import recipe
    from rlgf.trainer import Parts, Trainer

__version__ = "0.1.0"
__all__ = ["Config", "Parts", "Trainer", "__version__", "override", "prepare", "recipe", "train"]

_HOMES = {
    "Config": "rlgf.config",
    "override": "rlgf.config",
    "prepare": "rlgf.pipeline",
    "train": "rlgf.pipeline",
    "recipe": "rlgf.recipes",
    "Parts": "rlgf.trainer",
    "Trainer": "rlgf.trainer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'rlgf' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
