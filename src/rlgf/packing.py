"""Texts of different lengths in one line without padding; only attention sees them as rows again.

Everything in a transformer but attention works token by token, so a micro-batch is read as a single row of all its tokens.
transformers' attention interface is the one seam: inside `packed` the registered function lays the line out as rows, attends,
and lines the result up again. Outside it, it is plain SDPA. Models that do not attend through that interface, or that count
positions in a way of their own, are read as padded rows instead.
"""

from collections.abc import Generator, Sequence
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

from rlgf.scripting import without_python

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
    def sizes(self) -> list[int]:
        """The line in parts: of each text the idle tokens and the others; and what fills it up."""
        parts = [size for idle, length in zip(self.idle, self.lengths) for size in (idle, length - idle)]
        return [*parts, self.ids.shape[1] - sum(parts)]

    def texts_of(self, line: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        """The texts of a line whose tokens are along `dim`, each without what is idle."""
        return line.split(self.sizes, dim)[1:-1:2]

    def empty(self, texts: Tensor, size: int) -> Tensor:
        """A line [tokens, heads, size] to be filled with what is made of `texts` [heads, ...]; zero where none is."""
        line = texts.new_empty(self.ids.shape[1], texts.shape[0], size)
        for part in line.split(self.sizes)[::2]:
            if part.shape[0]:
                part.zero_()
        return line

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
    """Attention within the texts of a line by batched products, which keeps its weights for the backward pass.

    Text by text, `apart`, nothing is padded and what a text needs stays in the cache; few operations each, for each passes the
    interpreter's lock to the lane beside it and back. Otherwise all at once, as rows: a padding column holds what its text's
    last token holds, is hidden from all queries, and what padding queries would write is never read.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, asking: Line, asked: Line,
        scale: float, apart: bool,
    ) -> Tensor:  # fmt: skip
        q, k, v = (part[0] for part in (query, key, value))
        if not apart:
            q, k, v = asking.rows_of(q), asked.rows_of(k), asked.rows_of(v)
        hidden = (_corners if apart else _of_rows)(asking, asked, causal, bias, query[0])
        own, keys, values = _parts(q, asking, apart), _parts(k.transpose(1, 2), asked, apart, 2), _parts(v, asked, apart)
        kept = _weights(list(own), list(keys), hidden, scale)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.asking, ctx.asked, ctx.scale, ctx.apart = asking, asked, scale, apart
        return _products(kept, values, asking, apart)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        asking, asked, apart = ctx.asking, ctx.asked, ctx.apart
        gradient = gradients[0][0].transpose(0, 1)
        if not apart:
            gradient = asking.rows_of(gradient)
            gradient.view(-1, asking.texts * asking.width, gradient.shape[2]).index_fill_(1, asking.padding, 0.0)
        own, keys, values = _parts(q, asking, apart), _parts(k, asked, apart), _parts(v.transpose(1, 2), asked, apart, 2)
        upstream = _parts(gradient, asking, apart)
        for_scores = _for_scores(list(upstream), list(values), kept)
        for_bias = _for_bias(for_scores, asking, asked, apart) if ctx.needs_input_grad[3] else None
        for_query = _products(for_scores, keys, asking, apart, ctx.scale)
        for_key = _products([part.transpose(1, 2) for part in for_scores], own, asked, apart, ctx.scale)
        for_value = _products([weights.transpose(1, 2) for weights in kept], upstream, asked, apart)
        lines = (part.transpose(1, 2) for part in (for_query, for_key, for_value))
        return *lines, for_bias, None, None, None, None, None


def _parts(states: Tensor, line: Line, apart: bool, dim: int = 1) -> Sequence[Tensor]:
    """What is multiplied at once: the texts of a line whose tokens are along `dim`, or all rows."""
    return line.texts_of(states, dim) if apart else [states]


def _products(left: Sequence[Tensor], right: Sequence[Tensor], line: Line, apart: bool, scale: float = 1.0) -> Tensor:
    """`scale` times the products of such parts, as attention returns them, [1, tokens, heads, size]."""
    if not apart:
        return line.line_of_rows(torch.baddbmm(left[0].new_zeros(()), left[0], right[0], beta=0, alpha=scale))
    made = line.empty(left[0], right[0].shape[2])
    _multiply_into(list(line.texts_of(made.transpose(0, 1))), list(left), list(right), scale)
    return made[None]


@without_python
def _weights(own: list[Tensor], keys: list[Tensor], hidden: list[Tensor], scale: float) -> list[Tensor]:
    """The weights with which queries attend; `hidden` is empty or what is added to the scores of each part."""
    weights: list[Tensor] = []
    for place in range(len(own)):
        if len(hidden) > 0:
            scores = torch.baddbmm(hidden[place], own[place], keys[place], alpha=scale)
        else:
            scores = torch.bmm(own[place], keys[place]).mul_(scale)
        weights.append(torch.softmax(scores, 2, None, out=scores))
    return weights


@without_python
def _for_scores(upstream: list[Tensor], values: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """The gradient of the scores."""
    gradients: list[Tensor] = []
    for place in range(len(weights)):
        for_weights = torch.bmm(upstream[place], values[place])
        gradients.append(torch.ops.aten._softmax_backward_data(for_weights, weights[place], 2, weights[place].dtype))
    return gradients


@without_python
def _multiply_into(places: list[Tensor], left: list[Tensor], right: list[Tensor], scale: float) -> None:
    """`scale` times products, each where it belongs."""
    for place in range(len(places)):
        torch.baddbmm(places[place], left[place], right[place], beta=0.0, alpha=scale, out=places[place])


def _corners(asking: Line, asked: Line, causal: bool, bias: Tensor | None, query: Tensor) -> list[Tensor]:
    """What is added to the scores of each text: −∞ where it must not look, and a bias; empty: nothing."""
    if not causal and bias is None:
        return []
    whole = asking.ahead.to(query.dtype) if causal else query.new_zeros(())
    whole = whole if bias is None else bias + whole
    spans = zip(asking.idle, asking.lengths, asked.lengths)
    return [whole[..., idle:length, :seen] for idle, length, seen in spans]


def _of_rows(asking: Line, asked: Line, causal: bool, bias: Tensor | None, query: Tensor) -> list[Tensor]:
    """The same for all rows, in a shape that goes with [heads × texts, width, width]."""
    hidden = asking.ahead if causal else asked.beyond
    if bias is not None:
        hidden = (bias[:, None] + hidden).expand(-1, asking.texts, -1, -1).reshape(-1, asking.width, asked.width)
    elif not causal:
        hidden = hidden.repeat(query.shape[0], 1, 1)
    return [hidden.to(query.dtype)]


def _for_bias(for_scores: list[Tensor], asking: Line, asked: Line, apart: bool) -> Tensor:
    """The gradient of a bias [heads, width, width], from that of the scores."""
    if not apart:
        return for_scores[0].view(-1, asking.texts, asking.width, asked.width).sum(1)
    gradient = for_scores[0].new_zeros(for_scores[0].shape[0], asking.width, asked.width)
    for part, idle, length in zip(for_scores, asking.idle, asking.lengths):
        gradient[:, idle:length, : part.shape[2]] += part
    return gradient


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    reading = _reading.get()
    if reading is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    asking, asked, causal = _who_asks_whom(module, reading.lines)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary positions leave these in fp32
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = options.get("scaling")
    scale = query.shape[3] ** -0.5 if scale is None else float(scale)
    bias: Tensor | None = options.get("position_bias") if asking is asked else None
    bias = None if bias is None else bias[0]
    if query.device.type == "cpu" and max(asking.width, asked.width) <= LONGEST:
        # in fp32, with a head or more for each thread; in bf16 products of odd sizes take twice as long
        apart = query.dtype == torch.float32 and torch.get_num_threads() <= query.shape[1]
        apart = apart and not torch.is_autocast_enabled("cpu")
        asking = reading.lines.last if apart and module in reading.last else asking
        attended: Tensor = _Attention.apply(query, key, value, bias, causal, asking, asked, scale, apart)
        return attended, None
    q, k, v = (line.rows_of(part[0]) for part, line in ((query, asking), (key, asked), (value, asked)))
    whole = causal and bias is None  # then no mask is needed, and the fastest of kernels can be used
    mask = None if whole else _of_rows(asking, asked, causal, bias, query[0])[0].expand(q.shape[0], -1, -1)[None]
    rows = nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], mask, scale=scale, is_causal=whole)
    return asking.line_of_rows(rows[0]), None


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
