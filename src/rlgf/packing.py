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
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "rlgf"


@dataclass(frozen=True)
class Line:
    """A micro-batch as one line of tokens."""

    ids: Tensor  # int64 [1, tokens]
    positions: Tensor  # int64 [1, tokens], each token's place within its text
    places: Tensor  # int64 [tokens], where each token stands among texts × width
    asked: Tensor  # int64 [asked], which tokens of the line are the states that were asked for
    texts: int
    width: int


_line: ContextVar[Line | None] = ContextVar("line", default=None)


def line_up(ids: Tensor, rows: Tensor, columns: Tensor, device: torch.device) -> Line:
    """The tokens of `ids` [texts, width] that the tokens at `(rows, columns)` depend on, as a line.

    `(rows, columns)` must be distinct; a text is read up to the last state before an asked token.
    """
    texts, width = ids.shape[0], ids.shape[1] - 1
    read = torch.zeros(texts, dtype=torch.int64).scatter_reduce_(0, rows, columns, "amax")
    places = (torch.arange(width) < read[:, None]).flatten().nonzero().squeeze(1)
    starts = read.cumsum(0) - read
    line = ids[:, :-1].reshape(-1)[places]
    asked = starts[rows] + columns - 1
    return Line(line[None].to(device), (places % width)[None].to(device), places.to(device), asked.to(device), texts, width)


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


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    line = _line.get()
    if line is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    def as_rows(states: Tensor) -> Tensor:  # [1, heads, tokens, size] -> [texts, heads, width, size]
        _, heads, tokens, size = states.shape
        flat = states.transpose(1, 2).reshape(tokens, heads * size)
        laid: Tensor = _Lay.apply(flat, line.places, line.texts * line.width)
        return laid.view(line.texts, line.width, heads, size).transpose(1, 2)

    options["is_causal"] = True
    attended, _ = sdpa_attention_forward(module, as_rows(query), as_rows(key), as_rows(value), None, **options)
    _, _, heads, size = attended.shape
    lined = take(attended.reshape(line.texts * line.width, heads * size), line.places)
    return lined.view(1, -1, heads, size), None


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
