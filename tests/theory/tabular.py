"""Test doubles with a table where a language model has weights, small enough to enumerate.

A `Game` is a deterministic automaton over tokens: a trie, with one state for every unfinished text, or any other,
such as the combination lock's. `TabularModel` is a causal model in all that `rlgf` asks of one: its hidden state is the
number of the automaton's state, its head a table of logits.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from rlgf.algorithms.base import Algorithm
from rlgf.config.schema import Config
from rlgf.config.sections import CriticConfig, EvaluationConfig, KLConfig, PPOConfig, TaskConfig
from rlgf.guides.local import ModelGuide
from rlgf.models.forward import MicroBatch
from rlgf.models.language_model import Backbone, LanguageModel
from rlgf.rl.experience import Models
from rlgf.tasks.base import Task
from rlgf.trainer import Components, Trainer
from rlgf.types import Prompt, SamplingParams

LETTERS = "abcdefgh"
State = int
Text = tuple[int, ...]


@dataclass(frozen=True)
class Game:
    """A token MDP: `transitions[state, token]` is the next state, 0 the first; `reward` reads finished texts.

    The last row of `transitions` is the end, which no one leaves and in which nothing is asked; its last column is the
    prompt token, which changes nothing. The tokens are letters and, last, the end token; it is always forbidden where the
    minimum is the horizon, so that all texts have the same length.
    """

    letters: int
    horizon: int
    reward: Callable[[str], float]
    transitions: Tensor
    minimum: int

    @property
    def states(self) -> int:
        """States in which a token is chosen."""
        return self.transitions.shape[0] - 1

    @property
    def end_id(self) -> int:
        """The token that ends a text."""
        return self.letters

    @property
    def vocabulary(self) -> int:
        """Tokens that can be written."""
        return self.letters + 1

    @property
    def prompt_id(self) -> int:
        """The token of which prompts are made; it is never written."""
        return self.letters + 1

    def text(self, tokens: Sequence[int]) -> str:
        """Tokens as letters, end and prompt tokens left out."""
        return "".join(LETTERS[token] for token in tokens if token < self.letters)

    def payoff(self, tokens: Sequence[int]) -> float:
        """Return the reward of finished tokens."""
        return self.reward(self.text(tokens))

    def is_over(self, tokens: Sequence[int]) -> bool:
        """Return whether these tokens are a complete sequence."""
        return len(tokens) == self.horizon or (bool(tokens) and tokens[-1] == self.end_id)

    def state(self, tokens: Sequence[int]) -> State:
        """The state after these tokens."""
        state = 0
        for token in tokens:
            state = int(self.transitions[state, token])
        return state


def tree(letters: int, horizon: int, reward: Callable[[str], float], minimum: int) -> Game:
    """One state for every unfinished text."""
    layers: list[list[Text]] = [[()]]
    for _ in range(horizon - 1):
        layers.append([(*text, token) for text in layers[-1] for token in range(letters)])
    numbers = {text: number for number, text in enumerate(text for layer in layers for text in layer)}
    end = len(numbers)
    transitions = torch.full((end + 1, letters + 2), end)
    for text, number in numbers.items():
        for token in range(letters):
            transitions[number, token] = numbers.get((*text, token), end)
    transitions[0, -1] = 0
    return Game(letters, horizon, reward, transitions, minimum)


def lock(length: int, letters: int = 4) -> tuple[Game, Text]:
    """The combination lock and its key: reward 1 for the whole key alone.

    States 0 … length−1 lie on the key; from `length` on there is one for every position off it.
    """
    key = tuple((3 * position + 1) % letters for position in range(length))
    end = 2 * length - 1
    transitions = torch.full((end + 1, letters + 2), end)
    for position in range(length - 1):
        off_key = length + position  # the state off the key at the next position
        transitions[position, :letters] = off_key
        transitions[position, key[position]] = position + 1
        if position:
            transitions[off_key - 1, :letters] = off_key
    transitions[0, -1] = 0
    opened = "".join(LETTERS[token] for token in key)
    return Game(letters, length, lambda text: float(text == opened), transitions, length), key


class TabularTokenizer:
    """Letters for tokens."""

    def __init__(self, game: Game) -> None:
        self.game, self.eos_token_id = game, game.end_id

    def __len__(self) -> int:
        return self.game.vocabulary

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(letter) for letter in text]}

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return self.game.text(ids)

    def batch_decode(self, rows: Sequence[Sequence[int]], **options: Any) -> list[str]:
        return [self.game.text(ids) for ids in rows]


class TabularHead(nn.Module):
    """From state numbers `[..., 1]` to their rows of the table."""

    in_features = 1

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(logits.float().clone())

    def forward(self, hidden: Tensor) -> Tensor:
        return self.table[hidden.squeeze(-1).long()]


class TabularModel(nn.Module):
    """A causal language model whose weights are a row of logits for every state of a game.

    With a cache its keys are the tokens read so far, so that a decoding step sees the whole prefix; what the attention mask
    hides is skipped, and positions that disagree with the mask are an error.
    """

    def __init__(self, game: Game, logits: Tensor) -> None:
        super().__init__()
        self.transitions = game.transitions
        self.head = TabularHead(logits)
        self.config = SimpleNamespace(
            num_hidden_layers=1, vocab_size=game.vocabulary, max_position_embeddings=game.horizon + 8
        )  # fmt: skip
        self.generation_config = SimpleNamespace(eos_token_id=game.end_id)

    @property
    def device(self) -> torch.device:
        return self.head.table.device

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        past_key_values: Any = None, use_cache: bool = False,
    ) -> SimpleNamespace:  # fmt: skip
        seen = input_ids
        if use_cache:
            keys = input_ids[:, None, :, None].float()
            seen = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0].long()
        if position_ids is not None:
            visible = torch.ones_like(seen) if attention_mask is None else attention_mask
            expected = (visible.cumsum(1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
            assert torch.equal(position_ids, expected), "position_ids disagree with the attention mask"
        states = walk(self.transitions, seen, attention_mask)[:, -input_ids.shape[1] :]
        return SimpleNamespace(logits=self.head(states[..., None].float()))


def walk(transitions: Tensor, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The state after each token, [rows, columns]; hidden tokens change nothing."""
    state = torch.zeros(len(ids), dtype=torch.int64)
    states: list[Tensor] = []
    for column in range(ids.shape[1]):
        following = transitions[state, ids[:, column]]
        state = following if mask is None else torch.where(mask[:, column].bool(), following, state)
        states.append(state)
    return torch.stack(states, 1)


class TabularCritic(nn.Module):
    """A value for every state of a game; exact where `values` are and its learning rate is 0."""

    backbone = Backbone(SimpleNamespace(device=torch.device("cpu")))  # not None: it does not read the policy's hidden states

    def __init__(self, game: Game, values: Tensor | None = None) -> None:
        super().__init__()
        self.transitions = game.transitions
        self.table = nn.Parameter(torch.zeros(game.states) if values is None else values.float().clone())

    def forward(self, batch: MicroBatch, precision: str, hidden: Tensor | None = None) -> Tensor:
        return self.table[walk(self.transitions, batch.decoder_ids)[batch.rows, batch.state_index]]

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.parameters())

    def trainable_state(self) -> dict[str, Any]:
        return self.state_dict()

    def load_trainable_state(self, values: dict[str, Any]) -> None:
        self.load_state_dict(values)


def language_model(game: Game, logits: Tensor) -> LanguageModel:
    """A table as the library takes a policy, a reference or a guide."""
    model, tokenizer = TabularModel(game, logits), TabularTokenizer(game)
    return LanguageModel(model, tokenizer, (game.end_id,), game.horizon + 8, game.vocabulary)


@dataclass
class Play:
    """A game, a trainer of the library that plays it, and the gradients that reached the policy."""

    game: Game
    trainer: Trainer
    gradients: list[Tensor] = field(default_factory=list[Tensor])

    @property
    def table(self) -> Tensor:
        """The policy's logits."""
        return self.trainer.components.models.policy.model.head.table.detach()

    def value(self) -> float:
        """Return the exact value of the policy."""
        return float(values(self.game, self.table)[0])


def play(
    game: Game, algorithm: Algorithm, policy: Tensor, guide: Tensor, ppo: PPOConfig, seed: int = 0,
    critics: dict[Any, Tensor] | None = None, critic: CriticConfig | None = None, kl: float = 0.0,
    reference: Tensor | None = None, prompt_lengths: Sequence[int] = (1,), sampling: SamplingParams | None = None,
) -> Play:  # fmt: skip
    """A trainer for `game`; `critics` gives the tables with which V^π and V^g begin (zeros otherwise)."""
    prompts = [Prompt("", ids=(game.prompt_id,) * length) for length in prompt_lengths]

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
        return [game.reward(text) for text in texts]

    config = Config(
        seed=seed,
        task=TaskConfig(max_new_tokens=game.horizon, min_new_tokens=game.minimum),
        ppo=ppo,
        kl=KLConfig(coefficient=kl),
        critic=critic or CriticConfig(learning_rate=0.1, value_clip=None),
        sampling=sampling or SamplingParams(),
        evaluation=EvaluationConfig(output_perplexity=False),
    )
    tables = {origin: TabularCritic(game, (critics or {}).get(origin)) for origin in algorithm.critics}
    models = Models(
        language_model(game, policy),
        language_model(game, policy if reference is None else reference).frozen_copy(),
        tables,  # type: ignore[arg-type]
    )
    writer = ModelGuide(language_model(game, guide).frozen_copy(), SamplingParams())
    task = Task("tabular", prompts, [], [], reward)
    played = Play(game, Trainer(Components(config.trainer, algorithm, task, reward, models, writer, [], None)))
    models.policy.model.head.table.register_hook(played.gradients.append)
    return played


def probabilities(game: Game, logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """The distribution of the next token, no end token before the minimum; float64."""
    row = logits[game.state(tokens)].double().clone()
    if len(tokens) < game.minimum:
        row[game.end_id] = -math.inf
    return row.softmax(0)


def completions(game: Game, logits: Tensor, prefix: Text = ()) -> Iterator[tuple[Text, float]]:
    """Every finished text that begins with `prefix`, and its probability given that."""
    if game.is_over(prefix):
        yield prefix, 1.0
        return
    for token, chance in enumerate(probabilities(game, logits, prefix).tolist()):
        if chance:
            for text, rest in completions(game, logits, (*prefix, token)):
                yield text, chance * rest


def values(game: Game, logits: Tensor, gamma: float = 1.0, penalty: Tensor | None = None) -> Tensor:
    """The exact value of every state that can be reached; `penalty[state, token]` is paid for each token."""
    table = torch.zeros(game.states, dtype=torch.float64)
    known: set[State] = set()

    def value(tokens: Text) -> float:
        state = game.state(tokens)
        if state not in known:
            chances = probabilities(game, logits, tokens)
            total = 0.0
            for token in chances.nonzero().flatten().tolist():
                after = (*tokens, token)
                worth = game.payoff(after) if game.is_over(after) else gamma * value(after)
                total += float(chances[token]) * (worth - (0.0 if penalty is None else float(penalty[state, token])))
            table[state] = total
            known.add(state)
        return float(table[state])

    value(())
    return table


LEARNING = PPOConfig(
    iterations=10**6, completions_per_iteration=64, minibatch_size=64, epochs=4, learning_rate=0.1, check_first_ratio=True
)


def sure_guide(game: Game, key: Sequence[int], probability: float) -> Tensor:
    """Logits of a guide that plays each token of the key with this probability, and anything off it."""
    logits = torch.zeros(game.states, game.vocabulary)
    for position, token in enumerate(key):
        logits[position, token] = math.log(probability / ((1 - probability) / (game.letters - 1)))
    return logits


def solve_lock(
    length: int, algorithm: Algorithm, seed: int, cap: int, ppo: PPOConfig = LEARNING, probability: float = 0.9
) -> tuple[int | None, Play]:  # fmt: skip
    """Texts that a uniform policy needs until its exact value on the lock is .9; None where `cap` is not enough."""
    game, key = lock(length)
    start = torch.zeros(game.states, game.vocabulary)
    played = play(game, algorithm, start, sure_guide(game, key, probability), ppo, seed)
    for iteration in range(cap // ppo.completions_per_iteration):
        played.trainer.step(iteration)
        on_key = played.table[:length, : game.letters].softmax(1)[torch.arange(length), list(key)]
        if float(on_key.prod()) >= 0.9:
            return (iteration + 1) * ppo.completions_per_iteration, played
    return None, played
