"""The in-process decoder: completions of any prefix, each row independent of its batch.

A prefix is prefilled in one forward pass, once for all rows that share it; only the tokens after it
are decoded. Rows are aligned at the end of their prefixes, so all of them write the same column of
one preallocated key-value cache; finished rows are removed. An encoder–decoder encodes its
source once, and its prefixes are the first tokens of the decoder's output. The support of the
sampling distribution is returned with the tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from rlgf.generation.base import BATCH_TOKENS, SampledCompletions, SampleRequest
from rlgf.generation.beam_search import beam_search
from rlgf.generation.kv_cache import CacheLayer, EncoderCacheLayer, PrefillGroup
from rlgf.generation.sampling import sample_tokens
from rlgf.models.forward import autocast, is_encoder_decoder, pad_rows, restrict_lm_head
from rlgf.models.language_model import LanguageModel
from rlgf.models.log_probs import SampledSupport
from rlgf.models.offload import on_device
from rlgf.randomness import Purpose, uniform_rows
from rlgf.types import SamplingParams


def _assemble_support(support_ids: dict[tuple[int, int], Tensor], rows: int, max_length: int) -> SampledSupport:
    counts = torch.zeros((rows, max_length), dtype=torch.int64)
    order = sorted(support_ids)
    if order:
        places = torch.tensor(order)
        counts[places[:, 0], places[:, 1]] = torch.tensor([len(support_ids[key]) for key in order])
    flat = torch.cat([support_ids[key] for key in order]) if order else torch.zeros(0, dtype=torch.int64)
    return SampledSupport(counts, flat)


BATCH_LOGITS = 2**25  # logits sampled from at once, rows times vocabulary
# tokens prefilled at once: the activations of a layer take more memory than its cache
PREFILL_TOKENS = 4_096
# prefixes are prefilled together if the shortest has at least this fraction of the longest's length
PREFILL_FILL = 0.75


def sample_completions(
    language_model: LanguageModel,
    prefixes: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    min_new_tokens: Sequence[int],
    uniforms: NDArray[np.float64],
    sampling: SamplingParams,
    precision: str = "fp32",
    encoder_ids: Sequence[Sequence[int]] | None = None,
) -> SampledCompletions:
    """Sample at most `max_new_tokens[i]` tokens after each `prefixes[i]`.

    None of the first `min_new_tokens[i]` tokens is an EOS token. The prefix of a causal model is
    the prompt and the completion so far. An encoder–decoder has the prompt as `encoder_ids[i]`, and
    the completion so far, which may be empty, as its prefix.

    Token `s` of row `i` is sampled with `uniforms[i, s]` ([rows, max(max_new_tokens)]), by
    inverting the cumulative distribution in the order of token ids; so neither the other rows nor
    the composition of the batch affects a row.
    """
    if sampling.num_beams > 1:
        with on_device(language_model.model):
            return beam_search(
                language_model, prefixes, max_new_tokens, min_new_tokens, sampling.num_beams, precision, encoder_ids
            )
    rows, max_length = len(prefixes), max(max_new_tokens, default=0)
    tokens = torch.zeros((rows, max_length), dtype=torch.int64)
    lengths = torch.zeros(rows, dtype=torch.int64)
    finished = torch.zeros(rows, dtype=torch.bool)
    log_probs, full_log_probs = torch.zeros((rows, max_length)), torch.zeros((rows, max_length))
    support_ids: dict[tuple[int, int], Tensor] = {}
    if encoder_ids is not None:
        prefixes = [[language_model.model.config.decoder_start_token_id, *prefix] for prefix in prefixes]
    with on_device(language_model.model):
        for batch in _decoding_batches(language_model, prefixes, max_new_tokens, encoder_ids):
            members = [prefixes[i] for i in batch], None if encoder_ids is None else [encoder_ids[i] for i in batch]
            decoder = _Decoder(language_model, *members, max(max_new_tokens[i] for i in batch), precision)
            numbers = torch.from_numpy(uniforms[batch])
            max_lengths = torch.tensor([max_new_tokens[i] for i in batch])
            min_lengths = torch.tensor([min_new_tokens[i] for i in batch])
            logits = decoder.prefill()
            active = torch.tensor(batch)
            for step in range(max_length):
                forbidden = min_lengths > step
                sampled = sample_tokens(logits, numbers[:, step], forbidden, language_model.eos_token_ids, sampling)
                tokens[active, step] = sampled.tokens
                log_probs[active, step], full_log_probs[active, step] = sampled.log_probs, sampled.full_log_probs
                if sampled.support is not None:
                    parts = sampled.support.ids.split(sampled.support.counts.tolist())
                    support_ids.update({(row, step): part for row, part in zip(active.tolist(), parts)})
                lengths[active] = step + 1
                ended = torch.isin(sampled.tokens, torch.tensor(language_model.eos_token_ids))
                finished[active] = ended
                continuing = (~ended & (max_lengths > step + 1)).nonzero().squeeze(1)
                if len(continuing) == 0:
                    break
                if len(continuing) < len(active):
                    decoder.keep(continuing)
                    active, numbers = active[continuing], numbers[continuing]
                    max_lengths, min_lengths = max_lengths[continuing], min_lengths[continuing]
                logits = decoder.step(sampled.tokens[continuing])
    has_support = sampling.restricts_support and sampling.is_stochastic
    support = _assemble_support(support_ids, rows, max_length) if has_support else None
    return SampledCompletions(tokens, lengths, finished, log_probs, full_log_probs, support)


class LocalSampler:
    """The sampler of a model in this process."""

    def __init__(self, language_model: LanguageModel, precision: str = "fp32") -> None:
        self.language_model, self.precision = language_model, precision

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, seed: int, purpose: Purpose
    ) -> SampledCompletions:
        """Sample a completion of each request, with its own random numbers."""
        max_new_tokens = [request.max_new_tokens for request in requests]
        numbers = uniform_rows(
            seed, purpose, [request.index for request in requests], max(max_new_tokens, default=0),
            [request.position for request in requests],
        )  # fmt: skip
        prefixes, sources = [[*request.prompt_ids, *request.prefix_ids] for request in requests], None
        if is_encoder_decoder(self.language_model.model):
            prefixes = [list(request.prefix_ids) for request in requests]
            sources = [list(request.prompt_ids) for request in requests]
        min_new_tokens = [request.min_new_tokens for request in requests]
        return sample_completions(
            self.language_model, prefixes, max_new_tokens, min_new_tokens, numbers, params, self.precision, sources
        )

    def sync(self, policy: LanguageModel) -> None:
        """Do nothing: the model in this process is the one that is updated."""


def _needs_equal_lengths(model: Any) -> bool:
    """Return whether only prefixes of equal length can be decoded together.

    This holds for encoder–decoders that take the column of a token as its position.
    """
    return is_encoder_decoder(model) and not any(hasattr(module, "compute_bias") for module in model.modules())


def _decoding_batches(
    language_model: LanguageModel,
    prefixes: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    sources: Sequence[Sequence[int]] | None,
) -> list[list[int]]:
    """Group rows into batches that fit the cache.

    Within a batch, rows with a larger max_new_tokens come first, so that keeping rows is a slice.
    """
    one_length = _needs_equal_lengths(language_model.model)
    max_rows = max(1, BATCH_LOGITS // language_model.vocab_size)
    nonempty = [i for i in range(len(prefixes)) if max_new_tokens[i] > 0]
    nonempty.sort(key=lambda i: (len(prefixes[i]) if one_length else 0, -max_new_tokens[i], len(prefixes[i])))
    batches: list[list[int]] = []
    widest = (0, 0, 0)
    for i in nonempty:
        own = len(prefixes[i]), max_new_tokens[i], 0 if sources is None else len(sources[i])
        joint = tuple(map(max, widest, own))
        fits = batches and len(batches[-1]) < max_rows and (len(batches[-1]) + 1) * sum(joint) <= BATCH_TOKENS
        if fits and (not one_length or len(prefixes[i]) == len(prefixes[batches[-1][0]])):
            batches[-1].append(i)
            widest = joint
        else:
            batches.append([i])
            widest = own
    return batches


class _Decoder:
    """A batch of prefixes aligned at their ends: one prefill, then one column per step."""

    def __init__(
        self,
        language_model: LanguageModel,
        prefixes: Sequence[Sequence[int]],
        sources: Sequence[Sequence[int]] | None,
        max_new_tokens: int,
        precision: str,
    ) -> None:
        self.language_model, self.prefixes, self.precision = language_model, prefixes, precision
        self.lengths = torch.tensor([len(prefix) for prefix in prefixes])
        self.widest = int(self.lengths.max())
        self.mask = torch.arange(self.widest + max_new_tokens) >= (self.widest - self.lengths)[:, None]
        self.ragged = bool((self.lengths != self.widest).any())
        self.groups = self._prefill_groups(sources)
        depth = _decoder_layers(language_model.model.config)
        self.layers = [CacheLayer(len(prefixes), self.widest + max_new_tokens) for _ in range(depth)]
        self.source_layers: list[EncoderCacheLayer] = []
        self.cache: Any = Cache(layers=self.layers)  # pyright: ignore[reportArgumentType]
        if sources is not None:
            self.source_states, self.source_mask = self._encode(sources)
            self.source_layers = [EncoderCacheLayer(len(prefixes), self.source_mask.shape[1]) for _ in range(depth)]
            self.cache = EncoderDecoderCache(self.cache, Cache(layers=self.source_layers))  # pyright: ignore[reportArgumentType]

    def prefill(self) -> Tensor:
        """Prefill all prefixes and return the next-token logits, [rows, vocabulary]."""
        logits = torch.zeros(len(self.prefixes), self.language_model.vocab_size)
        for group in self.groups:
            members = [self.prefixes[i] for i in group.prefix_rows.tolist()]
            width = self.widest - group.first_column
            ids = torch.tensor([[0] * (width - len(prefix)) + list(prefix) for prefix in members])
            mask = self.mask[group.prefix_rows, group.first_column : self.widest]
            for layer in self.layers:
                layer.prefilling = group
            for layer in self.source_layers:
                layer.prefilling = PrefillGroup(group.prefix_rows, group.rows, group.prefix_index, 0)
            if self.source_layers:
                self.cache.is_updated = {}
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            following = self._forward(ids, positions, None if bool(mask.all()) else mask, group.prefix_rows)
            logits[group.rows] = following[group.prefix_index]
        for layer in self.layers:
            layer.prefilling, layer.filled = None, self.widest
        for layer in self.source_layers:
            layer.end_prefill()
        if self.source_layers:
            self.cache.is_updated = dict.fromkeys(range(len(self.source_layers)), True)
        return logits

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row and return the next-token logits, [rows, vocabulary]."""
        filled = self.layers[0].filled
        positions = (self.lengths + filled - self.widest)[:, None]
        return self._forward(tokens[:, None], positions, self.mask[:, : filled + 1] if self.ragged else None)

    def keep(self, rows: Tensor) -> None:
        """Remove all rows except these from the batch."""
        for layer in (*self.layers, *self.source_layers):
            layer.keep(rows)
        self.lengths, self.mask = self.lengths[rows], self.mask[rows]
        if self.source_layers:
            self.source_states, self.source_mask = self.source_states[rows], self.source_mask[rows]

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """Return the logits after the last column of `ids`, [rows, vocabulary].

        `rows` are the rows of the batch that `ids` belong to; None: all.
        """
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
            self.language_model.activate(),
            autocast(device, self.precision),
            restrict_lm_head(model, lambda hidden: hidden[:, -1]),
        ):
            output = model(**inputs, past_key_values=self.cache, use_cache=True)
        return output.logits.squeeze(0).float().cpu()

    def _encode(self, sources: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Return the encoder states of each row's source, [rows, width, hidden], and their mask.

        Equal sources are encoded once. The mask is [rows, width].
        """
        model, device = self.language_model.model, self.language_model.device
        places: dict[tuple[int, ...], int] = {}
        which = torch.tensor([places.setdefault(tuple(source), len(places)) for source in sources])
        ids = pad_rows(list(places)).to(device)
        lengths = torch.tensor([len(source) for source in places])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long().to(device)
        together, encoder = max(1, PREFILL_TOKENS // max(1, ids.shape[1])), model.get_encoder()
        with torch.no_grad(), self.language_model.activate(), autocast(device, self.precision):
            parts = [
                encoder(input_ids=part, attention_mask=counts).last_hidden_state
                for part, counts in zip(ids.split(together), mask.split(together))
            ]
        states = parts[0] if len(parts) == 1 else torch.cat(parts)
        return states[which], mask[which]

    def _prefill_groups(self, sources: Sequence[Sequence[int]] | None) -> list[PrefillGroup]:
        """Group distinct prefixes (with their sources) by similar length, the longest first."""
        rows_by_prefix: dict[Any, list[int]] = {}
        for row, prefix in enumerate(self.prefixes):
            rows_by_prefix.setdefault((tuple(prefix), None if sources is None else tuple(sources[row])), []).append(row)
        families = sorted(rows_by_prefix.values(), key=lambda rows: -len(self.prefixes[rows[0]]))
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
            PrefillGroup(
                torch.tensor([family[0] for family in group]),
                torch.tensor([row for family in group for row in family]),
                torch.tensor([place for place, family in enumerate(group) for _ in family]),
                self.widest - len(self.prefixes[group[0][0]]),
            )
            for group in groups
        ]


def _decoder_layers(config: Any) -> int:
    """Return the number of layers with a cache, for encoder–decoders those of the decoder."""
    named = [getattr(config, name, None) for name in ("num_decoder_layers", "decoder_layers")]
    return int(next((count for count in named if count), config.num_hidden_layers))
