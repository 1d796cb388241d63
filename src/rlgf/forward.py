"""The one forward pass that scoring and training use: texts in micro-batches, and what a model makes of the tokens asked about.

Column `c` of a text is the token in column `c`; what a model says of it is what it says in the state before it.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from rlgf import packing

FILL = 0.75  # padded rows share a micro-batch while the shortest has at least this share of the longest
LINE_FILL = 0.5  # the same for texts in a line, of which attention alone sees the padding


@dataclass(frozen=True)
class MicroBatch:
    """Texts that are read at once, and the tokens that are asked about. Tokens are asked about once, and none in column 0."""

    members: Tensor  # int64 [texts], which texts of the whole these are
    ids: Tensor  # int64 [texts, width], padded on the right
    starts: Tensor  # int64 [texts], the column in which each response begins
    rows: Tensor  # int64 [asked], the text (of these) of each token asked about
    columns: Tensor  # int64 [asked]
    device: torch.device

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the tokens asked about, among the texts of the whole."""
        return self.members[self.rows], self.columns

    @cached_property
    def line(self) -> packing.Line:
        """The texts in a line; laid out once for all models that read it."""
        return packing.line_up(self.ids, self.rows, self.columns, self.device)


def micro_batches(model: Any, ids: Tensor, starts: Tensor, selected: Tensor, token_budget: int) -> Iterator[MicroBatch]:
    """Micro-batches as `model` reads them best, for the `selected` tokens of `ids` [texts, width].

    A text without a selected token is left out; the others are read up to their last one. `starts` [texts].
    """
    needed = (torch.arange(1, ids.shape[1] + 1) * selected).amax(1) if ids.numel() else torch.zeros(0)
    wanted = needed.nonzero().squeeze(1)
    for group in group_by_length(needed[wanted], token_budget, packing.is_enabled(model)):
        members = wanted[group]
        width = int(needed[members].max())
        rows, columns = selected[members, :width].nonzero(as_tuple=True)
        yield MicroBatch(members, ids[members, :width], starts[members], rows, columns, model.device)


def group_by_length(lengths: Tensor, token_budget: int, in_line: bool) -> list[Tensor]:
    """Row numbers in groups of similar length, each within the budget (or a single row), the longest first.

    Texts in a line cost their own tokens, padded rows what the longest has.
    """
    least = LINE_FILL if in_line else FILL
    groups: list[list[int]] = []
    used = 0
    for row in torch.argsort(lengths, descending=True, stable=True).tolist():
        longest, own = int(lengths[groups[-1][0]]) if groups else 0, int(lengths[row])
        cost = own if in_line else longest
        if groups and used + cost <= token_budget and own >= least * longest:
            groups[-1].append(row)
            used += cost
        else:
            groups.append([row])
            used = own
    return [torch.tensor(sorted(group)) for group in groups]


def autocast(device: torch.device, precision: str) -> Any:
    """bf16 autocast where asked for; parameters stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def token_logits(model: Any, batch: MicroBatch, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Logits of the tokens asked about given all before them, float [asked, vocabulary], and the states before them.

    The states, [asked, hidden], are what the model's head reads.
    """
    with autocast(model.device, precision), reading(model, batch) as (inputs, pick), head_positions(model, pick) as hidden:
        logits = model(**inputs, use_cache=False).logits
    return logits.squeeze(0).float(), hidden[0]


def trunk_states(trunk: Any, batch: MicroBatch, precision: str = "fp32") -> Tensor:
    """The states before the tokens asked about by a model without a head, [asked, hidden]."""
    with autocast(trunk.device, precision), reading(trunk, batch) as (inputs, pick):
        return pick(trunk(**inputs, use_cache=False).last_hidden_state)


def read_tokens(
    model: Any, ids: Tensor, starts: Tensor, selected: Tensor, token_budget: int, precision: str
) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
    """Each micro-batch with its logits and states, without a gradient."""
    for batch in micro_batches(model, ids, starts, selected, token_budget):
        with torch.no_grad():
            logits, states = token_logits(model, batch, precision)
        yield batch, logits, states


@contextmanager
def reading(model: Any, batch: MicroBatch) -> Generator[tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]]:
    """A model's inputs, and how to pick the states before the tokens asked about from what it makes of them.

    A line without padding where the model can read one, otherwise rows padded on the right.
    """
    if packing.is_enabled(model):
        line = batch.line
        with packing.packed(line), packing.last_block_on(model, line.asked):
            yield {"input_ids": line.ids, "position_ids": line.positions}, lambda hidden: packing.take(hidden[0], line.asked)
    else:  # the last token conditions nothing
        places = (batch.rows.to(batch.device), batch.columns.to(batch.device) - 1)
        yield {"input_ids": batch.ids[:, :-1].to(batch.device)}, lambda hidden: hidden[places]


@contextmanager
def head_positions(model: Any, pick: Callable[[Tensor], Tensor]) -> Generator[list[Tensor]]:
    """Within it, the language-model head sees only the hidden states that `pick` takes, as `[1, states, width]`.

    So logits of positions that nobody asks for are never computed, for any model whatever it does behind its head.
    Yields a list that receives the hidden states picked, `[states, width]`, of each forward pass.
    """
    hidden: list[Tensor] = []

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden.append(pick(arguments[0]))
        return (hidden[-1].unsqueeze(0), *arguments[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield hidden
    finally:
        handle.remove()


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> Tensor:
    """Rows of ids as one tensor, padded on the right."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *([fill] * (width - len(row)))] for row in rows], dtype=torch.int64).view(len(rows), width)
