"""Rollouts and experience as tensors: tokens, origins, log-probabilities, advantages."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlgf.models.log_probs import SampledSupport
from rlgf.types import GUIDE, POLICY, Origin, Prompt


@dataclass(frozen=True)
class Rollout:
    """A batch of completions: tokens, the origin of each token, and the switch positions.

    A row holds prompt, completion and padding, in this order: padding is on the right, so causal
    attention needs no padding mask. `width` is the length of the longest row, and `rows` is
    `ppo.completions_per_iteration`. Log-probabilities are in nats.

    Example:
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> trainer = rlgf.Trainer(rlgf.prepare(config, Path("runs/stages")))
        >>> rollout = trainer.collect_rollout(0)
        >>> rollout.ids.shape == rollout.origin.shape == (4, int(rollout.lengths.max()))
        True
        >>> bool((rollout.completion_mask == rollout.by_policy | rollout.by_guide).all())
        True
    """

    prompts: Sequence[Prompt]
    completions: Sequence[str]  # decoded, for rewards, logs and judges
    ids: Tensor  # int64 [rows, width]
    origin: Tensor  # uint8 [rows, width], values of Origin
    switch_position: Tensor  # int64 [rows], completion tokens before the rollout
    rollout_by: Tensor  # uint8 [rows], origin of the rollout: selects the critic of the row
    phase: Tensor  # int64 [rows], index of the algorithm's phase
    ended_with_eos: Tensor  # bool [rows]; False: truncated
    index: Tensor  # int64 [rows], global trajectory index: determines all random numbers
    group: Tensor  # int64 [rows], rows of one group share a prompt
    log_probs: Tensor  # float [rows, width], policy tokens, under the sampling distribution
    full_log_probs: Tensor  # float [rows, width], policy tokens, full softmax at temperature 1
    support: SampledSupport | None  # tokens that sampling allowed; None: all
    min_new_tokens: int  # completion tokens before which EOS is forbidden
    counters: Mapping[str, int] = field(default_factory=dict[str, int])  # see docs/metrics.md
    guide_completions: Sequence[str | None] = ()  # unchanged text of text guides

    @property
    def lengths(self) -> Tensor:
        """Return the number of tokens of prompt and completion, [rows]."""
        return (self.origin != Origin.PAD).sum(1)

    @property
    def prompt_lengths(self) -> Tensor:
        """Return the number of prompt tokens, [rows]."""
        return (self.origin == Origin.PROMPT).sum(1)

    @property
    def response_position(self) -> Tensor:
        """Return the completion position of each column (negative in the prompt), [rows, width]."""
        return torch.arange(self.ids.shape[1]) - self.prompt_lengths[:, None]

    @property
    def completion_mask(self) -> Tensor:
        """Return the mask of tokens that policy or guide generated, [rows, width]."""
        return (self.origin == POLICY) | (self.origin == GUIDE)

    @property
    def by_policy(self) -> Tensor:
        """Return the mask of tokens that the policy generated, [rows, width]."""
        return self.origin == POLICY

    @property
    def by_guide(self) -> Tensor:
        """Return the mask of tokens that the guide generated, [rows, width]."""
        return self.origin == GUIDE

    @property
    def after_switch(self) -> Tensor:
        """Return the mask of completion tokens from the switch position on, [rows, width].

        The critic of the row's rollout origin trains on the states before these tokens.
        """
        return self.completion_mask & (self.response_position >= self.switch_position[:, None])

    def trained_tokens(self, credit: str, mask_truncated: bool = False) -> Tensor:
        """Return the mask of tokens that the policy trains on, [rows, width].

        All tokens that the policy generated; with `credit` 'switch', in rows with a guide rollout,
        only the last token before the switch; with `mask_truncated`, none of rows without EOS.
        """
        chosen = self.by_policy & self.ended_with_eos[:, None] if mask_truncated else self.by_policy
        if credit != "switch":
            return chosen
        at_switch = self.response_position == self.switch_position[:, None] - 1
        return chosen & (at_switch | (self.rollout_by == POLICY)[:, None])


@dataclass(frozen=True)
class Experience:
    """A rollout and the quantities computed from it before the first update.

    All tensors are float32 and 0 outside the completion. Log-probabilities and KL are in nats.

    Example:
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> trainer = rlgf.Trainer(rlgf.prepare(config, Path("runs/stages")))
        >>> experience = trainer.make_experience(trainer.collect_rollout(0), 0)
        >>> experience.score.shape
        torch.Size([4])
        >>> experience.advantages.shape == experience.rollout.ids.shape
        True
    """

    rollout: Rollout
    trained: Tensor  # bool [rows, width], tokens that the policy trains on
    score: Tensor  # [rows], the task's reward before shaping
    old_log_probs: Tensor  # [rows, width], policy tokens, as the PPO ratio uses them
    reference_log_probs: Tensor  # [rows, width], policy tokens, full softmax
    kl: Tensor  # [rows, width], policy tokens, log π − log π_0 (k1)
    values: Tensor  # [rows, width], by the critic of the rollout origin, before the update
    returns: Tensor  # [rows, width], targets of that critic
    advantages: Tensor  # [rows, width], trained tokens, whitened if configured
    is_finite: bool = True  # False: no optimizer step uses it (runtime.on_nonfinite)
    stats: Mapping[str, float] = field(default_factory=dict[str, float])
