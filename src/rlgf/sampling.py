"""The in-process decoder: continues any prefix, row by row as if alone, and says what it drew from.

A prefix is prefilled in one forward pass, once for all rows that share it; only what follows is decoded. Rows are aligned at
the end of their prefixes, so all of them write the same column of one preallocated key-value cache; rows that have finished
leave the batch. An encoder–decoder reads its source once, and its prefixes are the beginnings of what its decoder writes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from rlgf.forward import autocast, head_positions, is_encoder_decoder, padded
from rlgf.models import LanguageModel
from rlgf.offload import awake
from rlgf.ops import log_normaliser, without_ids
from rlgf.types import Decoding, Support

# these bound memory, and change draws by nothing but rounding
BATCH_TOKENS = 32_768  # cache columns of one decoding batch
BATCH_LOGITS = 2**25  # numbers drawn from at once, rows times vocabulary
PREFILL_TOKENS = 4_096  # read at once: of a token that is read a layer makes more than it keeps
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
    sources: Sequence[Sequence[int]] | None = None,
) -> Continuations:
    """Write at most `budgets[i]` tokens after `prefixes[i]`, no end token among the first `minimums[i]`.

    A causal model's prefix is prompt and response so far. An encoder–decoder has the prompt as `sources[i]`, and as its prefix
    what was written of the response, which may be nothing.

    Token `s` of row `i` is drawn by `uniforms[i, s]` ([rows, max(budgets)]), by inverting the cumulative distribution in the
    order of token ids; so neither the other rows nor the batch change what a row is given.
    """
    if decoding.beams > 1:
        with awake(language_model.model):
            return _beam_search(language_model, prefixes, budgets, minimums, decoding.beams, precision, sources)
    rows, most = len(prefixes), max(budgets, default=0)
    tokens = torch.zeros((rows, most), dtype=torch.int64)
    lengths = torch.zeros(rows, dtype=torch.int64)
    finished = torch.zeros(rows, dtype=torch.bool)
    log_probs, full_log_probs = torch.zeros((rows, most)), torch.zeros((rows, most))
    kept: dict[tuple[int, int], Tensor] = {}
    if sources is not None:
        prefixes = [[language_model.model.config.decoder_start_token_id, *prefix] for prefix in prefixes]
    with awake(language_model.model):
        for batch in _decoding_batches(language_model, prefixes, budgets, sources):
            members = [prefixes[i] for i in batch], None if sources is None else [sources[i] for i in batch]
            decoder = _Decoder(language_model, *members, max(budgets[i] for i in batch), precision)
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
    support = _assemble(kept, rows, most) if decoding.truncates and decoding.samples else None
    return Continuations(tokens, lengths, finished, log_probs, full_log_probs, support)


def split_context(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[list[list[int]] | None, list[list[int]]]:
    """Of pairs of prompt and what is written of the response: sources (None for a causal model) and prefixes, as above."""
    if is_encoder_decoder(model):
        return [list(prompt) for prompt, _ in rows], [list(begun) for _, begun in rows]
    return None, [[*prompt, *begun] for prompt, begun in rows]


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


def _beam_search(
    language_model: LanguageModel,
    prefixes: Sequence[Sequence[int]],
    budgets: Sequence[int],
    minimums: Sequence[int],
    beams: int,
    precision: str,
    sources: Sequence[Sequence[int]] | None,
) -> Continuations:
    """The likeliest continuation that transformers' beam search finds, by its own defaults; nothing is drawn."""
    model, device, ends = language_model.model, language_model.device, list(language_model.end_ids)
    rows, most = len(prefixes), max(budgets, default=0)
    tokens, lengths = torch.zeros((rows, most), dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    finished = torch.zeros(rows, dtype=torch.bool)
    begun = [[] if sources is None else [model.config.decoder_start_token_id] for _ in range(rows)]
    written = [[*start, *prefix] for start, prefix in zip(begun, prefixes)]
    families: dict[tuple[int, int, int], list[int]] = {}
    for row in range(rows):
        if budgets[row]:
            families.setdefault((len(written[row]), budgets[row], minimums[row]), []).append(row)
    for (width, budget, minimum), members in families.items():
        size = max(1, BATCH_TOKENS // 2 // (beams * (width + budget)))  # they are read at once
        for batch in (members[start : start + size] for start in range(0, len(members), size)):
            ids = torch.tensor([written[row] for row in batch], dtype=torch.int64).to(device)
            inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if sources is not None:
                read = padded([sources[row] for row in batch])
                mask = (torch.arange(read.shape[1]) < torch.tensor([[len(sources[row])] for row in batch])).long()
                inputs = {"input_ids": read.to(device), "attention_mask": mask.to(device), "decoder_input_ids": ids}
            with torch.no_grad(), language_model.active(), autocast(device, precision):
                found = model.generate(
                    **inputs, num_beams=beams, do_sample=False, max_new_tokens=budget, min_new_tokens=minimum,
                    eos_token_id=ends, pad_token_id=ends[0],
                )  # fmt: skip
            for row, text in zip(batch, found[:, width:].cpu()):
                ended = torch.isin(text, torch.tensor(ends)).nonzero().flatten().tolist()
                length = ended[0] + 1 if ended else len(text)
                tokens[row, :length], lengths[row], finished[row] = text[:length], length, bool(ended)
    nothing = torch.zeros((rows, most))
    return Continuations(tokens, lengths, finished, nothing, nothing, None)


def _alone_in_length(model: Any) -> bool:
    """Whether only prefixes of one length can be decoded together: a decoder that counts columns for positions."""
    return is_encoder_decoder(model) and not any(hasattr(module, "compute_bias") for module in model.modules())


def _decoding_batches(
    language_model: LanguageModel,
    prefixes: Sequence[Sequence[int]],
    budgets: Sequence[int],
    sources: Sequence[Sequence[int]] | None,
) -> list[list[int]]:
    """Rows in batches that fit the cache; within one, those that may write longest come first, so that leaving is a slice."""
    one_length = _alone_in_length(language_model.model)
    most_rows = max(1, BATCH_LOGITS // language_model.vocabulary)
    writing = [i for i in range(len(prefixes)) if budgets[i] > 0]
    writing.sort(key=lambda i: (len(prefixes[i]) if one_length else 0, -budgets[i], len(prefixes[i])))
    batches: list[list[int]] = []
    widest = (0, 0, 0)
    for i in writing:
        own = len(prefixes[i]), budgets[i], 0 if sources is None else len(sources[i])
        joint = tuple(map(max, widest, own))
        fits = batches and len(batches[-1]) < most_rows and (len(batches[-1]) + 1) * sum(joint) <= BATCH_TOKENS
        if fits and (not one_length or len(prefixes[i]) == len(prefixes[batches[-1][0]])):
            batches[-1].append(i)
            widest = joint
        else:
            batches.append([i])
            widest = own
    return batches


@dataclass(frozen=True)
class _Prefill:
    """Prefixes that are read at once: which distinct ones, and for each row of the batch that has one of them which it is."""

    distinct: Tensor  # int64 [read], a row of the batch for each
    rows: Tensor  # int64 [rows], those that share them
    which: Tensor  # int64 [rows], places in `distinct`
    first: int  # the column in which they begin


class _Layer(DynamicLayer):
    """One layer's keys and values in a buffer that is written in place; rows may leave, columns only grow."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns, self.filled = rows, columns, 0
        self.prefilling: _Prefill | None = None
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
            group, last = self.prefilling, self.prefilling.first + key_states.shape[2]
            self.key_buffer[group.rows, :, group.first : last] = key_states[group.which]
            self.value_buffer[group.rows, :, group.first : last] = value_states[group.which]
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


class _SourceLayer(_Layer):
    """One layer's keys and values of what the encoder read: complete after the prefill."""

    def close(self) -> None:
        """From now on the layer is only read."""
        self.filled, self.prefilling = self.columns, None
        self.keys, self.values = self.key_buffer, self.value_buffer

    def keep(self, rows: Tensor) -> None:
        """Let all rows but these leave."""
        super().keep(rows)
        if self.key_buffer is not None and self.value_buffer is not None:
            self.keys, self.values = self.key_buffer[: self.rows], self.value_buffer[: self.rows]


class _Decoder:
    """A batch of prefixes aligned at their ends: one prefill, then a column at a time."""

    def __init__(
        self,
        language_model: LanguageModel,
        prefixes: Sequence[Sequence[int]],
        sources: Sequence[Sequence[int]] | None,
        budget: int,
        precision: str,
    ) -> None:
        self.language_model, self.prefixes, self.precision = language_model, prefixes, precision
        self.lengths = torch.tensor([len(prefix) for prefix in prefixes])
        self.widest = int(self.lengths.max())
        self.mask = torch.arange(self.widest + budget) >= (self.widest - self.lengths)[:, None]
        self.ragged = bool((self.lengths != self.widest).any())
        self.groups = self._prefill_groups(sources)
        depth = _decoder_layers(language_model.model.config)
        self.layers = [_Layer(len(prefixes), self.widest + budget) for _ in range(depth)]
        self.source_layers: list[_SourceLayer] = []
        self.cache: Any = Cache(layers=self.layers)  # pyright: ignore[reportArgumentType]
        if sources is not None:
            self.source_states, self.source_mask = self._encode(sources)
            self.source_layers = [_SourceLayer(len(prefixes), self.source_mask.shape[1]) for _ in range(depth)]
            self.cache = EncoderDecoderCache(self.cache, Cache(layers=self.source_layers))  # pyright: ignore[reportArgumentType]

    def prefill(self) -> Tensor:
        """Read all prefixes; returns the logits that follow each, [rows, vocabulary]."""
        logits = torch.zeros(len(self.prefixes), self.language_model.vocabulary)
        for group in self.groups:
            members = [self.prefixes[i] for i in group.distinct.tolist()]
            width = self.widest - group.first
            ids = torch.tensor([[0] * (width - len(prefix)) + list(prefix) for prefix in members])
            mask = self.mask[group.distinct, group.first : self.widest]
            for layer in self.layers:
                layer.prefilling = group
            for layer in self.source_layers:
                layer.prefilling = _Prefill(group.distinct, group.rows, group.which, 0)
            if self.source_layers:
                self.cache.is_updated = {}
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            following = self._forward(ids, positions, None if bool(mask.all()) else mask, group.distinct)
            logits[group.rows] = following[group.which]
        for layer in self.layers:
            layer.prefilling, layer.filled = None, self.widest
        for layer in self.source_layers:
            layer.close()
        if self.source_layers:
            self.cache.is_updated = dict.fromkeys(range(len(self.source_layers)), True)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row; returns the logits that follow."""
        filled = self.layers[0].filled
        positions = (self.lengths + filled - self.widest)[:, None]
        return self._forward(tokens[:, None], positions, self.mask[:, : filled + 1] if self.ragged else None)

    def keep(self, rows: Tensor) -> None:
        """Let all rows but these leave the batch."""
        for layer in (*self.layers, *self.source_layers):
            layer.keep(rows)
        self.lengths, self.mask = self.lengths[rows], self.mask[rows]
        if self.source_layers:
            self.source_states, self.source_mask = self.source_states[rows], self.source_mask[rows]

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Logits [rows, vocabulary] after the last column of `ids`; `rows` are those of the batch, None: all."""
        model, device = self.language_model.model, self.language_model.device
        mask = None if mask is None else mask.long().to(device)
        if self.source_layers:
            states, source_mask = self.source_states, self.source_mask
            if rows is not None:
                states, source_mask = states[rows], source_mask[rows]
            inputs: dict[str, Any] = {
                "encoder_outputs": BaseModelOutput(last_hidden_state=states),  # pyright: ignore[reportArgumentType]
                "attention_mask": source_mask, "decoder_input_ids": ids.to(device), "decoder_attention_mask": mask,
            }  # fmt: skip
        else:
            inputs = {"input_ids": ids.to(device), "attention_mask": mask, "position_ids": positions.to(device)}
        with (
            torch.no_grad(),
            self.language_model.active(),
            autocast(device, self.precision),
            head_positions(model, lambda hidden: hidden[:, -1]),
        ):
            output = model(**inputs, past_key_values=self.cache, use_cache=True)
        return output.logits.squeeze(0).float().cpu()

    def _encode(self, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """What the encoder makes of each row's source, [rows, widest, hidden], and which of it counts; none is read twice."""
        model, device = self.language_model.model, self.language_model.device
        places: dict[tuple[int, ...], int] = {}
        which = torch.tensor([places.setdefault(tuple(source), len(places)) for source in sources])
        ids = padded(list(places)).to(device)
        lengths = torch.tensor([len(source) for source in places])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)
        together, encoder = max(1, PREFILL_TOKENS // max(1, ids.shape[1])), model.get_encoder()
        with torch.no_grad(), self.language_model.active(), autocast(device, self.precision):
            parts = [
                encoder(input_ids=part, attention_mask=counts).last_hidden_state
                for part, counts in zip(ids.split(together), mask.split(together))
            ]
        states = parts[0] if len(parts) == 1 else torch.cat(parts)
        return states[which], mask[which]

    def _prefill_groups(self, sources: Sequence[Sequence[int]] | None) -> list[_Prefill]:
        """Distinct prefixes (with their sources) in groups of similar length, the longest first."""
        sharers: dict[Any, list[int]] = {}
        for row, prefix in enumerate(self.prefixes):
            sharers.setdefault((tuple(prefix), None if sources is None else tuple(sources[row])), []).append(row)
        families = sorted(sharers.values(), key=lambda rows: -len(self.prefixes[rows[0]]))
        read = max(map(len, sources), default=0) if sources else 0
        groups: list[list[list[int]]] = []
        for family in families:
            longest = len(self.prefixes[groups[-1][0][0]]) if groups else 0
            alike = groups and len(self.prefixes[family[0]]) >= PREFILL_FILL * longest
            if alike and (len(groups[-1]) + 1) * (longest + read) <= PREFILL_TOKENS:
                groups[-1].append(family)
            else:
                groups.append([family])
        return [
            _Prefill(
                torch.tensor([family[0] for family in group]),
                torch.tensor([row for family in group for row in family]),
                torch.tensor([place for place, family in enumerate(group) for _ in family]),
                self.widest - len(self.prefixes[group[0][0]]),
            )
            for group in groups
        ]


def _decoder_layers(config: Any) -> int:
    """How many layers have a cache; encoder–decoders name those of their decoder."""
    named = [getattr(config, name, None) for name in ("num_decoder_layers", "decoder_layers")]
    return int(next((count for count in named if count), config.num_hidden_layers))
