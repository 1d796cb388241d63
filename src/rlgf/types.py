"""The basic types: origins of tokens, prompts, reward functions and sampling parameters.

All masks of the library derive from `origin` and `switch_position` of `rlgf.rl.tensors.Rollout`.
Column `c` of every `[rows, width]` tensor belongs to the token in column `c`: it holds the
log-probability of this token, and the value of the state *before* it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from rlgf.bounds import Flag, LengthOrZero, PositiveProbability, SmallInt, Temperature, check_bounds

FORMAT_VERSION = 1
"""The version of the formats of configs, checkpoints, stages and results in files."""


class Origin(IntEnum):
    """The origin of a token: padding, the prompt, the policy or the guide."""

    PAD = 0
    PROMPT = 1
    POLICY = 2
    GUIDE = 3


POLICY, GUIDE = Origin.POLICY, Origin.GUIDE


Message = Mapping[str, Any]
"""One message of a conversation: `role`, `content` and any other keys the chat template uses."""


@dataclass(frozen=True)
class Prompt:
    """A prompt: one row of a dataset, with its references and extra columns.

    - `text`: the text to continue; of a conversation, the policy's chat template applied to it.
    - `references`: the dataset's own completions.
    - `sft_targets`: the references that may be trained on (SFT, the MLE term of PPO).
    - `ids`: the prompt's tokens, if a task fixes them; otherwise `text` is encoded.
    - `columns`: other columns of the row, for rewards and metrics.
    - `messages`: the messages of a conversation.
    - `tools`: the tools that a conversation offers, as JSON schemas.
    - `template_variables`: the row's own variables of the chat template.
    - `reply_prefix`: the text that the chat template starts every reply with (for example
      `<think></think>`); it is part of the completion, so the policy generates it.

    Example:
        >>> prompt = rlgf.Prompt("2 + 2 =", references=(" 4",))
        >>> def reward(prompts, completions):
        ...     return [float(c in p.references) for p, c in zip(prompts, completions)]
        >>> reward([prompt, prompt], [" 4", " 5"])
        [1.0, 0.0]
    """

    text: str
    references: tuple[str, ...] = ()
    sft_targets: tuple[str, ...] = ()
    ids: tuple[int, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    messages: tuple[Message, ...] | None = None
    reply_prefix: str = ""
    reply_prefix_plain: str = ""  # reply_prefix decoded without special tokens
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_variables: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def strip_reply_prefix(self, text: str) -> str:
        """Return the completion `text` without the reply prefix of the chat template."""
        return text.removeprefix(self.reply_prefix if text.startswith(self.reply_prefix) else self.reply_prefix_plain)


RewardFunction = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
"""A function of (prompts, completions) that returns one number per row: a reward or a metric."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of the policy or the guide.

    The logits are divided by `temperature`, then restricted to the `top_k` most likely tokens
    (0: all), then to the smallest set of tokens whose total probability is at least `top_p`.
    `greedy` takes the most likely token, `num_beams` above 1 is beam search; both ignore the other
    parameters.

    Raises:
        ConfigError: a value is out of bounds.

    Example:
        >>> rlgf.SamplingParams(temperature=0.7, top_p=0.9).describe()
        'temperature 0.7, top-p 0.9'
        >>> rlgf.SamplingParams().describe()
        'full softmax'
    """

    temperature: Temperature = 1.0
    top_k: LengthOrZero = 0
    top_p: PositiveProbability = 1.0
    greedy: Flag = False
    num_beams: SmallInt = 1

    def __post_init__(self) -> None:
        """Raise for a number out of bounds."""
        check_bounds(self)

    @property
    def is_stochastic(self) -> bool:
        """Return whether tokens are sampled (not greedy, not beam search)."""
        return not self.greedy and self.num_beams == 1

    @property
    def restricts_support(self) -> bool:
        """Return whether top-k or top-p may exclude tokens.

        If so, a rollout stores the set of tokens each token was sampled from.
        """
        return self.top_k > 0 or self.top_p < 1.0

    def describe(self) -> str:
        """Return the parameters in a few words, for tables."""
        if self.num_beams > 1:
            return f"beam search, {self.num_beams} beams"
        if self.greedy:
            return "greedy"
        parts = [f"temperature {self.temperature:g}"] if self.temperature != 1 else []
        parts += [f"top-k {self.top_k}"] if self.top_k else []
        parts += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        return ", ".join(parts) or "full softmax"
