"""The in-process decoder: continues any prefix, row by row as if alone, and says what it drew from.

A prefix is prefilled in one forward pass; only what follows is decoded. Rows are aligned at the end of their prefixes, so
all of them write the same column of one preallocated key-value cache; rows that have finished leave the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from rlgf.forward import autocast, head_positions
from rlgf.models import LanguageModel
from rlgf.ops import log_normaliser, without_ids
from rlgf.types import Decoding, Support

BATCH_TOKENS = 16_384  # cache columns of one decoding batch: bounds memory, changes nothing else
PREFILL_FILL = 0.75  # prefixes are prefilled together while the shortest has at least this share of the longest


@dataclass(frozen=True)
class Continuations:
    """What was written after each prefix, padded on the right; log-probabilities are those of the tokens drawn."""

    tokens: Tensor  # int64 [rows, most], 0 beyond a row's length
    lengths: Tensor  # int64 [rows]
    finished: Tensor  # bool [rows], whether the row ended with an end token
    log_probs: Tensor  # float [rows, most], under the distribution that was drawn from
    full_log_probs: Tensor  # float [rows, most], under the full, untempered distribution
    support: Support | None  # what could have been drawn, where top-k or top-p cuts; counts [rows, most]


def continue_prefixes(
    language_model: LanguageModel,
    prefixes: Sequence[Sequence[int]],
    budgets: Sequence[int],
    minimums: Sequence[int],
    uniforms: NDArray[np.float64],
    decoding: Decoding,
    precision: str = "fp32",
) -> Continuations:
    """Write at most `budgets[i]` tokens after `prefixes[i]`, no end token among the first `minimums[i]`.

    Token `s` of row `i` is drawn by `uniforms[i, s]` ([rows, max(budgets)]), by inverting the cumulative distribution in the
    order of token ids; so neither the other rows nor the batch change what a row is given.
    """
    rows, most = len(prefixes), max(budgets, default=0)
    tokens = torch.zeros((rows, most), dtype=torch.int64)
    lengths = torch.zeros(rows, dtype=torch.int64)
    finished = torch.zeros(rows, dtype=torch.bool)
    log_probs, full_log_probs = torch.zeros((rows, most)), torch.zeros((rows, most))
    kept: dict[tuple[int, int], Tensor] = {}
    for batch in _decoding_batches(prefixes, budgets):
        decoder = _Decoder(language_model, [prefixes[i] for i in batch], max(budgets[i] for i in batch), precision)
        draws = torch.from_numpy(uniforms[batch])
        budget = torch.tensor([budgets[i] for i in batch])
        minimum = torch.tensor([minimums[i] for i in batch])
        logits = decoder.prefill()
        active = torch.tensor(batch)
        for step in range(most):
            forbidden = minimum > step
            drawn = draw(logits, draws[:, step], forbidden, language_model.end_ids, decoding)
            tokens[active, step] = drawn.tokens
            log_probs[active, step], full_log_probs[active, step] = drawn.log_probs, drawn.full_log_probs
            if drawn.support is not None:
                parts = drawn.support.ids.split(drawn.support.counts.tolist())
                kept.update({(row, step): part for row, part in zip(active.tolist(), parts)})
            lengths[active] = step + 1
            ended = torch.isin(drawn.tokens, torch.tensor(language_model.end_ids))
            finished[active] = ended
            stays = (~ended & (budget > step + 1)).nonzero().squeeze(1)
            if len(stays) == 0:
                break
            if len(stays) < len(active):
                decoder.keep(stays)
                active, draws, budget, minimum = active[stays], draws[stays], budget[stays], minimum[stays]
            logits = decoder.step(drawn.tokens[stays])
    support = _assemble(kept, rows, most) if decoding.truncates and not decoding.greedy else None
    return Continuations(tokens, lengths, finished, log_probs, full_log_probs, support)


@dataclass(frozen=True)
class Draw:
    """One token for each row."""

    tokens: Tensor  # int64 [rows]
    log_probs: Tensor  # float [rows]
    full_log_probs: Tensor  # float [rows]
    support: Support | None


def draw(logits: Tensor, uniforms: Tensor, forbidden: Tensor, end_ids: Sequence[int], decoding: Decoding) -> Draw:
    """Draw a token from each row of `logits` [rows, vocabulary] (float32), as transformers' processors would shape them.

    Order: forbid end tokens, temper, top-k (ties at the last place are kept), top-p. `uniforms` [rows] float64 in [0, 1).
    """
    full = log_normaliser(logits)
    ends = torch.tensor(end_ids, dtype=torch.int64)
    if not decoding.truncates and not decoding.greedy:
        return _draw_whole(logits, full, uniforms, forbidden, ends, decoding.temperature)
    allowed = without_ids(logits, forbidden, ends) if bool(forbidden.any()) else logits
    if decoding.greedy:
        tokens = allowed.argmax(1)
        picked = logits.gather(1, tokens[:, None]).squeeze(1)
        return Draw(tokens, torch.zeros_like(picked), picked - full, None)
    scaled = allowed if decoding.temperature == 1.0 else allowed / decoding.temperature
    kept, ids = truncate(scaled, decoding)
    place = invert((kept - kept.amax(1, keepdim=True)).exp(), uniforms)
    tokens = ids.gather(1, place[:, None]).squeeze(1)
    inside = kept > -torch.inf
    log_probs = kept.gather(1, place[:, None]).squeeze(1) - kept.logsumexp(1)
    picked = logits.gather(1, tokens[:, None]).squeeze(1)
    return Draw(tokens, log_probs, picked - full, Support(inside.sum(1), ids[inside]))


def _draw_whole(logits: Tensor, full: Tensor, uniforms: Tensor, forbidden: Tensor, end_ids: Tensor, temperature: float) -> Draw:
    """Draw from the whole vocabulary; what is forbidden loses its weight instead of all logits being copied."""
    scaled = logits if temperature == 1.0 else logits / temperature
    total = full if temperature == 1.0 else scaled.logsumexp(1)
    weights = (scaled - total[:, None]).exp_()
    if bool(forbidden.any()):
        blocked = weights[:, end_ids]
        share = (blocked.sum(1) * forbidden).clamp(max=1.0)
        if bool((share > 0.5).any()):  # too little is left to be told from rounding: leave the end tokens out from the start
            scaled = without_ids(scaled, forbidden, end_ids)
            total = scaled.logsumexp(1)
            weights = (scaled - total[:, None]).exp_()
        else:
            total = total + torch.log1p(-share)
            weights[:, end_ids] = blocked.masked_fill(forbidden[:, None], 0.0)
    tokens = invert(weights, uniforms)
    picked = logits.gather(1, tokens[:, None]).squeeze(1)
    return Draw(tokens, scaled.gather(1, tokens[:, None]).squeeze(1) - total, picked - full, None)


def truncate(scaled: Tensor, decoding: Decoding) -> tuple[Tensor, Tensor]:
    """The logits that top-k and top-p keep (−∞ for those cut) and their ids, ascending, both [rows, kept at most]."""
    vocabulary = scaled.shape[1]
    count = min(decoding.top_k, vocabulary) if decoding.top_k else vocabulary
    if count < vocabulary:
        values, ids = scaled.topk(count + 1, dim=1)
        if bool((values[:, count - 1] == values[:, count]).any()):  # a tie at the last place: every tied token is kept
            values, ids = scaled.sort(dim=1, descending=True, stable=True)
            values = values.masked_fill(values < values[:, count - 1 : count], -torch.inf)
            most = int((values > -torch.inf).sum(1).max())
            values, ids = values[:, :most], ids[:, :most]
        else:
            ids, order = ids[:, :count].sort(1)  # equal values in the order of ids, whatever the other rows are
            values, order = values[:, :count].gather(1, order).sort(dim=1, descending=True, stable=True)
            ids = ids.gather(1, order)
    else:
        values, ids = scaled.sort(dim=1, descending=True, stable=True)
    if decoding.top_p < 1.0:
        # as transformers: going up from the least likely, cut while what is below and including holds at most 1 − p
        tail = values.softmax(1).flip(1).cumsum(1).flip(1)
        cut = tail <= 1 - decoding.top_p
        cut[:, 0] = False
        values = values.masked_fill(cut, -torch.inf)
        most = int((values > -torch.inf).sum(1).max())
        values, ids = values[:, :most], ids[:, :most]
    ids, order = ids.sort(1)
    return values.gather(1, order), ids


def invert(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first place at which the cumulative sum of `weights` [rows, n] passes `uniforms` × total, never one of weight 0."""
    cumulative = weights.cumsum(1, dtype=torch.float64)
    goal = uniforms.to(cumulative.device)[:, None] * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, goal, right=True).squeeze(1)
    if bool((place == weights.shape[1]).any()):  # the goal was rounded up to the total: the last place that adds anything
        place = torch.minimum(place, (cumulative < cumulative[:, -1:]).sum(1))
    return place


def _assemble(kept: dict[tuple[int, int], Tensor], rows: int, most: int) -> Support:
    counts = torch.zeros((rows, most), dtype=torch.int64)
    order = sorted(kept)
    if order:
        places = torch.tensor(order)
        counts[places[:, 0], places[:, 1]] = torch.tensor([len(kept[key]) for key in order])
    flat = torch.cat([kept[key] for key in order]) if order else torch.zeros(0, dtype=torch.int64)
    return Support(counts, flat)


def _decoding_batches(prefixes: Sequence[Sequence[int]], budgets: Sequence[int]) -> list[list[int]]:
    """Rows in batches that fit the cache; within one, those that may write longest come first, so that leaving is a slice."""
    writing = [i for i in range(len(prefixes)) if budgets[i] > 0]
    writing.sort(key=lambda i: (-budgets[i], len(prefixes[i])))
    batches: list[list[int]] = []
    widest = 0
    for i in writing:
        widest = max(widest, len(prefixes[i]) + budgets[i]) if batches else len(prefixes[i]) + budgets[i]
        if batches and (len(batches[-1]) + 1) * widest <= BATCH_TOKENS:
            batches[-1].append(i)
        else:
            batches.append([i])
            widest = len(prefixes[i]) + budgets[i]
    return batches


class _Layer(DynamicLayer):
    """One layer's keys and values in a buffer that is written in place; rows may leave, columns only grow."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns, self.filled = rows, columns, 0
        self.prefilling: tuple[Tensor, int] | None = None  # rows that are being prefilled, and their first column
        self.key_buffer: Tensor | None = None
        self.value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values and return all that the query may see."""
        if self.key_buffer is None or self.value_buffer is None:
            _, heads, _, size = key_states.shape
            self.key_buffer = key_states.new_zeros((self.rows, heads, self.columns, size))
            self.value_buffer = value_states.new_zeros((self.rows, heads, self.columns, value_states.shape[-1]))
            self.is_initialized = True
        if self.prefilling is not None:
            rows, first = self.prefilling
            last = first + key_states.shape[2]
            self.key_buffer[rows, :, first:last] = key_states
            self.value_buffer[rows, :, first:last] = value_states
            return key_states, value_states
        self.key_buffer[: self.rows, :, self.filled] = key_states.squeeze(2)
        self.value_buffer[: self.rows, :, self.filled] = value_states.squeeze(2)
        self.filled += 1
        return self.key_buffer[: self.rows, :, : self.filled], self.value_buffer[: self.rows, :, : self.filled]

    def keep(self, rows: Tensor) -> None:
        """Let all rows but these leave; a leading run of rows costs nothing."""
        if self.key_buffer is not None and self.value_buffer is not None and int(rows[-1]) + 1 != len(rows):
            self.key_buffer[: len(rows), :, : self.filled] = self.key_buffer[rows, :, : self.filled]
            self.value_buffer[: len(rows), :, : self.filled] = self.value_buffer[rows, :, : self.filled]
        self.rows = len(rows)

    def get_seq_length(self) -> int:
        """Columns before the query."""
        return 0 if self.prefilling is not None else self.filled

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns the query may see, and where they start."""
        return self.get_seq_length() + query_length, 0


class _Decoder:
    """A batch of prefixes aligned at their ends: one prefill, then a column at a time."""

    def __init__(self, language_model: LanguageModel, prefixes: Sequence[Sequence[int]], budget: int, precision: str) -> None:
        self.language_model, self.prefixes, self.precision = language_model, prefixes, precision
        self.lengths = torch.tensor([len(prefix) for prefix in prefixes])
        self.widest = int(self.lengths.max())
        layers = [_Layer(len(prefixes), self.widest + budget) for _ in range(language_model.model.config.num_hidden_layers)]
        self.layers, self.cache = layers, Cache(layers=layers)  # pyright: ignore[reportArgumentType]
        self.mask = torch.arange(self.widest + budget) >= (self.widest - self.lengths)[:, None]
        self.ragged = bool((self.lengths != self.widest).any())

    def prefill(self) -> Tensor:
        """Read all prefixes; returns the logits that follow each, [rows, vocabulary]."""
        logits = torch.zeros(len(self.prefixes), self.language_model.vocabulary)
        for group in self._prefill_groups():
            width = int(self.lengths[group].max())
            ids = torch.tensor([[0] * (width - len(self.prefixes[i])) + list(self.prefixes[i]) for i in group.tolist()])
            mask = self.mask[group, self.widest - width : self.widest]
            for layer in self.layers:
                layer.prefilling = (group, self.widest - width)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            logits[group] = self._forward(ids, positions, None if bool(mask.all()) else mask)
        for layer in self.layers:
            layer.prefilling, layer.filled = None, self.widest
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row; returns the logits that follow."""
        filled = self.layers[0].filled
        positions = (self.lengths + filled - self.widest)[:, None]
        return self._forward(tokens[:, None], positions, self.mask[:, : filled + 1] if self.ragged else None)

    def keep(self, rows: Tensor) -> None:
        """Let all rows but these leave the batch."""
        for layer in self.layers:
            layer.keep(rows)
        self.lengths, self.mask = self.lengths[rows], self.mask[rows]

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        model, device = self.language_model.model, self.language_model.device
        with torch.no_grad(), autocast(device, self.precision), head_positions(model, lambda hidden: hidden[:, -1]):
            output = model(
                input_ids=ids.to(device),
                attention_mask=None if mask is None else mask.long().to(device),
                position_ids=positions.to(device),
                past_key_values=self.cache,
                use_cache=True,
            )
        return output.logits.squeeze(0).float().cpu()

    def _prefill_groups(self) -> list[Tensor]:
        order = self.lengths.argsort(descending=True, stable=True)
        groups: list[list[int]] = []
        for i in order.tolist():
            if groups and int(self.lengths[i]) >= PREFILL_FILL * int(self.lengths[groups[-1][0]]):
                groups[-1].append(i)
            else:
                groups.append([i])
        return [torch.tensor(group) for group in groups]
