"""Texts of different lengths in one line without padding; only attention sees them as rows again.

Everything in a transformer but attention works token by token, so a micro-batch is read as a single row of all its tokens.
transformers' attention interface is the one seam: inside `packed` the registered function lays the line out as rows, attends,
and lines the result up again. Outside it, it is plain SDPA. Models that do not attend through that interface, or that count
positions in a way of their own, are read as padded rows instead.
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

from rlgf.kernels import native

NAME = "rlgf"
ROUND = 16  # rows are as wide, and lines as long, as a multiple of this: products of odd sizes take twice as long, and
# buffers of ever new sizes leave holes in memory (S: 1.4 GB against 1.0)
LONGEST = 256  # rows up to this width keep their attention weights for the backward pass; wider ones compute them again


@dataclass(frozen=True)
class Line:
    """Texts as one line of tokens, and how they lie in rows."""

    ids: Tensor  # int64 [1, tokens]
    positions: Tensor  # int64 [1, tokens], each token's place within its text
    starts: Tensor  # int64 [texts], where in the line each text begins
    lengths: list[int]  # the tokens of each text
    places: Tensor  # int64 [tokens], where each token stands among texts × width
    source: Tensor  # int64 [texts × width], which token of the line each place of a row reads; padding reads the text's last
    padding: Tensor  # int64 [padding], the places of rows behind their texts
    texts: int
    width: int
    idle: list[int]  # of each text the first tokens, in whose states nothing is asked; attention makes nothing of these

    @cached_property
    def ahead(self) -> Tensor:
        """−∞ where a token would look ahead, float [width, width]."""
        return torch.full((self.width, self.width), -torch.inf, device=self.ids.device).triu_(1)

    @cached_property
    def beyond(self) -> Tensor:
        """−∞ behind the end of each text, float [texts, 1, width]."""
        mask = torch.zeros(self.texts * self.width, device=self.ids.device)
        return mask.index_fill_(0, self.padding, -torch.inf).view(self.texts, 1, self.width)

    @cached_property
    def spans(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of each text where it begins, its idle tokens and all its tokens, int64 [texts] each."""
        return self.starts, torch.tensor(self.idle), torch.tensor(self.lengths)

    def rows_of(self, line: Tensor) -> Tensor:
        """A line [heads, tokens, size] as rows [heads × texts, width, size]."""
        return line.index_select(1, self.source).view(-1, self.width, line.shape[2])

    def line_of_rows(self, rows: Tensor) -> Tensor:
        """The inverse, as attention returns it, [1, tokens, heads, size]."""
        return rows.view(-1, self.texts * self.width, rows.shape[2]).transpose(0, 1).index_select(0, self.places)[None]


@dataclass(frozen=True)
class Lines:
    """What a model reads: what was written so far, and, where it has an encoder, what that reads."""

    written: Line
    read: Line | None
    asked: Tensor  # int64 [asked], the tokens of the written line in whose states something is asked for
    idle: list[int]  # of each written text the tokens before the first of these

    @cached_property
    def last(self) -> Line:
        """The written line as the last block has to work at it."""
        return replace(self.written, idle=self.idle)


@dataclass(frozen=True)
class _Reading:
    """Lines that a model is reading, and the parts of its last block."""

    lines: Lines
    last: frozenset[nn.Module]


_reading: ContextVar[_Reading | None] = ContextVar("reading", default=None)


def line_up(ids: Tensor, lengths: Tensor, device: torch.device) -> Line:
    """The first `lengths[i]` tokens (at least one) of each row of `ids` [texts, width] as a line."""
    lengths = lengths.clamp(min=1)
    texts, longest = ids.shape[0], int(lengths.max())
    width = -(-longest // ROUND) * ROUND
    starts = lengths.cumsum(0) - lengths
    within = torch.arange(width) < lengths[:, None]
    places, padding = (part.flatten().nonzero().squeeze(1) for part in (within, ~within))
    filling = -len(places) % ROUND  # tokens behind the last text; they stand where nothing is read
    source = starts[:, None] + torch.arange(width).clamp(max=(lengths - 1)[:, None])
    return Line(
        ids=torch.cat([ids[:, :longest][within[:, :longest]], ids[0, :1].expand(filling)])[None].to(device),
        positions=torch.cat([places % width, places.new_zeros(filling)])[None].to(device),
        starts=starts,
        lengths=lengths.tolist(),
        places=torch.cat([places, padding[:1].expand(filling)]).to(device),
        source=source.flatten().to(device),
        padding=padding.to(device),
        texts=texts,
        width=width,
        idle=[0] * texts,
    )


class _Take(torch.autograd.Function):
    """Rows of a table by distinct numbers; the gradient is laid back by copying, not by adding."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, numbers: Tensor) -> Tensor:
        ctx.save_for_backward(numbers)
        ctx.rows = table.shape[0]
        return table.index_select(0, numbers)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (numbers,) = ctx.saved_tensors
        return _lay(gradients[0], numbers, ctx.rows), None


class _Lay(torch.autograd.Function):
    """The inverse of `_Take`: rows laid at distinct numbers of a table that is zero elsewhere."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, numbers: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(numbers)
        return _lay(rows, numbers, size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (numbers,) = ctx.saved_tensors
        return gradients[0].index_select(0, numbers), None, None


def _lay(rows: Tensor, numbers: Tensor, size: int) -> Tensor:
    return rows.new_zeros((size, *rows.shape[1:])).index_copy_(0, numbers, rows)


def take(table: Tensor, numbers: Tensor) -> Tensor:
    """`table[numbers]` for distinct numbers, with a gradient that costs a copy."""
    result: Tensor = _Take.apply(table, numbers)
    return result


class _Attention(torch.autograd.Function):
    """Attention within the texts of a line as `native` has it: text by text and unpadded, its weights computed again on the way
    back."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, asking: Line, asked: Line,
        scale: float,
    ) -> Tensor:  # fmt: skip
        bias = None if bias is None else bias.contiguous()
        spans = (*asking.spans, asked.spans[0], asked.spans[2])
        out, normalisers = native.attention(query[0], key[0], value[0], bias, causal, spans, scale)
        ctx.save_for_backward(query, key, value, bias, out, normalisers)
        ctx.given = causal, spans, scale
        return out[None]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, out, normalisers = ctx.saved_tensors
        gradient = gradients[0][0]
        gradient = gradient if gradient.stride(2) == 1 else gradient.contiguous()
        causal, spans, scale = ctx.given
        for_query, for_key, for_value, for_bias = native.attention_back(
            query[0], key[0], value[0], bias, causal, spans, scale, out, normalisers, gradient, ctx.needs_input_grad[3]
        )
        lines = (line.transpose(0, 1)[None] for line in (for_query, for_key, for_value))
        return *lines, for_bias, None, None, None, None


class _RowAttention(torch.autograd.Function):
    """The same by batched products of all texts at once, as rows, which keeps its weights for the backward pass.

    A padding column holds what its text's last token holds, is hidden from all queries, and what padding queries would write is
    never read.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, asking: Line, asked: Line,
        scale: float,
    ) -> Tensor:  # fmt: skip
        q, k, v = asking.rows_of(query[0]), asked.rows_of(key[0]), asked.rows_of(value[0])
        scores = torch.baddbmm(_hidden(asking, asked, causal, bias, q), q, k.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, 2, out=scores)
        ctx.save_for_backward(q, k, v, weights)
        ctx.asking, ctx.asked, ctx.scale = asking, asked, scale
        return asking.line_of_rows(weights @ v)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        asking, asked = ctx.asking, ctx.asked
        gradient = asking.rows_of(gradients[0][0].transpose(0, 1))
        gradient.view(-1, asking.texts * asking.width, gradient.shape[2]).index_fill_(1, asking.padding, 0.0)
        for_scores = torch.ops.aten._softmax_backward_data(gradient @ v.transpose(1, 2), weights, 2, weights.dtype)
        for_bias = for_scores.view(-1, asking.texts, asking.width, asked.width).sum(1) if ctx.needs_input_grad[3] else None
        for_scores = for_scores * ctx.scale
        made = (for_scores @ k, asking), (for_scores.transpose(1, 2) @ q, asked), (weights.transpose(1, 2) @ gradient, asked)
        return *(line.line_of_rows(rows).transpose(1, 2) for rows, line in made), for_bias, None, None, None, None


def _hidden(asking: Line, asked: Line, causal: bool, bias: Tensor | None, rows: Tensor) -> Tensor:
    """What is added to the scores of `rows` [heads × texts, ...]: −∞ where they must not look, and a bias."""
    hidden = asking.ahead if causal else asked.beyond
    if bias is not None:
        hidden = (bias[:, None] + hidden).expand(-1, asking.texts, -1, -1).reshape(-1, asking.width, asked.width)
    elif not causal:
        hidden = hidden.repeat(rows.shape[0] // asking.texts, 1, 1)
    return hidden.to(rows.dtype)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    reading = _reading.get()
    if reading is None:
        return _attend_plainly(module, query, key, value, attention_mask, **options)
    asking, asked, causal = _who_asks_whom(module, reading.lines)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary positions leave these in fp32
    scale = options.get("scaling")
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    bias: Tensor | None = options.get("position_bias") if asking is asked else None
    bias = None if bias is None else bias[0]
    wide = None if bias is None else (bias.dtype, *bias.shape)
    plain = wide in (None, (torch.float32, query.shape[1], asking.width, asked.width)) and not torch.is_autocast_enabled("cpu")
    if plain and native.takes(query, key, value) and query.shape[3] == key.shape[3] == value.shape[3]:
        asking = reading.lines.last if module in reading.last else asking
        return _Attention.apply(query, key, value, bias, causal, asking, asked, scale), None
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if query.device.type == "cpu" and max(asking.width, asked.width) <= LONGEST:
        return _RowAttention.apply(query, key, value, bias, causal, asking, asked, scale), None
    q, k, v = (line.rows_of(part[0]) for part, line in ((query, asking), (key, asked), (value, asked)))
    whole = causal and bias is None  # then no mask is needed, and the fastest of kernels can be used
    mask = None if whole else _hidden(asking, asked, causal, bias, q).expand(q.shape[0], -1, -1)[None]
    rows = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scale, is_causal=whole)
    return asking.line_of_rows(rows[0]), None


def _attend_plainly(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    """Attention of rows: transformers' own, but for a single query each, where torch's operations do much beside the sums."""
    seen = None if attention_mask is None else attention_mask[:, 0, 0]
    single = query.shape[2] == 1 and query.shape[3] == key.shape[3] == value.shape[3]
    single = single and native.takes(query, key, value) and not torch.is_autocast_enabled("cpu")
    masked = seen is None or (seen.dtype == torch.bool and attention_mask is not None and attention_mask.shape[1:3] == (1, 1))
    if single and masked and not torch.is_grad_enabled() and options.get("position_bias") is None:
        scale = options.get("scaling")
        scale = query.shape[3] ** -0.5 if scale is None else float(scale)
        seen = None if seen is None else seen.expand(query.shape[0], key.shape[2]).contiguous()
        return native.attention_step(query, key, value, seen, scale), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _who_asks_whom(module: nn.Module, lines: Lines) -> tuple[Line, Line, bool]:
    """Whose tokens attend to whose, and whether only to those before them."""
    if lines.read is None or getattr(module, "is_causal", False):
        return lines.written, lines.written, True
    return (lines.written if module.is_decoder else lines.read), lines.read, False


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    return None if _reading.get() is not None else sdpa_mask(*arguments, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


@cache
def _with_bias_of_rows(kind: type) -> type:
    """An attention class with relative positions whose bias, within `packed`, is that of a row instead of that of the line."""

    def compute_bias(self: Any, query_length: int, key_length: int, *arguments: Any, **options: Any) -> Tensor:
        reading = _reading.get()
        if reading is not None:
            query_length = key_length = _who_asks_whom(self, reading.lines)[0].width
        return kind.compute_bias(self, query_length, key_length, *arguments, **options)  # pyright: ignore

    return type(kind.__name__, (kind,), {"compute_bias": compute_bias, "__module__": kind.__module__})


def enable(model: Any) -> Any:
    """Let a model attend through this file, if it attends through transformers' interface at all.

    Decoders must take positions, encoder–decoders must have relative ones: either way a token's place in the line is not taken
    for its place in its text.
    """
    config = model.config
    able = getattr(model, "_supports_attention_backend", False) or config.is_encoder_decoder
    able = able and getattr(model, "_supports_sdpa", False) and config._attn_implementation == "sdpa"
    relative = [module for module in model.modules() if hasattr(module, "compute_bias")]
    plain = not getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None)
    if able and plain and bool(relative) == bool(config.is_encoder_decoder):
        model.set_attn_implementation(NAME)
        for module in relative:
            module.__class__ = _with_bias_of_rows(type(module))
    return model


def is_enabled(model: Any) -> bool:
    """Whether a model reads lines."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


FEED_FORWARD = ("mlp", "DenseReluDense")  # what transformers' models call that part of a block


@contextmanager
def packed(model: Any, lines: Lines) -> Generator[None]:
    """Within it a model on this implementation reads `lines` as its texts.

    In its last block attention and the feed-forward part work for the asked tokens alone: no later token reads what is made of
    the others, for only the head follows, and it is asked for these.
    """
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    block = lists[0][-1] if len(lists) == 1 and len(lists[0]) else nn.Identity()
    parts = [module for name, module in block.named_modules() if name.split(".")[-1] in FEED_FORWARD]

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        sizes.append(arguments[0].shape[1])
        return (take(arguments[0].squeeze(0), lines.asked)[None], *arguments[1:])

    def spread(module: nn.Module, arguments: Any, output: Any) -> Any:
        laid: Tensor = _Lay.apply(output.squeeze(0), lines.asked, sizes.pop())
        return laid[None]

    sizes: list[int] = []
    handles: list[Any] = []
    if len(parts) == 1:
        handles = [parts[0].register_forward_pre_hook(select), parts[0].register_forward_hook(spread)]
    token = _reading.set(_Reading(lines, frozenset(block.modules())))
    try:
        yield
    finally:
        _reading.reset(token)
        for handle in handles:
            handle.remove()
