"""Texts of different lengths in one line without padding; only attention sees them as rows again.

Everything in a transformer but attention works token by token, so a micro-batch is read as a single row of all its tokens.
transformers' attention interface is the one seam: inside `packed` the registered function lays the line out as rows, attends
causally, and lines the result up again. Outside it, it is plain SDPA. Models that do not attend through that interface are
read as padded rows instead.
"""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "rlgf"
ROUND = 16  # rows are as wide as a multiple of this: products of odd sizes take twice as long


@dataclass(frozen=True)
class Line:
    """A micro-batch as one line of tokens."""

    ids: Tensor  # int64 [1, tokens]
    positions: Tensor  # int64 [1, tokens], each token's place within its text
    places: Tensor  # int64 [tokens], where each token stands among texts × width
    asked: Tensor  # int64 [asked], which tokens of the line are the states that were asked for
    source: Tensor  # int64 [texts × width], which token of the line each place of a row reads; padding reads the last
    padding: Tensor  # int64 [padding], the places of rows behind their texts
    hidden: Tensor  # float [width, width], −∞ where a token would look ahead
    texts: int
    width: int


_line: ContextVar[Line | None] = ContextVar("line", default=None)


def line_up(ids: Tensor, rows: Tensor, columns: Tensor, device: torch.device) -> Line:
    """The tokens of `ids` [texts, width] that the tokens at `(rows, columns)` depend on, as a line.

    `(rows, columns)` must be distinct; a text is read up to the last state before an asked token.
    """
    texts = ids.shape[0]
    read = torch.zeros(texts, dtype=torch.int64).scatter_reduce_(0, rows, columns, "amax")
    width = -(-int(read.max()) // ROUND) * ROUND
    starts = read.cumsum(0) - read
    within = torch.arange(width) < read[:, None]
    places = within.flatten().nonzero().squeeze(1)
    source = starts[:, None] + torch.arange(width).clamp(max=(read - 1).clamp(min=0)[:, None])
    line = ids[:, : int(read.max())][within[:, : int(read.max())]]
    return Line(
        ids=line[None].to(device),
        positions=(places % width)[None].to(device),
        places=places.to(device),
        asked=(starts[rows] + columns - 1).to(device),
        source=source.flatten().clamp(max=len(places) - 1).to(device),
        padding=(~within).flatten().nonzero().squeeze(1).to(device),
        hidden=torch.full((width, width), -torch.inf, device=device).triu_(1),
        texts=texts,
        width=width,
    )


@contextmanager
def packed(line: Line) -> Generator[None]:
    """Within it, attention of models on this implementation reads `line` as its texts."""
    token = _line.set(line)
    try:
        yield
    finally:
        _line.reset(token)


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
    """Causal attention of every text of a line, by batched products over rows whose width suits the processor.

    Rows are read from the line as they are multiplied: a padding column of a row holds what its last token holds, which
    causality hides from all others, and what padding queries would write is never read.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, line: Line, scale: float) -> Tensor:
        q, k, v = (_as_rows(states, line) for states in (query, key, value))
        scores = torch.baddbmm(line.hidden, q, k.transpose(1, 2), alpha=scale)
        weights = torch.softmax(scores, 2, out=scores)
        ctx.save_for_backward(q, k, v, weights)
        ctx.line, ctx.scale = line, scale
        return _as_line(torch.bmm(weights, v), query.shape[1], line)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        line: Line = ctx.line
        heads = q.shape[0] // line.texts
        upstream = _as_rows(gradients[0].transpose(1, 2), line)
        upstream.view(heads, -1, upstream.shape[2]).index_fill_(1, line.padding, 0.0)
        for_value = torch.bmm(weights.transpose(1, 2), upstream)
        for_scores = torch.ops.aten._softmax_backward_data(torch.bmm(upstream, v.transpose(1, 2)), weights, 2, weights.dtype)
        for_query = torch.baddbmm(q, for_scores, k, beta=0, alpha=ctx.scale)
        for_key = torch.baddbmm(k, for_scores.transpose(1, 2), q, beta=0, alpha=ctx.scale)
        return *(_as_line(rows, heads, line).transpose(1, 2) for rows in (for_query, for_key, for_value)), None, None


def _as_rows(states: Tensor, line: Line) -> Tensor:
    """[1, heads, tokens, size] of a line as [heads × texts, width, size] of its rows."""
    return states[0].index_select(1, line.source).view(-1, line.width, states.shape[3])


def _as_line(rows: Tensor, heads: int, line: Line) -> Tensor:
    """The inverse of `_as_rows`, [1, tokens, heads, size]."""
    return rows.view(heads, -1, rows.shape[2]).transpose(0, 1).index_select(0, line.places)[None]


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    line = _line.get()
    if line is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = options.get("scaling")
    attended: Tensor = _Attention.apply(query, key, value, line, query.shape[3] ** -0.5 if scale is None else scale)
    return attended, None


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    return None if _line.get() is not None else sdpa_mask(*arguments, **options)


ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


def enable(model: Any) -> Any:
    """Let a model attend through this file, if it attends through transformers' interface at all."""
    able = getattr(model, "_supports_attention_backend", False) and getattr(model, "_supports_sdpa", False)
    plain = not getattr(model.config, "sliding_window", None) and not getattr(model.config, "layer_types", None)
    if able and plain and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
    return model


def is_enabled(model: Any) -> bool:
    """Whether a model reads lines."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == NAME


@contextmanager
def last_block_on(model: Any, asked: Tensor) -> Generator[None]:
    """Within it, the feed-forward part of the last block works on the asked tokens of the line alone.

    No later token reads what it makes of the others: only the head follows, and it is asked for these. Where the last block
    has no part named `mlp`, nothing changes.
    """
    lists = [child for child in model.base_model.children() if isinstance(child, nn.ModuleList)]
    block = lists[0][-1] if len(lists) == 1 and len(lists[0]) else None
    part = getattr(block, "mlp", None)
    if not isinstance(part, nn.Module):
        yield
        return

    def select(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        sizes.append(arguments[0].shape[1])
        return (take(arguments[0][0], asked)[None], *arguments[1:])

    def spread(module: nn.Module, arguments: Any, output: Any) -> Any:
        laid: Tensor = _Lay.apply(output[0], asked, sizes.pop())
        return laid[None]

    sizes: list[int] = []
    handles = [part.register_forward_pre_hook(select), part.register_forward_hook(spread)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
