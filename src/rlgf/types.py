"""The nouns: who wrote a token, what a prompt carries, what was written, what was measured of it.

Every mask in the library is a positive question asked of `Rollout.origin` and `Rollout.switch` here. Column `c` of every
`[texts, width]` tensor speaks of the token in column `c`: its log-probability, and the value of the state *before* it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor


class Origin(IntEnum):
    """Who wrote a token."""

    PAD = 0
    PROMPT = 1
    POLICY = 2
    GUIDE = 3


POLICY, GUIDE = Origin.POLICY, Origin.GUIDE


Message = Mapping[str, Any]
"""One turn of a conversation: `role` and `content`, which are texts, and whatever else a chat template reads."""


@dataclass(frozen=True)
class Prompt:
    """One row of a dataset: what is to be continued, and all that is known about it.

    `ids` is set where a task fixes the exact tokens of the prompt; otherwise `text` is encoded. `references` are the
    dataset's own continuations; those that may be imitated (SFT, the MLE term) are listed in `targets`. Where the prompt is a
    conversation, `messages` are its turns, `text` what the policy's chat template makes of them, and `opening` what that puts
    before every reply, which the policy therefore writes (`<think></think>`, say).
    """

    text: str
    references: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    ids: tuple[int, ...] | None = None
    columns: Mapping[str, Any] = field(default_factory=dict[str, Any])
    messages: tuple[Message, ...] | None = None
    opening: str = ""
    opening_without_marks: str = ""  # the same as a tokenizer gives it back that leaves out special tokens

    def said(self, text: str) -> str:
        """What a text says that continues the prompt: the text without what every reply begins with."""
        return text.removeprefix(self.opening if text.startswith(self.opening) else self.opening_without_marks)


TextFunction = Callable[[Sequence[Prompt], Sequence[str]], Sequence[float]]
"""(prompts, texts that continue them) -> one number each. Rewards and metrics are such functions."""


@dataclass(frozen=True)
class Decoding:
    """How an author turns probabilities into tokens.

    Tempered first, then cut to the `top_k` most likely tokens (0: all), then to the smallest set that holds `top_p` of the
    probability. `greedy` takes the most likely token and ignores the rest, and so does beam search, which `beams` above 1 is.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    beams: int = 1

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn."""
        return not self.greedy and self.beams == 1

    @property
    def truncates(self) -> bool:
        """Whether some token may be cut off, so that a support must be kept."""
        return self.top_k > 0 or self.top_p < 1.0

    def describe(self) -> str:
        """The decoding in a few words, for tables."""
        if self.beams > 1:
            return f"beam search, {self.beams} beams"
        if self.greedy:
            return "greedy"
        parts = [f"temperature {self.temperature:g}"] if self.temperature != 1 else []
        parts += [f"top-k {self.top_k}"] if self.top_k else []
        parts += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        return ", ".join(parts) or "full softmax"


@dataclass(frozen=True)
class Support:
    """The tokens that sampling could have drawn, as ragged lists: `counts[i]` ids for the i-th token.

    `counts` has the shape of the tokens it speaks of (0 where nothing was cut off), `ids` is flat, in row-major order.
    """

    counts: Tensor  # int64, [texts, width] or [tokens]
    ids: Tensor  # int64, [counts.sum()]

    def select(self, rows: Tensor, columns: Tensor) -> "Support":
        """The supports of the tokens at `(rows[i], columns[i])`, as a support over `[len(rows)]` tokens."""
        ends = self.counts.flatten().cumsum(0).view_as(self.counts)
        counts = self.counts[rows, columns]
        starts = ends[rows, columns] - counts
        offsets = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return Support(counts, self.ids[starts.repeat_interleave(counts) + offsets])


@dataclass(frozen=True)
class Rollout:
    """A batch of texts as they were written: the tokens, their authors, and where the pen changed hands.

    Rows hold prompt, response and padding, in this order (padding on the right, so causal attention needs no mask).
    """

    prompts: Sequence[Prompt]
    texts: Sequence[str]  # the decoded responses: what is rewarded, logged and judged
    ids: Tensor  # int64 [texts, width]
    origin: Tensor  # uint8 [texts, width], of Origin
    switch: Tensor  # int64 [texts], response tokens before the rollout began
    finisher: Tensor  # uint8 [texts], POLICY or GUIDE: who rolled out, and so whose critic values the row
    phase: Tensor  # int64 [texts], which phase of the algorithm asked for it
    finished: Tensor  # bool [texts], whether the text ended with an end token (or was cut off by its budget)
    index: Tensor  # int64 [texts], the global trajectory index, on which all randomness hangs
    group: Tensor  # int64 [texts], texts of one group share a prompt
    log_probs: Tensor  # float [texts, width], of the policy's tokens under the distribution they were drawn from
    full_log_probs: Tensor  # float [texts, width], of the policy's tokens under the full, untempered distribution
    support: Support | None  # what the policy's sampling could have drawn; None where nothing is ever cut off
    minimum: int  # response tokens before which no end token may come
    counts: Mapping[str, int] = field(default_factory=dict[str, int])  # what was discarded, cut or substituted
    guide_texts: Sequence[str | None] = ()  # what a guide that writes text answered, as it wrote it; else None

    @property
    def lengths(self) -> Tensor:
        """Tokens of prompt and response, [texts]."""
        return (self.origin != Origin.PAD).sum(1)

    @property
    def prompt_lengths(self) -> Tensor:
        """Tokens of the prompt, [texts]."""
        return (self.origin == Origin.PROMPT).sum(1)

    @property
    def response_position(self) -> Tensor:
        """For every column the position `t` within the response (negative in the prompt), [texts, width]."""
        return torch.arange(self.ids.shape[1]) - self.prompt_lengths[:, None]

    @property
    def written(self) -> Tensor:
        """Which tokens the policy or the guide wrote."""
        return (self.origin == POLICY) | (self.origin == GUIDE)

    @property
    def by_policy(self) -> Tensor:
        """Which tokens the policy wrote."""
        return self.origin == POLICY

    @property
    def by_guide(self) -> Tensor:
        """Which tokens the guide wrote."""
        return self.origin == GUIDE

    @property
    def after_switch(self) -> Tensor:
        """Which tokens were written from the switch on: the states before them are what the finisher's critic learns."""
        return self.written & (self.response_position >= self.switch[:, None])

    def trained(self, credit: str) -> Tensor:
        """Which tokens the policy learns from: its own; with credit 'switch' only the last before a guide's rollout."""
        if credit != "switch":
            return self.by_policy
        at_switch = self.response_position == self.switch[:, None] - 1
        return self.by_policy & (at_switch | (self.finisher == POLICY)[:, None])


@dataclass(frozen=True)
class Experience:
    """A rollout and all that was measured of it before the first update."""

    rollout: Rollout
    credit: str  # which of the policy's tokens are trained, see `Rollout.trained`
    score: Tensor  # [texts], the task's reward as it was given
    old_log_probs: Tensor  # [texts, width], of the policy's tokens over the sampled support
    reference_log_probs: Tensor  # [texts, width], of the policy's tokens under the reference, full distribution
    kl: Tensor  # [texts, width], log-ratio of policy to reference at the policy's tokens (k1)
    values: Tensor  # [texts, width], by the finisher's critic, before the update
    returns: Tensor  # [texts, width], what that critic is fitted to
    advantages: Tensor  # [texts, width], of the trained tokens, whitened if asked for
    stats: Mapping[str, float] = field(default_factory=dict[str, float])
