"""Texts of different lengths in one line without padding; only attention sees them as rows again.

Everything in a transformer but attention works token by token, so a micro-batch is read as a single row of all its tokens.
transformers' attention interface is the one seam: inside `packed` the registered function lays the line out as rows, attends,
and lines the result up again. Outside it, it is plain SDPA. Models that do not attend through that interface, or that count
positions in a way of their own, are read as padded rows instead.
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
    places: Tensor  # int64 [tokens], where each token stands among texts × width
    source: Tensor  # int64 [texts × width], which token of the line each place of a row reads; padding reads the text's last
    padding: Tensor  # int64 [padding], the places of rows behind their texts
    texts: int
    width: int

    @cached_property
    def ahead(self) -> Tensor:
        """−∞ where a token would look ahead, float [width, width]."""
        return torch.full((self.width, self.width), -torch.inf, device=self.ids.device).triu_(1)

    @cached_property
    def beyond(self) -> Tensor:
        """−∞ behind the end of each text, float [texts, 1, width]."""
        mask = torch.zeros(self.texts * self.width, device=self.ids.device)
        return mask.index_fill_(0, self.padding, -torch.inf).view(self.texts, 1, self.width)


@dataclass(frozen=True)
class Lines:
    """What a model reads: what was written so far, and, where it has an encoder, what that reads."""

    written: Line
    read: Line | None
    asked: Tensor  # int64 [asked], the tokens of the written line in whose states something is asked for


_lines: ContextVar[Lines | None] = ContextVar("lines", default=None)


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
        places=torch.cat([places, padding[:1].expand(filling)]).to(device),
        source=source.flatten().to(device),
        padding=padding.to(device),
        texts=texts,
        width=width,
    )


@contextmanager
def packed(lines: Lines) -> Generator[None]:
    """Within it, attention of models on this implementation reads `lines` as its texts."""
    token = _lines.set(lines)
    try:
        yield
    finally:
        _lines.reset(token)


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
    """Attention of every text of a line, by batched products over rows whose width suits the processor.

    Rows are read from the line as they are multiplied: a padding column of a row holds what its text's last token holds, is
    hidden from all queries, and what padding queries would write is never read.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, hidden: Tensor, asking: Line, asked: Line,
        scale: float,
    ) -> Tensor:  # fmt: skip
        q, k, v = _as_rows(query, asking), _as_rows(key, asked), _as_rows(value, asked)
        scores = torch.baddbmm(hidden.to(q.dtype), q, k.transpose(1, 2), alpha=scale)
        if bias is not None:
            scores.view(-1, asking.texts, asking.width, asked.width).add_(bias[:, None])
        weights = torch.softmax(scores, 2, out=scores)
        ctx.save_for_backward(q, k, v, weights)
        ctx.asking, ctx.asked, ctx.scale = asking, asked, scale
        return _as_line(torch.bmm(weights, v), asking)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        asking, asked = ctx.asking, ctx.asked
        upstream = _as_rows(gradients[0].transpose(1, 2), asking)
        upstream.view(-1, asking.texts * asking.width, upstream.shape[2]).index_fill_(1, asking.padding, 0.0)
        for_value = torch.bmm(weights.transpose(1, 2), upstream)
        for_weights = torch.bmm(upstream, v.transpose(1, 2))
        for_scores = torch.ops.aten._softmax_backward_data(for_weights, weights, 2, weights.dtype)
        for_query = torch.baddbmm(q, for_scores, k, beta=0, alpha=ctx.scale)
        for_key = torch.baddbmm(k, for_scores.transpose(1, 2), q, beta=0, alpha=ctx.scale)
        for_bias = None
        if ctx.needs_input_grad[3]:
            for_bias = for_scores.view(-1, asking.texts, asking.width, asked.width).sum(1)
        rows = (for_query, asking), (for_key, asked), (for_value, asked)
        return *(_as_line(part, line).transpose(1, 2) for part, line in rows), for_bias, None, None, None, None


def _as_rows(states: Tensor, line: Line) -> Tensor:
    """[1, heads, tokens, size] of a line as [heads × texts, width, size] of its rows."""
    return states[0].index_select(1, line.source).view(-1, line.width, states.shape[3])


def _as_line(rows: Tensor, line: Line) -> Tensor:
    """The inverse of `_as_rows`, as attention returns it, [1, tokens, heads, size]."""
    return rows.view(-1, line.texts * line.width, rows.shape[2]).transpose(0, 1).index_select(0, line.places)[None]


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    lines = _lines.get()
    if lines is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    asking, asked, causal = _who_asks_whom(module, lines)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = options.get("scaling")
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    bias: Tensor | None = options.get("position_bias") if asking is asked else None
    bias = None if bias is None else bias[0]
    hidden = asking.ahead if causal else asked.beyond.repeat(query.shape[1], 1, 1)
    if query.device.type == "cpu" and max(asking.width, asked.width) <= LONGEST:
        attended: Tensor = _Attention.apply(query, key, value, bias, hidden, asking, asked, scale)
        return attended, None
    q, k, v = _as_rows(query, asking), _as_rows(key, asked), _as_rows(value, asked)
    whole = causal and bias is None  # then no mask is needed, and the fastest of kernels can be used
    if bias is not None:
        hidden = hidden + bias[:, None].expand(-1, asking.texts, -1, -1).reshape(-1, asking.width, asked.width)
    mask = None if whole else hidden.expand(q.shape[0], -1, -1)[None].to(q.dtype)
    rows = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scale, is_causal=whole)
    return _as_line(rows[0], asking), None


def _who_asks_whom(module: nn.Module, lines: Lines) -> tuple[Line, Line, bool]:
    """Whose tokens attend to whose, and whether only to those before them."""
    if lines.read is None or getattr(module, "is_causal", False):
        return lines.written, lines.written, True
    return (lines.written if module.is_decoder else lines.read), lines.read, False


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    return None if _lines.get() is not None else sdpa_mask(*arguments, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


@cache
def _with_bias_of_rows(kind: type) -> type:
    """An attention class with relative positions whose bias, within `packed`, is that of a row instead of that of the line."""

    def compute_bias(self: Any, query_length: int, key_length: int, *arguments: Any, **options: Any) -> Tensor:
        lines = _lines.get()
        if lines is not None:
            query_length = key_length = _who_asks_whom(self, lines)[0].width
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
def last_block_on(model: Any, asked: Tensor) -> Generator[None]:
    """Within it, the feed-forward part of the last block works on the asked tokens of the line alone.

    No later token reads what it makes of the others: only the head follows, and it is asked for these. Where the last block
    has no such part, nothing changes.
    """
    decoder = model.get_decoder() if model.config.is_encoder_decoder else model.base_model
    lists = [child for child in decoder.children() if isinstance(child, nn.ModuleList)]
    block = lists[0][-1] if len(lists) == 1 and len(lists[0]) else nn.Identity()
    parts = [module for name, module in block.named_modules() if name.split(".")[-1] in FEED_FORWARD]
    if len(parts) != 1:
        yield
        return

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        sizes.append(arguments[0].shape[1])
        return (take(arguments[0][0], asked)[None], *arguments[1:])

    def spread(module: nn.Module, arguments: Any, output: Any) -> Any:
        laid: Tensor = _Lay.apply(output[0], asked, sizes.pop())
        return laid[None]

    sizes: list[int] = []
    handles = [parts[0].register_forward_pre_hook(select), parts[0].register_forward_hook(spread)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
