"""The one forward pass that scoring and training use: texts in micro-batches, and what a model makes of the tokens asked about.

Column `c` of a text is the token in column `c`; what a model says of it is what it says in the state before it.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlgf import packing
from rlgf.offload import awake

FILL = 0.75  # padded rows share a micro-batch while the shortest has at least this share of the longest
LINE_FILL = 0.5  # the same for texts in a line, of which attention alone sees the padding


@dataclass(frozen=True)
class MicroBatch:
    """Texts that are read at once, and the tokens that are asked about, each once.

    `written` holds what a causal model reads: prompt and response, as far as something is asked. An encoder–decoder reads the
    prompt as `source`, and the start token and the response as `written`.
    """

    members: Tensor  # int64 [texts], which texts of the whole these are
    rows: Tensor  # int64 [asked], the text (of these) of each token asked about
    columns: Tensor  # int64 [asked], where it stands in its row of the whole
    states: Tensor  # int64 [asked], after which token of `written` it is asked for
    written: Tensor  # int64 [texts, width], padded on the right
    lengths: Tensor  # int64 [texts], tokens of `written` that count
    source: Tensor | None  # int64 [texts, source width], padded on the right
    source_lengths: Tensor | None  # int64 [texts]
    device: torch.device

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of the tokens asked about, among the texts of the whole."""
        return self.members[self.rows], self.columns

    @cached_property
    def lines(self) -> packing.Lines:
        """The texts in lines; laid out once for all models that read them."""
        written, read = packing.line_up(self.written, self.lengths, self.device), None
        if self.source is not None and self.source_lengths is not None:
            read = packing.line_up(self.source, self.source_lengths, self.device)
        first = (self.lengths - 1).clamp(min=0).scatter_reduce(0, self.rows, self.states, "amin")
        return packing.Lines(written, read, (written.starts[self.rows] + self.states).to(self.device), first.tolist())


def micro_batches(model: Any, ids: Tensor, starts: Tensor, selected: Tensor, token_budget: int) -> Iterator[MicroBatch]:
    """Micro-batches as `model` reads them best, for the `selected` tokens of `ids` [texts, width].

    A text without a selected token is left out; the others are read up to their last one. `starts` [texts] are the columns in
    which the responses begin. A causal model can't be asked for column 0, which nothing stands before.
    """
    needed = (torch.arange(1, ids.shape[1] + 1) * selected).amax(1) if ids.numel() else torch.zeros(0)
    wanted = needed.nonzero().squeeze(1)
    for group in group_by_length(needed[wanted], token_budget, packing.is_enabled(model)):
        members = wanted[group]
        width = int(needed[members].max())
        yield micro_batch(model, members, ids[members, :width], starts[members], selected[members, :width])


def micro_batch(model: Any, members: Tensor, ids: Tensor, starts: Tensor, selected: Tensor) -> MicroBatch:
    """The texts `members` of a whole, their tokens `ids` [texts, width], as `model` reads them."""
    rows, columns = selected.nonzero(as_tuple=True)
    written, states, source, lengths = ids[:, :-1], columns - 1, None, None
    if is_encoder_decoder(model):
        states, source, lengths = columns - starts[rows], ids[:, : int(starts.max())], starts
        following = starts[:, None] - 1 + torch.arange(int(states.max()) + 1)
        written = ids.gather(1, following.clamp(0, ids.shape[1] - 1))
        written[:, 0] = model.config.decoder_start_token_id
    read = torch.zeros(len(ids), dtype=torch.int64).scatter_reduce_(0, rows, states + 1, "amax")
    return MicroBatch(members, rows, columns, states, written, read, source, lengths, model.device)


def is_encoder_decoder(model: Any) -> bool:
    """Whether a model reads the prompt with an encoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


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


class Reader(Protocol):
    """A model that reads: one of several on the same weights, where these carry adapters."""

    @property
    def model(self) -> Any:
        """The transformers model."""
        ...

    def active(self) -> AbstractContextManager[None]:
        """Within it the model reads as this one of them."""
        ...


def token_logits(reader: Reader, batch: MicroBatch, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Logits of the tokens asked about given all before them, float [asked, vocabulary], and the states before them.

    The states, [asked, hidden], are what the model's head reads.
    """
    model = reader.model
    with (
        reader.active(),
        autocast(model.device, precision),
        reading(model, batch) as (inputs, pick),
        head_positions(model, pick) as hidden,
    ):
        logits = model(**inputs, use_cache=False).logits
    return logits.squeeze(0).float(), hidden[0]


def trunk_states(trunk: Reader, batch: MicroBatch, precision: str = "fp32") -> Tensor:
    """The states before the tokens asked about, [asked, hidden], as the model's head reads them, where it has one."""
    model = trunk.model
    if is_encoder_decoder(model) and model.get_output_embeddings() is not None:  # T5's trunk is T5 itself, to transformers
        return token_logits(trunk, batch, precision)[1]
    with trunk.active(), autocast(model.device, precision), reading(model, batch) as (inputs, pick):
        return pick(model(**inputs, use_cache=False).last_hidden_state)


def read_tokens(
    reader: Reader, ids: Tensor, starts: Tensor, selected: Tensor, token_budget: int, precision: str
) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
    """Each micro-batch with its logits and states, without a gradient."""
    with awake(reader.model):
        for batch in micro_batches(reader.model, ids, starts, selected, token_budget):
            with torch.no_grad():
                logits, states = token_logits(reader, batch, precision)
            yield batch, logits, states


@contextmanager
def reading(model: Any, batch: MicroBatch) -> Generator[tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]]:
    """A model's inputs, and how to pick the states before the tokens asked about from what it makes of them.

    A line without padding where the model can read one, otherwise rows padded on the right.
    """
    if packing.is_enabled(model):
        lines = batch.lines
        inputs = {"input_ids": lines.written.ids, "position_ids": lines.written.positions}
        if lines.read is not None:
            inputs = {"input_ids": lines.read.ids, "decoder_input_ids": lines.written.ids}
        with packing.packed(model, lines):
            yield inputs, lambda hidden: packing.take(hidden.squeeze(0), lines.asked)
        return
    inputs, places = {"input_ids": batch.written}, (batch.rows.to(batch.device), batch.states.to(batch.device))
    if batch.source is not None and batch.source_lengths is not None:
        mask = (torch.arange(batch.source.shape[1]) < batch.source_lengths[:, None]).long()
        inputs = {"input_ids": batch.source, "attention_mask": mask, "decoder_input_ids": batch.written}
    yield {name: value.to(batch.device) for name, value in inputs.items()}, lambda hidden: hidden[places]


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
