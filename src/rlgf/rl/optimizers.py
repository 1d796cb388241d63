"""Optimizers of policy and critics: AdamW, gradient norms and clipped steps."""

import torch
from torch import Tensor

from rlgf.config.sections import PPOConfig


def new_adam(parameters: list[torch.nn.Parameter], learning_rate: float, ppo: PPOConfig) -> torch.optim.Optimizer:
    """Return a fused AdamW optimizer."""
    return torch.optim.AdamW(parameters, learning_rate, eps=ppo.adam_epsilon, weight_decay=ppo.weight_decay, fused=True)


def gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor | None:
    """Return the norm of all gradients of an optimizer's parameters, or None without any."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else None


def step_optimizer(optimizer: torch.optim.Optimizer, norm: Tensor, learning_rate: float, max_norm: float) -> None:
    """Clip the gradients, whose norm is `norm`, step, and clear them."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    # the fused step divides the gradients by grad_scale: clipping needs no extra pass over memory
    optimizer.grad_scale = norm / max_norm if float(norm) > max_norm else None  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    optimizer.zero_grad()
