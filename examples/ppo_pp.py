"""PPO++ in one file: read it from top to bottom, or run it (`python examples/ppo_pp.py`, half a minute on one core).

A policy, a tiny GPT-2, must generate a key of six letters. The reward is 1 for the whole key and 0 for anything else,
so PPO alone hardly ever sees a reward. PPO++ has a guide, which need not be good: this one gets one letter in ten
wrong. The guide starts some of the completions, and the policy continues them from a random switch position. Late in
the key the policy has to guess only one or two letters; what it learns there makes earlier positions easier, until it
needs no guide.

The file uses torch and transformers only; a test compares the library with it. Column `c` of every [rows, width] tensor
belongs to the token in column `c`: its origin, its log-probability, and the value of the state before it.

Source: "Learning to Generate Better Than Your LLM", algorithm 1; Schulman et al. 2017 (PPO) and 2016 (advantages).
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

PAD, PROMPT, POLICY, GUIDE = range(4)  # the origin of a token; every mask below derives from it

WORDS = ["<end>", "key:", "a", "b", "c", "d"]
EOS = 0  # also the padding id, because padding is recognized by its origin
PROMPT_IDS, LETTERS = [1], [2, 3, 4, 5]
KEY = [WORDS.index(letter) for letter in "cadbac"]


@dataclass(frozen=True)
class Settings:
    """The hyper-parameters of a run."""

    beta: float = 0.5  # probability of a guide rollin; 0 is PPO
    iterations: int = 50
    completions: int = 128  # per iteration
    epochs: int = 2  # passes over an iteration's completions
    minibatch: int = 64  # completions per optimizer step
    max_new_tokens: int = 7  # a key and EOS
    policy_rate: float = 1e-3  # learning rates
    critic_rate: float = 1e-3
    kl_coefficient: float = 0.001
    gamma: float = 1.0
    gae_lambda: float = 0.95
    clip_range: float = 0.2  # of the ratio
    value_clip_range: float = 0.2
    max_grad_norm: float = 1.0  # of the gradient, for each model


def tiny_gpt2(seed: int, vocabulary: int = len(WORDS)) -> GPT2LMHeadModel:
    """Return a policy with random weights, without dropout, so that first ratios are 1."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=EOS, eos_token_id=EOS,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
            initializer_range=0.1,
        )
    )  # fmt: skip


class Critic(nn.Module):
    """A critic: a copy of the policy's backbone and a value head that starts at zero."""

    def __init__(self, policy: GPT2LMHeadModel) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(policy.transformer)
        self.head = nn.Linear(policy.config.n_embd, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


# --- rollout ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """Completions with the origins of their tokens; a row is prompt, completion and padding."""

    ids: Tensor  # int64 [rows, width]
    origin: Tensor  # int64 [rows, width]: PAD, PROMPT, POLICY or GUIDE
    switch_position: Tensor  # int64 [rows], number of tokens that the guide generated
    rewards: Tensor  # [rows], of the whole completion


def lock_guide(prompt: Sequence[int], generator: torch.Generator) -> list[int]:
    """Complete a prompt as a mediocre guide: the key, with one letter in ten at random."""
    slips = torch.rand(len(KEY), generator=generator) < 0.1
    guesses = torch.randint(len(LETTERS), (len(KEY),), generator=generator)
    return [LETTERS[guess] if slip else letter for letter, slip, guess in zip(KEY, slips, guesses)] + [EOS]


def lock_reward(prompt: Sequence[int], completion: Sequence[int]) -> float:
    """Return 1 for the key and EOS, 0 for everything else."""
    return float(list(completion) == [*KEY, EOS])


def collect_rollout(
    policy: GPT2LMHeadModel,
    guide: Callable[[Sequence[int], torch.Generator], list[int]],
    reward: Callable[[Sequence[int], Sequence[int]], float],
    prompts: Sequence[list[int]],
    settings: Settings,
    generator: torch.Generator,
) -> Rollout:
    """Complete each prompt: with probability beta the guide starts, and the policy finishes."""
    rows: list[list[int]] = []
    switch_position: list[int] = []
    for prompt in prompts:
        prefix: list[int] = []
        if torch.rand((), generator=generator) < settings.beta:
            prefix = guide(prompt, generator)[: settings.max_new_tokens]
            # uniform over {0 ... L-1}: with 0 among them, the first token is trained even for beta = 1
            prefix = prefix[: int(torch.randint(len(prefix), (), generator=generator))]
        rows.append([*prompt, *prefix])
        switch_position.append(len(prefix))

    max_lengths = [len(prompt) + settings.max_new_tokens for prompt in prompts]
    active = list(range(len(rows)))
    while active:  # one token for every unfinished completion; the whole row is evaluated again
        ids, lengths = pad([rows[i] for i in active]), torch.tensor([len(rows[i]) for i in active])
        with torch.no_grad():
            logits = policy(ids).logits[torch.arange(len(active)), lengths - 1]
        sampled = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1).tolist()
        for i, token in zip(active, sampled):
            rows[i].append(token)
        active = [i for i, token in zip(active, sampled) if token != EOS and len(rows[i]) < max_lengths[i]]

    origins = [
        [PROMPT] * len(prompt) + [GUIDE] * h + [POLICY] * (len(row) - len(prompt) - h)
        for prompt, h, row in zip(prompts, switch_position, rows)
    ]
    rewards = [reward(prompt, row[len(prompt) :]) for prompt, row in zip(prompts, rows)]
    return Rollout(pad(rows), pad(origins), torch.tensor(switch_position), torch.tensor(rewards))


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Pad rows on the right, where causal attention does not see the padding."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


# --- experience -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Experience:
    """A rollout and the quantities computed before the first update, [rows, width]."""

    rollout: Rollout
    old_log_probs: Tensor  # of the policy before the update
    values: Tensor  # of the critic before the update
    advantages: Tensor
    returns: Tensor  # targets of the critic


def token_log_probs(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """Return the log-probability of every token, [rows, width]; 0 in the first column."""
    predicted = model(ids).logits[:, :-1].log_softmax(-1)
    picked = predicted.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return nn.functional.pad(picked, (1, 0))


def state_values(critic: Critic, ids: Tensor) -> Tensor:
    """Return the value of the state before every token, [rows, width]."""
    hidden = critic.backbone(ids).last_hidden_state[:, :-1]
    return nn.functional.pad(critic.head(hidden).squeeze(-1), (1, 0))


@torch.no_grad()
def make_experience(
    rollout: Rollout, policy: GPT2LMHeadModel, reference: GPT2LMHeadModel, critic: Critic, settings: Settings
) -> Experience:
    """Compute token rewards, generalized advantages and targets of the critic."""
    by_policy = rollout.origin == POLICY  # in PPO++ these are exactly the tokens from the switch on
    log_probs, values = token_log_probs(policy, rollout.ids), state_values(critic, rollout.ids)

    # each token of the policy has a KL penalty (the estimator k1) ...
    rewards = -settings.kl_coefficient * (log_probs - token_log_probs(reference, rollout.ids)) * by_policy
    # ... and the last token of a completion, EOS included, has its reward
    last = (rollout.origin != PAD).sum(1) - 1
    rewards[torch.arange(len(last)), last] += rollout.rewards

    # delta_t = r_t + gamma V(s_t+1) - V(s_t);  A_t = delta_t + gamma lambda A_t+1, from the last token backwards
    advantages = torch.zeros_like(values)
    following_value, following_advantage = torch.zeros(len(last)), torch.zeros(len(last))
    for column in reversed(range(values.shape[1])):
        delta = rewards[:, column] + settings.gamma * following_value - values[:, column]
        advantage = delta + settings.gamma * settings.gae_lambda * following_advantage
        here = by_policy[:, column]
        advantages[:, column] = following_advantage = torch.where(here, advantage, 0.0)
        following_value = torch.where(here, values[:, column], 0.0)
    returns = advantages + values

    # whitened over all tokens that are trained
    trained = advantages[by_policy]
    whitened = (advantages - trained.mean()) / (trained.var(correction=0) + 1e-8).sqrt() if len(trained) else advantages
    return Experience(rollout, log_probs, values, whitened * by_policy, returns)


# --- update -----------------------------------------------------------------------------------------------------------


def optimizer_for(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """Return the optimizer of a model, with the epsilon that is usual for PPO."""
    return torch.optim.AdamW(model.parameters(), learning_rate, eps=1e-5, weight_decay=0.0)


def update(
    experience: Experience,
    policy: GPT2LMHeadModel,
    critic: Critic,
    policy_optimizer: torch.optim.AdamW,
    critic_optimizer: torch.optim.AdamW,
    minibatches: Sequence[Tensor],
    settings: Settings,
) -> list[dict[str, float]]:
    """Update both models once for each minibatch of row indices; return the losses."""
    history: list[dict[str, float]] = []
    for indices in minibatches:
        ids, origin = experience.rollout.ids[indices], experience.rollout.origin[indices]
        old, old_values = experience.old_log_probs[indices], experience.values[indices]
        advantages, returns = experience.advantages[indices], experience.returns[indices]
        by_policy = origin == POLICY  # the guide's tokens are context only
        count = by_policy.sum().clamp(min=1)

        ratio = ((token_log_probs(policy, ids) - old) * by_policy).exp()
        clipped_ratio = ratio.clamp(1 - settings.clip_range, 1 + settings.clip_range)
        surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
        policy_loss = -(surrogate * by_policy).sum() / count

        values = state_values(critic, ids)
        clipped_values = old_values + (values - old_values).clamp(-settings.value_clip_range, settings.value_clip_range)
        error = torch.maximum((values - returns).square(), (clipped_values - returns).square())
        value_loss = 0.5 * (error * by_policy).sum() / count

        optimizer_step(policy, policy_optimizer, policy_loss, settings)
        optimizer_step(critic, critic_optimizer, value_loss, settings)
        history.append({"policy_loss": policy_loss.item(), "value_loss": value_loss.item()})
    return history


def optimizer_step(model: nn.Module, optimizer: torch.optim.AdamW, loss: Tensor, settings: Settings) -> None:
    """Run an optimizer step with the gradient norm clipped, for each model by itself."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


# --- training ---------------------------------------------------------------------------------------------------------


def train(settings: Settings, seed: int, every: int) -> list[float]:
    """Train a policy; return its success rate without the guide, every so many iterations."""
    generator = torch.Generator().manual_seed(seed)
    policy = tiny_gpt2(seed).eval()
    reference, critic = copy.deepcopy(policy), Critic(policy)
    policy_optimizer = optimizer_for(policy, settings.policy_rate)
    critic_optimizer = optimizer_for(critic, settings.critic_rate)
    prompts, unguided = [PROMPT_IDS] * settings.completions, replace(settings, beta=0.0)
    success_rates: list[float] = []
    for iteration in range(settings.iterations):
        rollout = collect_rollout(policy, lock_guide, lock_reward, prompts, settings, generator)
        experience = make_experience(rollout, policy, reference, critic, settings)
        orders = [torch.randperm(settings.completions, generator=generator) for _ in range(settings.epochs)]
        minibatches = [indices for order in orders for indices in order.split(settings.minibatch)]
        update(experience, policy, critic, policy_optimizer, critic_optimizer, minibatches, settings)
        if (iteration + 1) % every == 0:
            success_rates.append(
                collect_rollout(policy, lock_guide, lock_reward, prompts, unguided, generator).rewards.mean().item()
            )
    return success_rates


def main() -> None:
    torch.set_num_threads(1)
    began, every = time.monotonic(), 10
    columns = [count * Settings.completions for count in range(every, Settings.iterations + 1, every)]
    print("success rate of the policy without the guide, after so many training completions")
    print(f"{'algorithm':<12}{'seed':>4}" + "".join(f"{column:>8,}" for column in columns))
    for name, beta in (("PPO", 0.0), ("PPO++", 0.5)):
        for seed in range(2):
            success_rates = train(Settings(beta=beta), seed, every)
            print(f"{name:<12}{seed:>4}" + "".join(f"{rate:>8.2f}" for rate in success_rates), flush=True)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
