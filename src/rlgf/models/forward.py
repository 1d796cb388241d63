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
from rlgf.models.configs import decoder_opening
from rlgf.models.offload import on_device

MIN_ROW_FILL = 0.75  # min. shortest / longest of the padded rows in a micro-batch
MIN_PACKED_FILL = 0.5  # the same for packed rows, where only attention is padded


@dataclass(frozen=True)
class InputFormat:
    """The inputs that a model evaluates correctly, found when it is loaded (`input_probe`)."""

    rows: str = "padded"  # evaluated together: "packed", "padded", rows of "equal" length, or a "single" one
    first_position: int = 0  # of position embeddings that count from the padding's; 0: the model's own
    as_embeddings: bool = False  # word embeddings instead of ids, on which its positions depend
    takes_use_cache: bool = True  # whether the forward pass has the argument `use_cache`
    restricts_head: bool = True  # whether the head works on selected states alone


def input_format(model: Any) -> InputFormat:
    """Return the format of a model's inputs."""
    known = getattr(model, "_rlgf_input_format", None)
    return known or InputFormat("packed" if padding_free.is_enabled(model) else "padded")


def cache_options(model: Any, use_cache: bool) -> dict[str, bool]:
    """Return the argument `use_cache` if the model's forward pass has it."""
    return {"use_cache": use_cache} if input_format(model).takes_use_cache else {}


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
        decoder_rows, encoder_rows = padding_free.pack(self.decoder_ids, self.lengths, self.device), None
        if self.encoder_ids is not None and self.encoder_lengths is not None:
            encoder_rows = padding_free.pack(self.encoder_ids, self.encoder_lengths, self.device)
        first = (self.lengths - 1).clamp(min=0).scatter_reduce(0, self.rows, self.state_index, "amin")
        return padding_free.PackedInputs(
            decoder_rows, encoder_rows, (decoder_rows.starts[self.rows] + self.state_index).to(self.device), first.tolist()
        )


def micro_batches(model: Any, ids: Tensor, starts: Tensor, selected: Tensor, token_budget: int) -> Iterator[MicroBatch]:
    """Yield micro-batches as `model` needs them, for the `selected` tokens of `ids` [rows, width].

    A row without a selected token is dropped; the others are truncated after their last one.
    `starts` [rows] are the columns in which the completions begin. A causal model cannot predict
    column 0, which no token precedes.
    """
    needed = (torch.arange(1, ids.shape[1] + 1) * selected).amax(1) if ids.numel() else torch.zeros(0)
    selected_rows = needed.nonzero().squeeze(1)
    sources = starts[selected_rows] if is_encoder_decoder(model) else None
    for group in group_rows(input_format(model).rows, needed[selected_rows], sources, token_budget):
        indices = selected_rows[group]
        width = int(needed[indices].max())
        yield micro_batch(model, indices, ids[indices, :width], starts[indices], selected[indices, :width])


def micro_batch(model: Any, indices: Tensor, ids: Tensor, starts: Tensor, selected: Tensor) -> MicroBatch:
    """Build a micro-batch of the rows `indices` of a whole batch, as `model` needs it.

    `ids` are their tokens, [rows, width].
    """
    rows, columns = selected.nonzero(as_tuple=True)
    decoder_ids, state_index, encoder_ids, encoder_lengths = ids[:, :-1], columns - 1, None, None
    if is_encoder_decoder(model):
        opening = decoder_opening(model)
        state_index = columns - starts[rows] + len(opening) - 1
        encoder_ids, encoder_lengths = ids[:, : int(starts.max())], starts
        following = starts[:, None] - len(opening) + torch.arange(int(state_index.max()) + 1)
        decoder_ids = ids.gather(1, following.clamp(0, ids.shape[1] - 1))
        decoder_ids[:, : len(opening)] = torch.tensor(opening)
    lengths = torch.zeros(len(ids), dtype=torch.int64).scatter_reduce_(0, rows, state_index + 1, "amax")
    return MicroBatch(indices, rows, columns, state_index, decoder_ids, lengths, encoder_ids, encoder_lengths, model.device)


def is_encoder_decoder(model: Any) -> bool:
    """Return whether a model is an encoder–decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def group_rows(rows: str, lengths: Tensor, sources: Tensor | None, token_budget: int) -> list[Tensor]:
    """Return row indices in groups that a model evaluates together, the longest first.

    Args:
        rows: which rows that are, as in `InputFormat`.
        lengths: tokens of each row.
        sources: tokens of each row's source, if the model has an encoder.
        token_budget: tokens of a group, which may be exceeded by a single row.
    """
    if rows in ("packed", "padded"):
        return group_by_length(lengths, token_budget, rows == "packed")
    alike: dict[tuple[int, int], list[int]] = {}
    for row, length in enumerate(lengths.tolist()):
        alike.setdefault((length, 0 if sources is None else int(sources[row])), []).append(row)
    groups: list[Tensor] = []
    for (length, _), members in sorted(alike.items(), reverse=True):
        size = 1 if rows == "single" else max(1, token_budget // max(1, length))
        groups += [torch.tensor(members[start : start + size]) for start in range(0, len(members), size)]
    return groups


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
    """A model for forward passes; with adapters, one of several on the same weights."""

    @property
    def model(self) -> Any:
        """Return the transformers model."""
        ...

    @property
    def absent_ids(self) -> Tensor | None:
        """Return the ids that are left out of the softmax, or None."""
        ...

    def activate(self) -> AbstractContextManager[None]:
        """Activate this model on its shared weights within the block."""
        ...


def token_logits(forward_model: ForwardModel, batch: MicroBatch, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Compute the logits of the selected tokens, and the hidden states before them.

    The logits, given all tokens before, are float [selected, vocabulary]. The states,
    [selected, hidden], are the input of the model's head.
    """
    model, options = forward_model.model, cache_options(forward_model.model, False)
    with forward_model.activate(), autocast(model.device, precision), model_inputs(model, batch) as (inputs, pick):
        if input_format(model).restricts_head:
            with restrict_lm_head(model, pick) as hidden:
                logits, states = model(**inputs, **options).logits.squeeze(0), hidden[0]
        else:
            output = model(**inputs, **options, output_hidden_states=True)
            logits, states = pick(output.logits), pick(last_states(output))
    return without_ids(logits.float(), forward_model.absent_ids), states


def last_states(output: Any) -> Tensor:
    """Return the hidden states of the last layer in a model's output."""
    found = getattr(output, "decoder_hidden_states", None)
    return (output.hidden_states if found is None else found)[-1]


def without_ids(logits: Tensor, absent: Tensor | None) -> Tensor:
    """Return `logits` [tokens, vocabulary] with −∞ at the absent ids; unchanged without any."""
    if absent is None:
        return logits
    absent = absent.to(logits.device)
    if torch.is_grad_enabled() and logits.requires_grad:
        return logits.index_fill(1, absent, -torch.inf)
    return logits.index_fill_(1, absent, -torch.inf)


def backbone_states(backbone: ForwardModel, batch: MicroBatch, precision: str = "fp32") -> Tensor:
    """Compute the hidden states before the selected tokens, [selected, hidden].

    They are the input of the model's head, if it has one.
    """
    model = backbone.model
    # in transformers the base model of T5 is T5 itself, with its head
    if is_encoder_decoder(model) and model.get_output_embeddings() is not None:
        return token_logits(backbone, batch, precision)[1]
    with backbone.activate(), autocast(model.device, precision), model_inputs(model, batch) as (inputs, pick):
        return pick(model(**inputs, **cache_options(model, False)).last_hidden_state)


def iter_logits(
    forward_model: ForwardModel, ids: Tensor, starts: Tensor, selected: Tensor, token_budget: int, precision: str
) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
    """Yield each micro-batch with its logits and states, without a gradient."""
    with on_device(forward_model.model):
        for batch in micro_batches(forward_model.model, ids, starts, selected, token_budget):
            with torch.no_grad():
                logits, states = token_logits(forward_model, batch, precision)
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
    inputs = {name: value.to(batch.device) for name, value in inputs.items()}
    yield adapt_inputs(model, inputs), lambda hidden: hidden[places]


def adapt_inputs(model: Any, inputs: dict[str, Any], past: int = 0) -> dict[str, Any]:
    """Return inputs of a model in the format that it evaluates correctly.

    Args:
        model: a transformers model.
        inputs: its inputs, with token ids.
        past: tokens before these, which are in a cache.
    """
    wanted = input_format(model)
    if wanted.first_position and "input_ids" in inputs and not is_encoder_decoder(model):
        ids = inputs["input_ids"]
        columns = torch.arange(ids.shape[1], device=ids.device) + wanted.first_position + past
        inputs = {**inputs, "position_ids": columns.expand(len(ids), -1)}
    if not wanted.as_embeddings:
        return inputs
    parts = {"input_ids": model, "decoder_input_ids": model}
    if is_encoder_decoder(model):
        parts = {"input_ids": model.get_encoder(), "decoder_input_ids": model.get_decoder()}
    return {
        name.replace("input_ids", "inputs_embeds"): parts[name].get_input_embeddings()(value) if name in parts else value
        for name, value in inputs.items()
    }


def head_width(forward_model: ForwardModel) -> int:
    """Return the width of the states that `token_logits` computes."""
    if input_format(forward_model.model).restricts_head:
        head = forward_model.model.get_output_embeddings()
        return int(getattr(head, "in_features", 0) or head.weight.shape[1])
    with torch.no_grad():
        return int(token_logits(forward_model, _shortest_batch(forward_model.model))[1].shape[1])


def _shortest_batch(model: Any) -> MicroBatch:
    """Return a micro-batch of one text of one token."""
    pair, one = torch.zeros((1, 2), dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    return micro_batch(model, torch.arange(1), pair, one, torch.tensor([[False, True]]))


def state_width(backbone: ForwardModel) -> int:
    """Return the width of the states that `backbone_states` computes, from a text of one token."""
    with torch.no_grad():
        return int(backbone_states(backbone, _shortest_batch(backbone.model)).shape[1])


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
