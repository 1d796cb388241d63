"""The decoder with transformers' own cache, for any causal model.

Keys and values, recurrent states, windows of convolutions, compressed caches: the model makes its
cache in the first call, and takes it back in the next. All prefixes of a batch have one length, and
so have their sources: nothing is padded.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoEModelOutput

from rlgf.models.forward import adapt_inputs, autocast, cache_options, input_format, restrict_lm_head
from rlgf.models.language_model import LanguageModel

CACHE_NAMES = ("past_key_values", "cache_params", "state")  # of transformers' outputs and arguments


class GeneralDecoder:
    """A batch of prefixes of equal length: one prefill, then one column per step.

    `path` is "select" if finished rows can be selected out of transformers' cache, "hold" if they
    run on until the batch ends, and "uncached" to evaluate the whole rows at each step.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        prefixes: Sequence[Sequence[int]],
        sources: Sequence[Sequence[int]] | None,
        precision: str,
        path: str,
    ) -> None:
        self.language_model, self.precision, self.path = language_model, precision, path
        device = language_model.device
        self.ids = torch.tensor([list(prefix) for prefix in prefixes], device=device)
        self.active = torch.arange(len(self.ids))  # rows of the cache that are still decoded
        self.cache: dict[str, Any] = {}
        self.states: Tensor | None = None
        if sources is not None:
            self.states = self._encode(torch.tensor([list(source) for source in sources], device=device))

    def prefill(self) -> Tensor:
        """Evaluate all prefixes and return the next-token logits, [rows, vocabulary]."""
        if self.path != "select":
            return self._forward(self.ids, 0)
        distinct, which = self._distinct()
        whole, self.ids = self.ids, self.ids[distinct]
        whole_states = self.states
        if whole_states is not None:
            self.states = whole_states[distinct]
        logits = self._forward(self.ids, 0)
        self.ids, self.states = whole, whole_states
        if len(distinct) < len(whole):
            self._select(which)
        return logits[which]

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row and return the next-token logits, [rows, vocabulary]."""
        column = self.ids[:, -1:].clone()  # finished rows repeat their last token
        column[self.active.to(column.device), 0] = tokens.to(column.device)
        past = self.ids.shape[1]
        self.ids = torch.cat([self.ids, column], 1)
        logits = self._forward(self.ids, 0) if self.path == "uncached" else self._forward(column, past)
        return logits[self.active]

    def keep(self, rows: Tensor) -> None:
        """Remove all rows except these from the batch."""
        if self.path == "hold":
            self.active = self.active[rows]
            return
        if self.path == "select":
            self._select(rows)
        here = rows.to(self.ids.device)
        self.ids, self.active = self.ids[here], torch.arange(len(rows))
        if self.states is not None:
            self.states = self.states[here]

    def _distinct(self) -> tuple[Tensor, Tensor]:
        """Return one row of each prefix, and for all rows which of these they equal."""
        if self.states is not None:  # equal prefixes may have different sources
            every = torch.arange(len(self.ids))
            return every, every
        places: dict[tuple[int, ...], int] = {}
        which = [places.setdefault(tuple(row), len(places)) for row in self.ids.tolist()]
        return torch.tensor([which.index(place) for place in range(len(places))]), torch.tensor(which)

    def _select(self, rows: Tensor) -> None:
        for cache in self.cache.values():
            assert isinstance(cache, Cache)
            cache.reorder_cache(rows.to(self.ids.device))  # pyright: ignore[reportArgumentType]

    def _encode(self, sources: Tensor) -> Tensor:
        """Return the encoder's states of sources of one length, [rows, width, hidden]."""
        model = self.language_model.model
        inputs = {"input_ids": sources, "attention_mask": torch.ones_like(sources)}
        if input_format(model).as_embeddings:
            inputs["inputs_embeds"] = model.get_encoder().get_input_embeddings()(inputs.pop("input_ids"))
        with torch.no_grad(), self.language_model.activate(), autocast(sources.device, self.precision):
            return model.get_encoder()(**inputs).last_hidden_state

    def _forward(self, ids: Tensor, past: int) -> Tensor:
        """Return the logits after the last column of `ids`, [rows, vocabulary]."""
        model, cached = self.language_model.model, self.path != "uncached"
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.states is not None:
            inputs = {
                "encoder_outputs": MoEModelOutput(last_hidden_state=self.states),  # pyright: ignore[reportArgumentType]
                "attention_mask": torch.ones(self.states.shape[:2], dtype=torch.int64, device=ids.device),
                "decoder_input_ids": ids,
            }
        with torch.no_grad(), self.language_model.activate(), autocast(ids.device, self.precision):
            inputs = adapt_inputs(model, inputs, past) | self.cache | cache_options(model, cached)
            if input_format(model).restricts_head:
                with restrict_lm_head(model, lambda hidden: hidden[:, -1]):
                    output = model(**inputs)
                logits = output.logits.squeeze(0)
            else:
                output = model(**inputs)
                logits = output.logits[:, -1]
        if cached:
            self.cache = {name: output[name] for name in CACHE_NAMES if name in output and output[name] is not None}
            if not self.cache:
                raise ValueError("the model returned no cache")
            if self.path == "select" and not all(isinstance(cache, Cache) for cache in self.cache.values()):
                raise ValueError("rows cannot be selected out of the model's cache")
        return logits.float().cpu()
