"""The forward pass of scoring and training: micro-batches, and logits of selected tokens.

A token is selected by its row and column. Its logits are those of the state before it.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlgf.models import padding_free
from rlgf.models.offload import on_device

MIN_ROW_FILL = 0.75  # min. shortest / longest of the padded rows in a micro-batch
MIN_PACKED_FILL = 0.5  # the same for packed rows, where only attention is padded


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch: rows that are evaluated at once, and their selected tokens.

    Each selected token occurs once. Of a causal model `decoder_ids` holds prompt and completion, up
    to the last selected token. Of an encoder–decoder `encoder_ids` holds the prompt, and
    `decoder_ids` the start token and the completion.
    """

    indices: Tensor  # int64 [rows], indices of these rows in the whole batch
    rows: Tensor  # int64 [selected], row (of these) of each selected token
    columns: Tensor  # int64 [selected], its column in the whole batch
    state_index: Tensor  # int64 [selected], index in `decoder_ids` of the token before it
    decoder_ids: Tensor  # int64 [rows, width], padded on the right
    lengths: Tensor  # int64 [rows], tokens of `decoder_ids` that are used
    encoder_ids: Tensor | None  # int64 [rows, encoder width], padded on the right
    encoder_lengths: Tensor | None  # int64 [rows]
    device: torch.device

    @property
    def token_index(self) -> tuple[Tensor, Tensor]:
        """Return the rows and columns of the selected tokens in the whole batch."""
        return self.indices[self.rows], self.columns

    @cached_property
    def packed(self) -> padding_free.PackedInputs:
        """Return the inputs as packed rows; built once for all models that use them."""
        written, read = padding_free.pack(self.decoder_ids, self.lengths, self.device), None
        if self.encoder_ids is not None and self.encoder_lengths is not None:
            read = padding_free.pack(self.encoder_ids, self.encoder_lengths, self.device)
        first = (self.lengths - 1).clamp(min=0).scatter_reduce(0, self.rows, self.state_index, "amin")
        return padding_free.PackedInputs(
            written, read, (written.starts[self.rows] + self.state_index).to(self.device), first.tolist()
        )


def micro_batches(model: Any, ids: Tensor, starts: Tensor, selected: Tensor, token_budget: int) -> Iterator[MicroBatch]:
    """Yield micro-batches as `model` needs them, for the `selected` tokens of `ids` [rows, width].

    A row without a selected token is dropped; the others are truncated after their last one.
    `starts` [rows] are the columns in which the completions begin. A causal model cannot predict
    column 0, which no token precedes.
    """
    needed = (torch.arange(1, ids.shape[1] + 1) * selected).amax(1) if ids.numel() else torch.zeros(0)
    selected_rows = needed.nonzero().squeeze(1)
    for group in group_by_length(needed[selected_rows], token_budget, padding_free.is_enabled(model)):
        members = selected_rows[group]
        width = int(needed[members].max())
        yield micro_batch(model, members, ids[members, :width], starts[members], selected[members, :width])


def micro_batch(model: Any, members: Tensor, ids: Tensor, starts: Tensor, selected: Tensor) -> MicroBatch:
    """Build a micro-batch of the rows `members` of a whole batch, as `model` needs it.

    `ids` are their tokens, [rows, width].
    """
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
    """Return whether a model is an encoder–decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def group_by_length(lengths: Tensor, token_budget: int, packed: bool) -> list[Tensor]:
    """Return row indices in groups of similar length, the longest first.

    Each group has at most `token_budget` tokens, or a single row. Packed rows (`packed`) cost
    their own tokens, padded rows as many as the longest.
    """
    min_fill = MIN_PACKED_FILL if packed else MIN_ROW_FILL
    groups: list[list[int]] = []
    used = 0
    for row in torch.argsort(lengths, descending=True, stable=True).tolist():
        longest, own = int(lengths[groups[-1][0]]) if groups else 0, int(lengths[row])
        cost = own if packed else longest
        if groups and used + cost <= token_budget and own >= min_fill * longest:
            groups[-1].append(row)
            used += cost
        else:
            groups.append([row])
            used = own
    return [torch.tensor(sorted(group)) for group in groups]


def autocast(device: torch.device, precision: str) -> Any:
    """Return an autocast context, enabled for bf16; parameters stay in fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class ForwardModel(Protocol):
    """A model for forward passes: one of several on the same weights, if these carry adapters."""

    @property
    def model(self) -> Any:
        """Return the transformers model."""
        ...

    def activate(self) -> AbstractContextManager[None]:
        """Activate this model on its shared weights within the block."""
        ...


def token_logits(reader: ForwardModel, batch: MicroBatch, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Compute the logits of the selected tokens, and the hidden states before them.

    The logits, given all tokens before, are float [selected, vocabulary]. The states,
    [selected, hidden], are the input of the model's head.
    """
    model = reader.model
    with (
        reader.activate(),
        autocast(model.device, precision),
        model_inputs(model, batch) as (inputs, pick),
        restrict_lm_head(model, pick) as hidden,
    ):
        logits = model(**inputs, use_cache=False).logits
    return logits.squeeze(0).float(), hidden[0]


def backbone_states(trunk: ForwardModel, batch: MicroBatch, precision: str = "fp32") -> Tensor:
    """Compute the hidden states before the selected tokens, [selected, hidden].

    They are the input of the model's head, if it has one.
    """
    model = trunk.model
    # in transformers the base model of T5 is T5 itself, with its head
    if is_encoder_decoder(model) and model.get_output_embeddings() is not None:
        return token_logits(trunk, batch, precision)[1]
    with trunk.activate(), autocast(model.device, precision), model_inputs(model, batch) as (inputs, pick):
        return pick(model(**inputs, use_cache=False).last_hidden_state)


def iter_logits(
    reader: ForwardModel, ids: Tensor, starts: Tensor, selected: Tensor, token_budget: int, precision: str
) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
    """Yield each micro-batch with its logits and states, without a gradient."""
    with on_device(reader.model):
        for batch in micro_batches(reader.model, ids, starts, selected, token_budget):
            with torch.no_grad():
                logits, states = token_logits(reader, batch, precision)
            yield batch, logits, states


@contextmanager
def model_inputs(model: Any, batch: MicroBatch) -> Generator[tuple[dict[str, Tensor], Callable[[Tensor], Tensor]]]:
    """Yield a model's inputs, and a function that selects from its hidden states.

    The function returns the states before the selected tokens. The inputs are a packed row if the
    model supports it, otherwise rows padded on the right.
    """
    if padding_free.is_enabled(model):
        lines = batch.packed
        inputs = {"input_ids": lines.decoder.ids, "position_ids": lines.decoder.positions}
        if lines.encoder is not None:
            inputs = {"input_ids": lines.encoder.ids, "decoder_input_ids": lines.decoder.ids}
        with padding_free.packed(model, lines):
            yield inputs, lambda hidden: padding_free.gather_unique(hidden.squeeze(0), lines.selected)
        return
    inputs, places = {"input_ids": batch.decoder_ids}, (batch.rows.to(batch.device), batch.state_index.to(batch.device))
    if batch.encoder_ids is not None and batch.encoder_lengths is not None:
        mask = (torch.arange(batch.encoder_ids.shape[1]) < batch.encoder_lengths[:, None]).long()
        inputs = {"input_ids": batch.encoder_ids, "attention_mask": mask, "decoder_input_ids": batch.decoder_ids}
    yield {name: value.to(batch.device) for name, value in inputs.items()}, lambda hidden: hidden[places]


@contextmanager
def restrict_lm_head(model: Any, pick: Callable[[Tensor], Tensor]) -> Generator[list[Tensor]]:
    """Restrict the language-model head to the states that `pick` returns, [1, states, width].

    So logits of other positions are never computed, for any model, whatever it does after its head.
    Yields a list that receives the hidden states picked, [states, width], of each forward pass.
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


def pad_rows(rows: Sequence[Sequence[int]], fill: int = 0) -> Tensor:
    """Return rows of ids as one tensor, padded on the right."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *([fill] * (width - len(row)))] for row in rows], dtype=torch.int64).view(len(rows), width)
