"""PPO++ in one file: read it from top to bottom, or run it (`python examples/ppo_pp.py`, half a minute on one core).

A policy, a tiny GPT-2, must write the key of a lock, letter by letter, and is paid 1 for the whole key and 0 for
anything else. By itself it would have to guess all letters at once, so plain PPO finds nothing to learn from. PPO++ has
a guide, another writer, which need not be good: this one gets one letter in ten wrong. The guide begins some of the
texts, the pen changes hands at a random place, and the policy finishes. Near the end of a text it needs luck for a
letter or two only; what it learns there makes the places before easier, until it needs no guide.

This file uses torch and transformers and nothing else of this repository; a test holds the library to the same numbers.
One convention: column `c` of every [texts, width] tensor speaks of the token in column `c`: who wrote it, its
log-probability given all before it, and the value of the state before it.
Source: "Learning to Generate Better Than Your LLM", algorithm 1; Schulman et al. 2017 (PPO) and 2016 (advantages).
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

PAD, PROMPT, POLICY, GUIDE = range(4)  # who wrote a token: every mask below is a question asked of this

WORDS = ["<end>", "key:", "a", "b", "c", "d"]
END = 0  # also fills the padding: harmless, because padding is known by its origin and not by its id
PROMPT_IDS, LETTERS = [1], [2, 3, 4, 5]
KEY = [WORDS.index(letter) for letter in "cadbac"]


@dataclass(frozen=True)
class Settings:
    """The numbers of a run."""

    beta: float = 0.5  # probability that the guide begins a text; 0 is plain PPO
    iterations: int = 50
    texts: int = 128  # per iteration
    epochs: int = 2  # passes over an iteration's texts
    minibatch: int = 64  # texts per optimizer step
    horizon: int = 7  # most tokens of a response: a key and its end
    policy_rate: float = 1e-3  # learning rates
    critic_rate: float = 1e-3
    kl_coefficient: float = 0.001
    gamma: float = 1.0
    lam: float = 0.95
    clip: float = 0.2  # of the ratio
    value_clip: float = 0.2
    max_norm: float = 1.0  # of the gradient, for each model


def tiny_gpt2(seed: int, vocabulary: int = len(WORDS)) -> GPT2LMHeadModel:
    """A policy with random weights; no dropout, so that the first ratio of every iteration is exactly 1."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary, n_positions=32, n_embd=32, n_layer=1, n_head=2, bos_token_id=END, eos_token_id=END,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
            initializer_range=0.1,
        )
    )  # fmt: skip


class Critic(nn.Module):
    """A value for every state: a body of its own, first a copy of the policy's, and a head that starts at zero."""

    def __init__(self, policy: GPT2LMHeadModel) -> None:
        super().__init__()
        self.trunk = copy.deepcopy(policy.transformer)
        self.head = nn.Linear(policy.config.n_embd, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rollout:
    """Texts, their authors, and where the pen changed hands. Rows are prompt, response and padding, in this order."""

    ids: Tensor  # [texts, width]
    origin: Tensor  # [texts, width]: PAD, PROMPT, POLICY or GUIDE
    switch: Tensor  # [texts]: how many response tokens the guide wrote before the policy took over
    rewards: Tensor  # [texts]: for the finished text


def lock_guide(prompt: Sequence[int], generator: torch.Generator) -> list[int]:
    """A mediocre guide: it knows the key, and writes one letter in ten at random."""
    slips = torch.rand(len(KEY), generator=generator) < 0.1
    guesses = torch.randint(len(LETTERS), (len(KEY),), generator=generator)
    return [LETTERS[guess] if slip else letter for letter, slip, guess in zip(KEY, slips, guesses)] + [END]


def lock_reward(prompt: Sequence[int], response: Sequence[int]) -> float:
    """1 for the key and its end, 0 for everything else."""
    return float(list(response) == [*KEY, END])


def collect(
    policy: GPT2LMHeadModel,
    guide: Callable[[Sequence[int], torch.Generator], list[int]],
    reward: Callable[[Sequence[int], Sequence[int]], float],
    prompts: Sequence[list[int]],
    settings: Settings,
    generator: torch.Generator,
) -> Rollout:
    """Write a text for each prompt: with probability beta the guide begins it, in any case the policy finishes it."""
    rows: list[list[int]] = []
    switch: list[int] = []
    for prompt in prompts:
        begun: list[int] = []
        if torch.rand((), generator=generator) < settings.beta:
            begun = guide(prompt, generator)[: settings.horizon]
            # Uniform over {0 ... L-1}: with 0 among them, the first token is trained even if the guide always begins.
            begun = begun[: int(torch.randint(len(begun), (), generator=generator))]
        rows.append([*prompt, *begun])
        switch.append(len(begun))

    ends = [len(prompt) + settings.horizon for prompt in prompts]
    writing = list(range(len(rows)))
    while writing:  # one token for every text that is not finished; the state is restarted by reading it anew
        ids, lengths = pad([rows[i] for i in writing]), torch.tensor([len(rows[i]) for i in writing])
        with torch.no_grad():
            logits = policy(ids).logits[torch.arange(len(writing)), lengths - 1]
        drawn = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1).tolist()
        for i, token in zip(writing, drawn):
            rows[i].append(token)
        writing = [i for i, token in zip(writing, drawn) if token != END and len(rows[i]) < ends[i]]

    authors = [
        [PROMPT] * len(prompt) + [GUIDE] * h + [POLICY] * (len(row) - len(prompt) - h)
        for prompt, h, row in zip(prompts, switch, rows)
    ]
    rewards = [reward(prompt, row[len(prompt) :]) for prompt, row in zip(prompts, rows)]
    return Rollout(pad(rows), pad(authors), torch.tensor(switch), torch.tensor(rewards))


def pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of different lengths as a tensor, filled up on the right (so causal attention never sees the filling)."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


# --- appraising: everything that is measured before the first update --------------------------------------------------


@dataclass(frozen=True)
class Experience:
    """A rollout and what was measured of it; all tensors are [texts, width]."""

    rollout: Rollout
    log_probs: Tensor  # of the policy that wrote
    values: Tensor  # of the critic before the update
    advantages: Tensor
    returns: Tensor  # what the critic is fitted to


def token_log_probs(model: GPT2LMHeadModel, ids: Tensor) -> Tensor:
    """The log-probability of every token given all before it; 0 in the first column, which has nothing before it."""
    predicted = model(ids).logits[:, :-1].log_softmax(-1)
    picked = predicted.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return nn.functional.pad(picked, (1, 0))


def state_values(critic: Critic, ids: Tensor) -> Tensor:
    """The value of the state before every token."""
    hidden = critic.trunk(ids).last_hidden_state[:, :-1]
    return nn.functional.pad(critic.head(hidden).squeeze(-1), (1, 0))


@torch.no_grad()
def appraise(
    rollout: Rollout, policy: GPT2LMHeadModel, reference: GPT2LMHeadModel, critic: Critic, settings: Settings
) -> Experience:
    """Rewards for tokens, generalised advantages, and targets for the critic."""
    by_policy = rollout.origin == POLICY  # in PPO++ these are exactly the tokens from the switch on
    log_probs, values = token_log_probs(policy, rollout.ids), state_values(critic, rollout.ids)

    # Every token the policy wrote pays for leaving the reference (the estimator called k1) ...
    rewards = -settings.kl_coefficient * (log_probs - token_log_probs(reference, rollout.ids)) * by_policy
    # ... and the last token of a text, its end token included, earns the reward of the text.
    last = (rollout.origin != PAD).sum(1) - 1
    rewards[torch.arange(len(last)), last] += rollout.rewards

    # delta_t = r_t + gamma V(s_t+1) - V(s_t);  A_t = delta_t + gamma lambda A_t+1, from the last token backwards.
    advantages = torch.zeros_like(values)
    following_value, following_advantage = torch.zeros(len(last)), torch.zeros(len(last))
    for column in reversed(range(values.shape[1])):
        delta = rewards[:, column] + settings.gamma * following_value - values[:, column]
        advantage = delta + settings.gamma * settings.lam * following_advantage
        here = by_policy[:, column]
        advantages[:, column] = following_advantage = torch.where(here, advantage, 0.0)
        following_value = torch.where(here, values[:, column], 0.0)
    returns = advantages + values

    # Whitened over all tokens that will be trained: half of them become better than usual, half worse.
    trained = advantages[by_policy]
    whitened = (advantages - trained.mean()) / (trained.var(correction=0) + 1e-8).sqrt() if len(trained) else advantages
    return Experience(rollout, log_probs, values, whitened * by_policy, returns)


# --- updating ---------------------------------------------------------------------------------------------------------


def optimizer_for(model: nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """Policy and critic have one each, with the epsilon that PPO is used to."""
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
    """One optimizer step of each model for each minibatch (row numbers); returns the losses of every step."""
    history: list[dict[str, float]] = []
    for members in minibatches:
        ids, origin = experience.rollout.ids[members], experience.rollout.origin[members]
        old, old_values = experience.log_probs[members], experience.values[members]
        advantages, returns = experience.advantages[members], experience.returns[members]
        by_policy = origin == POLICY  # the guide's words are read, and never learned
        count = by_policy.sum().clamp(min=1)

        ratio = ((token_log_probs(policy, ids) - old) * by_policy).exp()
        clipped_ratio = ratio.clamp(1 - settings.clip, 1 + settings.clip)
        surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
        policy_loss = -(surrogate * by_policy).sum() / count

        values = state_values(critic, ids)
        clipped_values = old_values + (values - old_values).clamp(-settings.value_clip, settings.value_clip)
        error = torch.maximum((values - returns).square(), (clipped_values - returns).square())
        value_loss = 0.5 * (error * by_policy).sum() / count

        descend(policy, policy_optimizer, policy_loss, settings)
        descend(critic, critic_optimizer, value_loss, settings)
        history.append({"policy_loss": policy_loss.item(), "value_loss": value_loss.item()})
    return history


def descend(model: nn.Module, optimizer: torch.optim.AdamW, loss: Tensor, settings: Settings) -> None:
    """A step down the gradient, its length clipped for each model by itself."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), settings.max_norm)
    optimizer.step()
    optimizer.zero_grad()


# --- all of it --------------------------------------------------------------------------------------------------------


def train(settings: Settings, seed: int, every: int) -> list[float]:
    """A whole run; returns, every so many iterations, how often the policy opens the lock by itself."""
    generator = torch.Generator().manual_seed(seed)
    policy = tiny_gpt2(seed).eval()
    reference, critic = copy.deepcopy(policy), Critic(policy)
    policy_optimizer = optimizer_for(policy, settings.policy_rate)
    critic_optimizer = optimizer_for(critic, settings.critic_rate)
    prompts, alone = [PROMPT_IDS] * settings.texts, replace(settings, beta=0.0)
    opened: list[float] = []
    for iteration in range(settings.iterations):
        rollout = collect(policy, lock_guide, lock_reward, prompts, settings, generator)
        experience = appraise(rollout, policy, reference, critic, settings)
        orders = [torch.randperm(settings.texts, generator=generator) for _ in range(settings.epochs)]
        minibatches = [members for order in orders for members in order.split(settings.minibatch)]
        update(experience, policy, critic, policy_optimizer, critic_optimizer, minibatches, settings)
        if (iteration + 1) % every == 0:
            opened.append(collect(policy, lock_guide, lock_reward, prompts, alone, generator).rewards.mean().item())
    return opened


def main() -> None:
    torch.set_num_threads(1)
    began, every = time.monotonic(), 10
    marks = [count * Settings.texts for count in range(every, Settings.iterations + 1, every)]
    print("share of locks that the policy opens by itself, after so many training texts")
    print(f"{'algorithm':<12}{'seed':>4}" + "".join(f"{mark:>8,}" for mark in marks))
    for name, beta in (("PPO", 0.0), ("PPO++", 0.5)):
        for seed in range(2):
            opened = train(Settings(beta=beta), seed, every)
            print(f"{name:<12}{seed:>4}" + "".join(f"{share:>8.2f}" for share in opened), flush=True)
    print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
