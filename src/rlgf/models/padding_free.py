"""Packed forward pass: sequences of different lengths in one row without padding.

Everything in a transformer but attention works token by token, so a micro-batch is evaluated as a
single packed row of all its tokens. transformers' attention interface is the only hook: inside
`packed` the registered function unpacks the row into padded rows, attends, and packs the result
again. Outside it, it is plain SDPA. Models that do not attend through that interface, or that count
positions in their own way, are evaluated on padded rows instead.
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlgf.kernels import dispatch

ATTENTION_NAME = "rlgf"
# widths of padded rows and lengths of packed rows are multiples of this: products of odd sizes
# take twice as long, and buffers of ever new sizes fragment memory (S: 1.4 GB against 1.0)
PAD_MULTIPLE = 16
# padded rows up to this width keep their attention weights for the backward pass; wider ones
# compute them again
MAX_STORED_WIDTH = 256


@dataclass(frozen=True)
class PackedRow:
    """Sequences as one packed row of tokens, and their layout in padded rows."""

    ids: Tensor  # int64 [1, tokens]
    positions: Tensor  # int64 [1, tokens], each token's position in its sequence
    starts: Tensor  # int64 [sequences], start of each sequence in the packed row
    lengths: list[int]  # tokens of each sequence
    padded_index: Tensor  # int64 [tokens], each token's index in sequences × width
    token_index: Tensor  # int64 [sequences × width], the inverse; padding: the last token
    padding: Tensor  # int64 [padding], indices of the padding in sequences × width
    num_sequences: int  # number of sequences
    width: int  # of the padded rows
    num_skipped: list[int]  # per sequence: first tokens that attention skips (none is selected)

    @cached_property
    def causal_mask(self) -> Tensor:
        """Return −∞ for tokens after the query and 0 elsewhere, float [width, width]."""
        return torch.full((self.width, self.width), -torch.inf, device=self.ids.device).triu_(1)

    @cached_property
    def padding_mask(self) -> Tensor:
        """Return −∞ after the end of each sequence and 0 elsewhere, float [sequences, 1, width]."""
        mask = torch.zeros(self.num_sequences * self.width, device=self.ids.device)
        return mask.index_fill_(0, self.padding, -torch.inf).view(self.num_sequences, 1, self.width)

    @cached_property
    def offsets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return start, skipped tokens and all tokens of each sequence, int64 [sequences] each."""
        return self.starts, torch.tensor(self.num_skipped), torch.tensor(self.lengths)

    def unpack(self, line: Tensor) -> Tensor:
        """Unpack [heads, tokens, size] into padded rows, [heads × sequences, width, size]."""
        return line.index_select(1, self.token_index).view(-1, self.width, line.shape[2])

    def repack(self, rows: Tensor) -> Tensor:
        """Pack padded rows again, as attention returns them, [1, tokens, heads, size]."""
        return (
            rows.view(-1, self.num_sequences * self.width, rows.shape[2])
            .transpose(0, 1)
            .index_select(0, self.padded_index)[None]
        )


@dataclass(frozen=True)
class PackedInputs:
    """A model's packed inputs: the decoder's, and the encoder's if it has one."""

    decoder: PackedRow
    encoder: PackedRow | None
    selected: Tensor  # int64 [selected], tokens of `decoder` whose states are used
    num_skipped: list[int]  # per sequence of `decoder`: tokens before the first selected one

    @cached_property
    def last_block(self) -> PackedRow:
        """Return the decoder's packed row with the skipped tokens of the last block."""
        return replace(self.decoder, num_skipped=self.num_skipped)


@dataclass(frozen=True)
class _ActivePacking:
    """The packed inputs of a model, and the modules of its last block."""

    inputs: PackedInputs
    last_block: frozenset[nn.Module]


_active_packing: ContextVar[_ActivePacking | None] = ContextVar("packing", default=None)


def pack(ids: Tensor, lengths: Tensor, device: torch.device) -> PackedRow:
    """Pack the first `lengths[i]` tokens (at least one) of each row of `ids` [sequences, width]."""
    lengths = lengths.clamp(min=1)
    texts, longest = ids.shape[0], int(lengths.max())
    width = -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE
    starts = lengths.cumsum(0) - lengths
    is_token = torch.arange(width) < lengths[:, None]
    places, padding = (part.flatten().nonzero().squeeze(1) for part in (is_token, ~is_token))
    filling = -len(places) % PAD_MULTIPLE  # tokens after the last sequence, never used
    source = starts[:, None] + torch.arange(width).clamp(max=(lengths - 1)[:, None])
    return PackedRow(
        ids=torch.cat([ids[:, :longest][is_token[:, :longest]], ids[0, :1].expand(filling)])[None].to(device),
        positions=torch.cat([places % width, places.new_zeros(filling)])[None].to(device),
        starts=starts,
        lengths=lengths.tolist(),
        padded_index=torch.cat([places, padding[:1].expand(filling)]).to(device),
        token_index=source.flatten().to(device),
        padding=padding.to(device),
        num_sequences=texts,
        width=width,
        num_skipped=[0] * texts,
    )


class _GatherUnique(torch.autograd.Function):
    """Rows of a table at distinct indices; the gradient is copied back, not added."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, numbers: Tensor) -> Tensor:
        ctx.save_for_backward(numbers)
        ctx.rows = table.shape[0]
        return table.index_select(0, numbers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (numbers,) = ctx.saved_tensors
        return _scatter(gradients[0], numbers, ctx.rows), None


class _ScatterUnique(torch.autograd.Function):
    """The inverse of `_GatherUnique`: rows at distinct indices of a table of zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, numbers: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(numbers)
        return _scatter(rows, numbers, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (numbers,) = ctx.saved_tensors
        return gradients[0].index_select(0, numbers), None, None


def _scatter(rows: Tensor, numbers: Tensor, size: int) -> Tensor:
    return rows.new_zeros((size, *rows.shape[1:])).index_copy_(0, numbers, rows)


def gather_unique(table: Tensor, numbers: Tensor) -> Tensor:
    """Return `table[numbers]` for distinct indices, with a gradient that costs a copy."""
    result: Tensor = _GatherUnique.apply(table, numbers)
    return result


class _RowAttention(torch.autograd.Function):
    """Attention by batched products of all sequences as padded rows.

    It keeps its weights for the backward pass. A padding column holds the values of its sequence's
    last token and is masked for all queries; the results of padding queries are never used.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, query_rows: PackedRow,
        key_rows: PackedRow,
        scale: float,
    ) -> Tensor:  # fmt: skip
        q, k, v = query_rows.unpack(query[0]), key_rows.unpack(key[0]), key_rows.unpack(value[0])
        scores = torch.baddbmm(_additive_mask(query_rows, key_rows, causal, bias, q), q, k.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, 2, out=scores)
        ctx.save_for_backward(q, k, v, weights)
        ctx.query_rows, ctx.key_rows, ctx.scale = query_rows, key_rows, scale
        return query_rows.repack(weights @ v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        query_rows, key_rows = ctx.query_rows, ctx.key_rows
        gradient = query_rows.unpack(gradients[0][0].transpose(0, 1))
        gradient.view(-1, query_rows.num_sequences * query_rows.width, gradient.shape[2]).index_fill_(
            1, query_rows.padding, 0.0
        )
        for_scores = torch.ops.aten._softmax_backward_data(gradient @ v.transpose(1, 2), weights, 2, weights.dtype)
        for_bias = (
            for_scores.view(-1, query_rows.num_sequences, query_rows.width, key_rows.width).sum(1)
            if ctx.needs_input_grad[3]
            else None
        )
        for_scores = for_scores * ctx.scale
        row_gradients = (
            (for_scores @ k, query_rows),
            (for_scores.transpose(1, 2) @ q, key_rows),
            (weights.transpose(1, 2) @ gradient, key_rows),
        )
        return *(line.repack(rows).transpose(1, 2) for rows, line in row_gradients), for_bias, None, None, None, None


def _additive_mask(query_rows: PackedRow, key_rows: PackedRow, causal: bool, bias: Tensor | None, rows: Tensor) -> Tensor:
    """Return the mask and bias that are added to the scores of `rows`.

    `rows` is [heads × sequences, ...]; masked scores get −∞.
    """
    hidden = query_rows.causal_mask if causal else key_rows.padding_mask
    if bias is not None:
        hidden = (
            (bias[:, None] + hidden).expand(-1, query_rows.num_sequences, -1, -1).reshape(-1, query_rows.width, key_rows.width)
        )
    elif not causal:
        hidden = hidden.repeat(rows.shape[0] // query_rows.num_sequences, 1, 1)
    return hidden.to(rows.dtype)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    packing = _active_packing.get()
    if packing is None:
        return _padded_attention(module, query, key, value, attention_mask, **options)
    if attention_mask is not None:  # packed inputs have none: it is the model's own
        raise NotImplementedError(f"{type(module).__name__} has a mask of its own, which packed attention does not take")
    query_rows, key_rows, causal = _query_and_key(module, packing.inputs)
    # under autocast, rotary embeddings return fp32
    query, key = query.to(value.dtype), key.to(value.dtype)
    scale = options.get("scaling")
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    bias: Tensor | None = options.get("position_bias") if query_rows is key_rows else None
    bias = None if bias is None else bias[0]
    wide = None if bias is None else (bias.dtype, *bias.shape)
    if wide in (None, (torch.float32, query.shape[1], query_rows.width, key_rows.width)):
        read = packing.inputs.last_block if module in packing.last_block else query_rows
        offsets = (*read.offsets, key_rows.offsets[0], key_rows.offsets[2])
        fast = dispatch.packed_attention(query, key, value, bias, causal, offsets, scale)
        if fast is not None:
            return fast, None
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if query.device.type == "cpu" and max(query_rows.width, key_rows.width) <= MAX_STORED_WIDTH:
        return _RowAttention.apply(query, key, value, bias, causal, query_rows, key_rows, scale), None
    q, k, v = (line.unpack(part[0]) for part, line in ((query, query_rows), (key, key_rows), (value, key_rows)))
    whole = causal and bias is None  # needs no mask: the fastest kernel can be used
    mask = None if whole else _additive_mask(query_rows, key_rows, causal, bias, q).expand(q.shape[0], -1, -1)[None]
    rows = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scale, is_causal=whole)
    return query_rows.repack(rows[0]), None


def _padded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Compute attention of padded rows, by transformers or, for single queries, by `dispatch`.

    With a single query per row, torch's operations spend much time next to the sums.
    """
    mask = None if attention_mask is None else attention_mask[:, 0, 0]
    whole = attention_mask is None or (attention_mask.dtype == torch.bool and attention_mask.shape[1:3] == (1, 1))
    if query.shape[2] == 1 and whole and options.get("position_bias") is None:
        scale = options.get("scaling")
        fast = dispatch.decode_attention(query, key, value, mask, query.shape[3] ** -0.5 if scale is None else float(scale))
        if fast is not None:
            return fast, None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _query_and_key(module: nn.Module, lines: PackedInputs) -> tuple[PackedRow, PackedRow, bool]:
    """Return the packed rows of the query and the key, and whether attention is causal."""
    if lines.encoder is None or getattr(module, "is_causal", False):
        return lines.decoder, lines.decoder, True
    return (lines.decoder if module.is_decoder else lines.encoder), lines.encoder, False


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    return None if _active_packing.get() is not None else sdpa_mask(*arguments, **options)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _mask)


@cache
def _with_padded_bias(kind: type) -> type:
    """Return an attention class with a relative-position bias for padded rows.

    Inside `packed` its bias is that of a padded row instead of that of the packed row.
    """

    def compute_bias(self: Any, query_length: int, key_length: int, *arguments: Any, **options: Any) -> Tensor:
        packing = _active_packing.get()
        if packing is not None:
            query_length = key_length = _query_and_key(self, packing.inputs)[0].width
        return kind.compute_bias(self, query_length, key_length, *arguments, **options)  # pyright: ignore

    return type(kind.__name__, (kind,), {"compute_bias": compute_bias, "__module__": kind.__module__})


def enable(model: Any) -> Any:
    """Enable packed rows in a model that attends through transformers' interface.

    Decoders must take positions, encoder–decoders must have relative ones: either way a token's
    index in the packed row is not taken for its position in its sequence. Returns the model,
    unchanged if it is not supported.
    """
    if supports(model):
        model.set_attn_implementation(ATTENTION_NAME)
        for module in _relative(model):
            module.__class__ = _with_padded_bias(type(module))
    return model


def supports(model: Any) -> bool:
    """Return whether a model attends through transformers' interface, as far as its class says."""
    config = model.config
    able = getattr(model, "_supports_attention_backend", False) or config.is_encoder_decoder
    able = able and getattr(model, "_supports_sdpa", False) and config._attn_implementation in ("sdpa", ATTENTION_NAME)
    plain = not getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None)
    return bool(able and plain and bool(_relative(model)) == bool(config.is_encoder_decoder))


def disable(model: Any) -> None:
    """Evaluate a model on padded rows from now on."""
    model.set_attn_implementation("sdpa")


def _relative(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "compute_bias")]


def is_enabled(model: Any) -> bool:
    """Return whether a model is evaluated on packed rows."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == ATTENTION_NAME


FEED_FORWARD = ("mlp", "DenseReluDense")  # its names in transformers' models


@contextmanager
def packed(model: Any, lines: PackedInputs) -> Generator[None]:
    """Evaluate a model with packed rows enabled on `lines` within the block.

    In its last block, attention and the feed-forward module work for the selected tokens alone: no
    later token uses the results for the others, because only the head follows, and it is restricted
    to the selected ones.
    """
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    block = lists[0][-1] if len(lists) == 1 and len(lists[0]) else nn.Identity()
    parts = [module for name, module in block.named_modules() if name.split(".")[-1] in FEED_FORWARD]

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        sizes.append(arguments[0].shape[1])
        return (gather_unique(arguments[0].squeeze(0), lines.selected)[None], *arguments[1:])

    def spread(module: nn.Module, arguments: Any, output: Any) -> Any:
        laid: Tensor = _ScatterUnique.apply(output.squeeze(0), lines.selected, sizes.pop())
        return laid[None]

    sizes: list[int] = []
    handles: list[Any] = []
    if len(parts) == 1:
        handles = [parts[0].register_forward_pre_hook(select), parts[0].register_forward_hook(spread)]
    token = _active_packing.set(_ActivePacking(lines, frozenset(block.modules())))
    try:
        yield
    finally:
        _active_packing.reset(token)
        for handle in handles:
            handle.remove()
