"""The decoder on our own key-value cache: one preallocated cache, written in place.

A prefix is prefilled in one forward pass, once for all rows that share it. Rows are aligned at the
end of their prefixes, so all of them write the same column of the cache; finished rows are removed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_outputs import MoEModelOutput

from rlgf.generation.kv_cache import CacheLayer, EncoderCacheLayer, PrefillGroup
from rlgf.models.configs import num_decoder_layers
from rlgf.models.forward import autocast, input_format, pad_rows, restrict_lm_head
from rlgf.models.language_model import LanguageModel

# tokens prefilled at once: the activations of a layer take more memory than its cache
PREFILL_TOKENS = 4_096
# prefixes are prefilled together if the shortest has at least this fraction of the longest's length
PREFILL_FILL = 0.75


class KeyValueDecoder:
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
        self.first_position = input_format(language_model.model).first_position
        self.lengths = torch.tensor([len(prefix) for prefix in prefixes])
        self.widest = int(self.lengths.max())
        self.mask = torch.arange(self.widest + max_new_tokens) >= (self.widest - self.lengths)[:, None]
        self.ragged = bool((self.lengths != self.widest).any())
        self.groups = self._prefill_groups(sources)
        depth = num_decoder_layers(language_model.model.config)
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
                "encoder_outputs": MoEModelOutput(last_hidden_state=states),  # pyright: ignore[reportArgumentType]
                "attention_mask": source_mask, "decoder_input_ids": ids.to(device), "decoder_attention_mask": mask,
            }  # fmt: skip
        else:
            positions = positions + self.first_position if self.first_position else positions
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
