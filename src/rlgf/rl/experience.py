"""From a rollout to an experience: log-probabilities, values, advantages and returns.

All are computed before the first update, by these rules:

- The reward is placed at the last completion token.
- The critic of a row's rollout origin values the row: V^π after a policy rollout, V^g after a guide
  rollout.
- V^π is fitted to reward plus KL penalty. V^g is fitted to the reward alone; the KL penalty of a
  token is added to the advantage A^g of that token instead.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from rlgf.algorithms import losses
from rlgf.algorithms.advantages import gae, group_advantages, moments, place_at_end, td_errors, whiten
from rlgf.algorithms.base import Algorithm, PhaseWeight
from rlgf.algorithms.baselines import GroupBaseline
from rlgf.config.sections import PPOConfig
from rlgf.distributed import all_reduce_moments
from rlgf.kernels import dispatch
from rlgf.models.critic import Critic
from rlgf.models.forward import (
    InputFormat,
    MicroBatch,
    backbone_states,
    input_format,
    is_encoder_decoder,
    micro_batches,
    token_logits,
)  # fmt: skip
from rlgf.models.language_model import LanguageModel
from rlgf.models.log_probs import token_log_probs
from rlgf.models.offload import on_device
from rlgf.rl.metrics import experience_metrics
from rlgf.rl.tensors import Experience, Rollout
from rlgf.types import GUIDE, POLICY, Origin, SamplingParams

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Models:
    """The policy, the reference model and the critics."""

    policy: LanguageModel
    reference: LanguageModel
    critics: Mapping[Origin, Critic]  # V^π at POLICY, V^g at GUIDE, if the algorithm needs them


@dataclass(frozen=True)
class ForwardConfig:
    """The settings that all forward passes share."""

    sampling: SamplingParams
    ppo: PPOConfig
    token_budget: int  # tokens of a micro-batch
    precision: str = "fp32"
    max_new_tokens: int = 1  # of a completion, for `ppo.loss_aggregation` 'constant'


def policy_log_probs(
    rollout: Rollout,
    rows: Tensor,
    columns: Tensor,
    logits: Tensor,
    eos_token_ids: Sequence[int],
    forward_config: ForwardConfig,
    inplace_backward: bool = False,
) -> Tensor:
    """Compute the policy's log-probabilities for the PPO ratio.

    With `ppo.ratio_support` 'full', under the full softmax at temperature 1; otherwise under the
    sampling distribution: temperature, top-k and top-p support, and no EOS token before
    `min_new_tokens`.

    Args:
        rollout: the rollout that holds the tokens.
        rows: int64 [tokens], the rows of the tokens.
        columns: int64 [tokens], the columns of the tokens.
        logits: the logits at these tokens, [tokens, vocabulary].
        eos_token_ids: the ids of all EOS tokens.
        forward_config: temperature and ratio support.
        inplace_backward: as in `rlgf.models.log_probs.token_log_probs`.

    Returns:
        [tokens].
    """
    tokens = rollout.ids[rows, columns].to(logits.device)
    if forward_config.ppo.ratio_support == "full":
        return token_log_probs(logits, tokens, inplace_backward=inplace_backward)
    support = rollout.support.select(rows, columns) if rollout.support is not None else None
    if support is not None:
        support = type(support)(support.counts.to(logits.device), support.ids.to(logits.device))
    forbidden = (rollout.response_position[rows, columns] < rollout.min_new_tokens).to(logits.device)
    ends = torch.tensor(list(eos_token_ids), device=logits.device)
    return token_log_probs(logits, tokens, forward_config.sampling.temperature, support, forbidden, ends, inplace_backward)


class RolloutScorer:
    """A rollout to run several models on, without gradients.

    Micro-batches are built once per selection of tokens and reused by all models of the same kind.
    """

    def __init__(self, rollout: Rollout, forward_config: ForwardConfig) -> None:
        self.rollout, self.forward_config = rollout, forward_config
        self.packed: list[tuple[tuple[InputFormat, bool], Tensor, list[MicroBatch]]] = []

    def batches(self, model: Any, selected: Tensor) -> list[MicroBatch]:
        """Return the micro-batches of the selected tokens in the model's input format."""
        kind = (input_format(model), is_encoder_decoder(model))
        for known, tokens, batches in self.packed:
            if known == kind and torch.equal(tokens, selected):
                return batches
        rollout = self.rollout
        made = list(micro_batches(model, rollout.ids, rollout.prompt_lengths, selected, self.forward_config.token_budget))
        self.packed.append((kind, selected, made))
        return made

    def run_model(self, model: LanguageModel, selected: Tensor) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """Run a model on the selected tokens; yield one micro-batch at a time.

        Yields:
            The micro-batch, its logits [tokens, vocabulary] and its hidden states [tokens, hidden]
            before these tokens.
        """
        with on_device(model.model):
            for batch in self.batches(model.model, selected):
                with torch.no_grad():
                    logits, states = token_logits(model, batch, self.forward_config.precision)
                yield batch, logits, states

    def full_log_probs(self, selected: Tensor, model: LanguageModel) -> Tensor:
        """Compute full-softmax log-probabilities of the selected tokens.

        Returns:
            [rows, width] at temperature 1, zero outside the selection.
        """
        values = torch.zeros(self.rollout.ids.shape)
        for batch, logits, _ in self.run_model(model, selected):
            values[batch.token_index] = self._full(batch, logits)
        return values

    def recompute(self, policy: LanguageModel) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Recompute the log-probabilities of the policy's tokens in a forward pass.

        Returns:
            Log-probabilities as the PPO ratio uses them, [rows, width]; full-softmax
            log-probabilities, [rows, width]; hidden states of each micro-batch, [tokens, hidden].
        """
        sampled, full = torch.zeros(self.rollout.ids.shape), torch.zeros(self.rollout.ids.shape)
        hidden_states: list[Tensor] = []
        for batch, logits, states in self.run_model(policy, self.rollout.by_policy):
            own = policy_log_probs(self.rollout, *batch.token_index, logits, policy.eos_token_ids, self.forward_config)
            sampled[batch.token_index], full[batch.token_index] = own.to(sampled.device), self._full(batch, logits)
            hidden_states.append(states)
        return sampled, full, hidden_states

    def values(self, selected: Tensor, critic: Critic, policy: LanguageModel, hidden_states: Sequence[Tensor]) -> Tensor:
        """Compute the values of the states before the selected tokens.

        A critic that shares the policy's backbone reuses `hidden_states`, those of the policy
        from `recompute`, if the selection is the same.

        Returns:
            [rows, width], zero outside the selection.
        """
        values = torch.zeros(self.rollout.ids.shape)
        backbone = policy.backbone() if critic.backbone is None else critic.backbone
        known = bool(hidden_states) and torch.equal(selected, self.rollout.by_policy)
        with torch.no_grad(), on_device(critic):
            for place, batch in enumerate(self.batches(backbone.model, selected)):
                hidden = None
                if critic.backbone is None:
                    hidden = hidden_states[place] if known else backbone_states(backbone, batch, self.forward_config.precision)
                values[batch.token_index] = critic(batch, self.forward_config.precision, hidden).to(values.device)
        return values

    def _full(self, batch: MicroBatch, logits: Tensor) -> Tensor:
        """Compute full-softmax log-probabilities of a micro-batch's tokens, [tokens]."""
        tokens = self.rollout.ids[batch.token_index]
        return token_log_probs(logits, tokens.to(logits.device)).to(tokens.device)


@dataclass(frozen=True)
class TokenLogProbs:
    """The log-probabilities and values of a rollout, independent of its reward.

    Shapes as in `Experience`.
    """

    old_log_probs: Tensor
    reference_log_probs: Tensor
    kl: Tensor
    values: Mapping[Origin, Tensor]  # by each critic, zero in rows that do not need it


def compute_log_probs(
    rollout: Rollout,
    phase_weights: Sequence[PhaseWeight],
    models: Models,
    forward_config: ForwardConfig,
    concurrently: bool = False,
) -> TokenLogProbs:
    """Compute log-probabilities, reference log-probabilities and values of a rollout.

    No reward is needed, so this may run concurrently with scoring. The policy is run only with
    `ppo.old_log_probs` 'recompute'; otherwise the log-probabilities of sampling are used.
    `concurrently`: as in `run_with_critics`.
    """
    scorer, hidden_states = RolloutScorer(rollout, forward_config), list[Tensor]()
    old, full = rollout.log_probs, rollout.full_log_probs
    if forward_config.ppo.old_log_probs == "recompute":
        old, full, hidden_states = scorer.recompute(models.policy)
    if forward_config.ppo.ratio_support == "full":
        old = full

    def by_critics() -> dict[Origin, Tensor]:
        values: dict[Origin, Tensor] = {}
        for origin, critic in models.critics.items():
            concerned = (rollout.rollout_by == origin) | (advantage_weights(rollout, phase_weights, origin) != 0)
            if bool(concerned.any()):
                selected = rollout.completion_mask & concerned[:, None]
                values[origin] = scorer.values(selected, critic, models.policy, hidden_states)
        return values

    by_reference = partial(scorer.full_log_probs, rollout.by_policy, models.reference)
    reference, values = run_with_critics(models.reference, rollout, by_reference, by_critics, concurrently)
    return TokenLogProbs(old, reference, losses.kl_k1(full, reference) * rollout.by_policy, values)


def run_with_critics(
    language_model: LanguageModel, rollout: Rollout, task: Callable[[], S], critics: Callable[[], T], concurrently: bool
) -> tuple[S, T]:
    """Run a language model's task and the critics' task; return both results.

    Args:
        language_model: the model of `task`.
        rollout: the rollout that both evaluate.
        task: a function that uses the language model alone.
        critics: a function that uses the critics alone.
        concurrently: whether they share nothing, so that they may run at the same time; they do
            where that is faster, and if both take about the same time.
    """
    if concurrently and _costs_alike(language_model, rollout):
        return dispatch.run_concurrently(task, critics, language_model.device)
    return task(), critics()


def _costs_alike(language_model: LanguageModel, rollout: Rollout) -> bool:
    """Return whether a language model takes about as long as a critic.

    A critic has no language-model head, and the head can be most of the work.
    """
    head = language_model.head_to_body * int(rollout.by_policy.sum())
    return 3 * head <= 2 * int(rollout.lengths.sum())


def warm_start_critic(
    models: Models, algorithm: Algorithm, phase_weights: Callable[[int], Sequence[PhaseWeight]], iteration: int
) -> None:
    """Copy V^g to V^π before the first iteration with policy rollouts.

    `phase_weights` returns those of an iteration.
    """

    def policy_finishes(number: int) -> bool:
        return any(algorithm.phases[share.phase].rollout == POLICY for share in phase_weights(number))

    has_both = POLICY in models.critics and GUIDE in models.critics
    if has_both and policy_finishes(iteration) and not any(policy_finishes(number) for number in range(iteration)):
        models.critics[POLICY].load_trainable_state(models.critics[GUIDE].trainable_state())


def make_experience(
    rollout: Rollout,
    phase_weights: Sequence[PhaseWeight],
    credit: str,
    scores: Sequence[float],
    rewards: Sequence[float],
    token_log_probs: TokenLogProbs,
    ppo: PPOConfig,
    kl_coefficient: float,
    baseline: GroupBaseline | None = None,
) -> Experience:
    """Compute advantages and value targets of a rollout.

    Args:
        rollout: the completions.
        phase_weights: the phase weights of the iteration.
        credit: the advantage estimator (see `assign_credit`).
        scores: the task's rewards, [rows].
        rewards: the shaped rewards to optimize, [rows].
        token_log_probs: log-probabilities and values.
        ppo: γ, λ and whether advantages are whitened.
        kl_coefficient: the factor of the KL penalty, in reward per nat.
        baseline: of a group, in place of the critics'; None: the critics.

    Returns:
        The experience. Its advantages are Σ_x weight_x A^x over the origins x with a critic: A^x is
        given by `assign_credit` in rows with rollout origin x, and consists of one-step errors in
        the other rows. Its returns are GAE plus value, by the critic of each row's rollout origin.
        With a group baseline all trained tokens of a row have the advantage of its reward, less the
        KL penalty of its tokens.
    """
    kl, penalty = token_log_probs.kl, -kl_coefficient * token_log_probs.kl
    terminal = place_at_end(torch.tensor(list(rewards)), rollout.completion_mask)
    advantages, returns, values = (torch.zeros(rollout.ids.shape) for _ in range(3))
    for origin, estimate in token_log_probs.values.items():
        own = (rollout.rollout_by == origin)[:, None]
        reward = terminal + penalty if origin == POLICY else terminal
        one_step = td_errors(reward, estimate, rollout.completion_mask, ppo.gamma)
        sampled = gae(reward, estimate, rollout.completion_mask, ppo.gamma, ppo.gae_lambda)
        credited = torch.where(own, assign_credit(rollout, origin, credit, one_step, sampled), one_step)
        if origin == GUIDE:
            credited = credited + penalty
        advantages += advantage_weights(rollout, phase_weights, origin)[:, None] * credited
        values += own * estimate
        returns += own * rollout.after_switch * (sampled + estimate)

    trained = rollout.trained_tokens(credit, ppo.mask_truncated)
    group_stats: dict[str, float] = {}
    if baseline is not None:
        of_rows, differs = group_advantages(torch.tensor(list(rewards)) + penalty.sum(1), rollout.group, baseline)
        advantages += of_rows[:, None]
        group_stats["zero_variance_groups"] = 1 - len(rollout.group[differs].unique()) / max(1, len(rollout.group.unique()))
    advantages = advantages * trained
    stats = experience_metrics(rollout, trained, scores, rewards, kl, advantages, values, returns) | group_stats
    if baseline is None and ppo.whiten_advantages:
        advantages = whiten(advantages, trained, all_reduce_moments(moments(advantages, trained)))
    return Experience(
        rollout,
        trained,
        torch.tensor(list(scores)),
        token_log_probs.old_log_probs,
        token_log_probs.reference_log_probs,
        kl,
        values * rollout.completion_mask,
        returns,
        advantages,
        stats=stats,
    )


def assign_credit(rollout: Rollout, rollout_by: Origin, credit: str, one_step: Tensor, gae_estimate: Tensor) -> Tensor:
    """Select the advantage estimate of each token in rows of the critic's own origin.

    After a policy rollout: GAE. After a guide rollout, by `credit`:

    - 'gae': GAE.
    - 'td': GAE at the last token before the switch, the token that the guide actually continued;
      one-step errors at the tokens before it.
    - 'switch': GAE; only that last token is trained (see `Rollout.trained_tokens`).

    Args:
        rollout: the completions.
        rollout_by: the rollout origin.
        credit: 'gae', 'td' or 'switch'.
        one_step: one-step temporal-difference errors, [rows, width].
        gae_estimate: GAE, [rows, width].

    Returns:
        [rows, width].
    """
    if rollout_by == POLICY or credit != "td":
        return gae_estimate
    at_switch = rollout.response_position == rollout.switch_position[:, None] - 1
    return torch.where(at_switch, gae_estimate, one_step)


def advantage_weights(rollout: Rollout, phase_weights: Sequence[PhaseWeight], origin: Origin) -> Tensor:
    """Return the weight of A^π (POLICY) or A^g (GUIDE) for each row, [rows]."""
    by_phase = {share.phase: share.policy_weight if origin == POLICY else share.guide_weight for share in phase_weights}
    return torch.tensor([by_phase[phase] for phase in rollout.phase.tolist()])
