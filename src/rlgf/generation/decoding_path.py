"""The cache that a model is decoded with, found by trying.

Plain decoders are known by their classes to fit our own cache. For any other model the first of
these is used that gives the numbers of the forward pass without a cache: our own cache;
transformers' cache, rows selected out of it or held in it; no cache.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlgf.errors import REFUSED_INPUTS, raise_if_out_of_memory
from rlgf.generation.general_decoder import GeneralDecoder
from rlgf.generation.kv_decoder import KeyValueDecoder
from rlgf.models.configs import decoder_opening, model_type
from rlgf.models.forward import is_encoder_decoder
from rlgf.models.input_probe import agree, evaluate_rows, identity, is_plain, probe_lengths, probe_rows
from rlgf.models.language_model import LanguageModel

PATHS = ("own", "select", "hold", "uncached")
NEW_TOKENS = 4  # that are decoded to try a cache
LEFT_AFTER = 2  # of these, after which one row is removed

_known: dict[tuple[object, ...], str] = {}


class Decoder(Protocol):
    """A batch of prefixes that are continued token by token."""

    def prefill(self) -> Tensor:
        """Evaluate all prefixes and return the next-token logits, [rows, vocabulary]."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each row and return the next-token logits, [rows, vocabulary]."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Remove all rows except these from the batch."""
        ...


def new_decoder(
    path: str,
    language_model: LanguageModel,
    prefixes: Sequence[Sequence[int]],
    sources: Sequence[Sequence[int]] | None,
    max_new_tokens: int,
    precision: str,
) -> Decoder:
    """Return the decoder of a path for a batch."""
    if path == "own":
        return KeyValueDecoder(language_model, prefixes, sources, max_new_tokens, precision)
    return GeneralDecoder(language_model, prefixes, sources, precision, path)


def decoding_path(language_model: LanguageModel) -> str:
    """Return the path by which a model is decoded, one of `PATHS`."""
    model = language_model.model
    known = getattr(model, "_rlgf_decoding_path", None)
    if known is None:
        # a double in a test of the theory has keys and values too
        if not isinstance(model, PreTrainedModel) or is_plain(model):
            known = "own"
        else:
            key = (*identity(model), decoder_opening(model) if is_encoder_decoder(model) else ())
            known = _known.get(key) or _known.setdefault(key, _probe(language_model))
        language_model.model._rlgf_decoding_path = known
    return known


def _probe(language_model: LanguageModel) -> str:
    model = language_model.model
    was_training = model.training
    model.eval()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return next(path for path in PATHS if path == PATHS[-1] or _is_right(replace(language_model, adapter=None), path))
    finally:
        model.train(was_training)


def _is_right(language_model: LanguageModel, path: str) -> bool:
    """Return whether decoding by a path gives the numbers of the forward pass."""
    model, lengths = language_model.model, probe_lengths(language_model.model)
    own, reads = path == "own", is_encoder_decoder(model)
    # positions of an encoder–decoder are columns
    if not own or reads:
        lengths = [min(lengths)] * len(lengths)
    rows = probe_rows(model, [length + NEW_TOKENS for length in lengths], 2, with_padding=True)
    if not own:
        rows[1][: lengths[1]] = rows[0][: lengths[0]]  # equal prefixes are evaluated once
    sources = None
    if reads:
        sources = probe_rows(model, [6, 9, 4] if own else [6, 6, 6], 3)
    opening = decoder_opening(model) if reads else ()
    try:
        with language_model.activate():
            right = [
                evaluate_rows(model, [row], None if sources is None else [sources[place]])[0] for place, row in enumerate(rows)
            ]
        prefixes = [[*opening, *row[:length]] for row, length in zip(rows, lengths)]
        decoder = new_decoder(path, language_model, prefixes, sources, NEW_TOKENS, "fp32")
        logits, places = decoder.prefill(), torch.arange(len(rows))
        for step in range(NEW_TOKENS):
            # the state after `length + step` tokens; a start token is one more
            at = [lengths[place] + step - (0 if reads else 1) for place in places.tolist()]
            expected = [right[place][column][None] for place, column in zip(places.tolist(), at)]
            if not agree(model, expected, list(logits.log_softmax(1).split(1))):
                return False
            if step == LEFT_AFTER:
                kept = torch.tensor([0, 2])
                decoder.keep(kept)
                places = places[kept]
            tokens = torch.tensor([rows[place][lengths[place] + step] for place in places.tolist()])
            logits = decoder.step(tokens)
    except REFUSED_INPUTS as error:
        raise_if_out_of_memory(error)
        return False
    return True


def slower_path_note(language_model: LanguageModel) -> str | None:
    """Return a note if a model is decoded by a slower path, otherwise None."""
    path = decoding_path(language_model)
    if path == "own":
        return None
    cache = "without a cache" if path == "uncached" else "with transformers' cache"
    return f"a model of type '{model_type(language_model.model)}' is sampled {cache}, which is slower (docs/models.md)"
