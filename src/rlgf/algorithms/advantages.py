"""Advantages: temporal differences, GAE, groups and whitening, as functions of tensors."""

import torch
from torch import Tensor

from rlgf.algorithms.baselines import GroupBaseline
from rlgf.distributed import Moments


def place_at_end(values: Tensor, selected: Tensor) -> Tensor:
    """Place one value per row at the last selected column of the row.

    Args:
        values: [rows], for example the reward of each completion.
        selected: bool [rows, width].

    Returns:
        [rows, width], zero elsewhere. A row without a selected column stays zero.
    """
    columns = torch.arange(selected.shape[1]) * selected
    placed = torch.zeros(selected.shape, dtype=values.dtype)
    rows = selected.any(1)
    placed[rows, columns.max(1).values[rows]] = values[rows]
    return placed


def td_errors(rewards: Tensor, values: Tensor, selected: Tensor, gamma: float) -> Tensor:
    """Compute one-step temporal-difference errors.

    δ_t = r_t + γ V(s_{t+1}) − V(s_t), with V = 0 after the last token: episodes have a finite
    horizon, so a completion that reaches its maximum length is terminal as well.

    Args:
        rewards: r, [rows, width].
        values: V, [rows, width]; column t holds the value of the state before token t.
        selected: bool [rows, width], one contiguous run of tokens per row.
        gamma: γ, the discount factor.

    Returns:
        δ, [rows, width], zero outside the selection.
    """
    following = torch.zeros_like(values)
    following[:, :-1] = values[:, 1:] * selected[:, 1:]
    return (rewards + gamma * following - values) * selected


def gae(rewards: Tensor, values: Tensor, selected: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Compute generalized advantage estimates (GAE).

    A_t = Σ_{l≥0} (γλ)^l δ_{t+l}, where δ are the errors of `td_errors`.

    Args:
        rewards: r, [rows, width].
        values: V, [rows, width]; column t holds the value of the state before token t.
        selected: bool [rows, width], one contiguous run of tokens per row.
        gamma: γ, the discount factor.
        gae_lambda: λ; 0 gives one-step errors, 1 gives Monte Carlo returns minus values.

    Returns:
        A, [rows, width], zero outside the selection.

    Source: Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation", equation 16.
    """
    deltas = td_errors(rewards, values, selected, gamma)
    advantages = torch.zeros_like(deltas)
    running = torch.zeros(deltas.shape[0], dtype=deltas.dtype)
    for column in reversed(range(deltas.shape[1])):
        running = deltas[:, column] + gamma * gae_lambda * running
        advantages[:, column] = running
    return advantages * selected


def group_advantages(rewards: Tensor, groups: Tensor, baseline: GroupBaseline) -> tuple[Tensor, Tensor]:
    """Compute the advantage of each completion over its group.

    With R_i the reward of completion i and G the size of its group:

    - 'leave_one_out': R_i − mean_{j≠i} R_j (RLOO).
    - 'group_mean': R_i − mean_j R_j (Dr. GRPO).
    - 'group_normalized': (R_i − mean_j R_j) / (std_j R_j + ε), with Bessel's correction (GRPO).

    A group of one has advantage 0.

    Args:
        rewards: R, [rows].
        groups: int64 [rows], the group of each row.
        baseline: the kind of advantage and ε.

    Returns:
        The advantages, [rows], and bool [rows]: whether the rewards of the row's group differ.

    Source: Ahmadian et al. 2024 (arXiv:2402.14740); Liu et al. 2025 (arXiv:2503.20783); Shao et al.
    2024 (arXiv:2402.03300).
    """
    _, members = groups.unique(return_inverse=True)
    count = int(members.max()) + 1 if len(members) else 0

    def group_sum(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=values.dtype).index_add_(0, members, values)[members]

    values = rewards.double()
    size = group_sum(torch.ones_like(values))
    centered = values - group_sum(values) / size
    lowest = torch.full((count,), torch.inf, dtype=values.dtype).scatter_reduce_(0, members, values, "amin")[members]
    highest = torch.full((count,), -torch.inf, dtype=values.dtype).scatter_reduce_(0, members, values, "amax")[members]
    differs = highest > lowest
    if baseline.advantage == "leave_one_out":
        centered = centered * size / (size - 1).clamp(min=1)
    elif baseline.advantage == "group_normalized":
        deviation = (group_sum(centered.square()) / (size - 1).clamp(min=1)).sqrt()
        centered = centered / (deviation + baseline.epsilon)
    return torch.where(differs, centered, 0.0).to(rewards.dtype), differs


def moments(values: Tensor, selected: Tensor) -> Moments:
    """Compute count, sum and sum of squares of the selected values, in float64."""
    chosen = values[selected].double()
    return Moments(float(chosen.numel()), float(chosen.sum()), float(chosen.square().sum()))


def whiten(values: Tensor, selected: Tensor, over: Moments | None = None) -> Tensor:
    """Normalize the selected values to mean 0 and population variance 1.

    (x − μ) / √(σ² + 1e-8).

    Args:
        values: x, [rows, width].
        selected: bool [rows, width].
        over: the sums that give μ and σ², over all processes; default: those of `values` alone.

    Returns:
        [rows, width], zero outside the selection.
    """
    sums = over or moments(values, selected)
    if sums.count == 0:
        return torch.zeros_like(values)
    mean = sums.total / sums.count
    variance = max(sums.squares / sums.count - mean**2, 0.0)
    return torch.where(selected, (values - mean) / (variance + 1e-8) ** 0.5, 0.0)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Compute the explained variance of a critic.

    1 − Var(returns − values) / Var(returns), both [tokens]. 1: a perfect critic; 0: no better than
    predicting the mean. Undefined (fewer than two tokens, or constant returns): 0.
    """
    if returns.numel() < 2:
        return 0.0
    spread = float(returns.var())
    return 1.0 - float((returns - values).var()) / spread if spread > 1e-12 else 0.0
