"""Reinforcement learning from guided feedback: fine-tune a language model with the help of a guide.

The names below are the public interface. They are imported when first used, so that
`import rlgf` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlgf.algorithms.registry import aggrevated, d2lols, grpo, guided_grpo, lols, ppo, ppo_pp, rloo
    from rlgf.config.loading import override
    from rlgf.config.recipes import recipe
    from rlgf.config.schema import Config
    from rlgf.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        GuideError,
        Interrupted,
        RewardError,
        RlgfError,
        TrainingError,
    )
    from rlgf.guides.base import Capabilities, Completion, CompletionRequest, Guide
    from rlgf.pipeline.prepare import prepare
    from rlgf.pipeline.run import evaluate, train
    from rlgf.rl.tensors import Experience, Rollout
    from rlgf.tasks.base import Task, TaskDefinition
    from rlgf.trainer import Components, Trainer
    from rlgf.types import Prompt, SamplingParams

__version__ = "0.1.0"
__all__ = [
    "Capabilities", "CheckpointError", "Completion", "CompletionRequest", "Components", "Config", "ConfigError", "DataError",
    "Experience",
    "Guide", "GuideError", "Interrupted", "Prompt", "RewardError", "RlgfError", "Rollout", "SamplingParams", "Task",
    "TaskDefinition",
    "Trainer", "TrainingError", "__version__", "aggrevated", "d2lols", "evaluate", "grpo", "guided_grpo", "lols",
    "override", "ppo", "ppo_pp", "prepare", "recipe", "rloo", "train",
]  # fmt: skip

_MODULES = {
    "rlgf.algorithms.registry": ("aggrevated", "d2lols", "grpo", "guided_grpo", "lols", "ppo", "ppo_pp", "rloo"),
    "rlgf.config.loading": ("override",),
    "rlgf.config.recipes": ("recipe",),
    "rlgf.config.schema": ("Config",),
    "rlgf.errors": (
        "CheckpointError", "ConfigError", "DataError", "GuideError", "Interrupted", "RewardError", "RlgfError", "TrainingError",
    ),
    "rlgf.guides.base": ("Capabilities", "Completion", "CompletionRequest", "Guide"),
    "rlgf.pipeline.prepare": ("prepare",),
    "rlgf.pipeline.run": ("evaluate", "train"),
    "rlgf.rl.tensors": ("Experience", "Rollout"),
    "rlgf.tasks.base": ("Task", "TaskDefinition"),
    "rlgf.trainer": ("Components", "Trainer"),
    "rlgf.types": ("Prompt", "SamplingParams"),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'rlgf' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
