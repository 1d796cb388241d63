"""The in-process decoder: completions of any prefix, each row independent of its batch.

A prefix is prefilled in one forward pass; only the tokens after it are decoded. An encoder–decoder
encodes its source once, and its prefixes are the first tokens of the decoder's output. The support
of the sampling distribution is returned with the tokens. `decoding_path` says which cache a model
needs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rlgf.generation.base import BATCH_TOKENS, SampledCompletions, SampleRequest
from rlgf.generation.beam_search import beam_search
from rlgf.generation.decoding_path import Decoder, decoding_path, new_decoder
from rlgf.generation.sampling import sample_tokens
from rlgf.models.configs import decoder_opening
from rlgf.models.forward import input_format, is_encoder_decoder, without_ids
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
            with_cache = decoding_path(language_model) != "uncached"
            return beam_search(
                language_model, prefixes, max_new_tokens, min_new_tokens, sampling.num_beams, precision, encoder_ids, with_cache
            )
    rows, max_length = len(prefixes), max(max_new_tokens, default=0)
    tokens = torch.zeros((rows, max_length), dtype=torch.int64)
    lengths = torch.zeros(rows, dtype=torch.int64)
    finished = torch.zeros(rows, dtype=torch.bool)
    log_probs, full_log_probs = torch.zeros((rows, max_length)), torch.zeros((rows, max_length))
    support_ids: dict[tuple[int, int], Tensor] = {}
    if encoder_ids is not None:
        opening = decoder_opening(language_model.model)
        prefixes = [[*opening, *prefix] for prefix in prefixes]
    with on_device(language_model.model):
        path = decoding_path(language_model)
        for batch in _decoding_batches(language_model, path, prefixes, max_new_tokens, encoder_ids):
            members = [prefixes[i] for i in batch], None if encoder_ids is None else [encoder_ids[i] for i in batch]
            decoder: Decoder = new_decoder(path, language_model, *members, max(max_new_tokens[i] for i in batch), precision)
            numbers = torch.from_numpy(uniforms[batch])
            max_lengths = torch.tensor([max_new_tokens[i] for i in batch])
            min_lengths = torch.tensor([min_new_tokens[i] for i in batch])
            logits = without_ids(decoder.prefill(), language_model.absent_ids)
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
                logits = without_ids(decoder.step(sampled.tokens[continuing]), language_model.absent_ids)
    has_support = sampling.restricts_support and sampling.is_stochastic
    support = _assemble_support(support_ids, rows, max_length) if has_support else None
    return SampledCompletions(tokens, lengths, finished, log_probs, full_log_probs, support)


class LocalSampler:
    """The sampler of a model in this process."""

    def __init__(self, language_model: LanguageModel, precision: str = "fp32") -> None:
        self.language_model, self.precision = language_model, precision

    @property
    def is_exact(self) -> bool:
        """Return whether the model computes in fp32, with unquantized weights."""
        return self.precision == "fp32" and not getattr(self.language_model.model, "is_quantized", False)

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


def _decoding_batches(
    language_model: LanguageModel,
    path: str,
    prefixes: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    sources: Sequence[Sequence[int]] | None,
) -> list[list[int]]:
    """Group rows into batches that fit the cache.

    Within a batch, rows with a larger max_new_tokens come first, so that keeping rows is a slice.
    """

    def length_group(row: int) -> tuple[int, int]:
        """Return the lengths in which the rows of a batch must be equal."""
        alike = path != "own" or _needs_equal_lengths(language_model.model)
        reads_alike = path != "own" and sources is not None
        return len(prefixes[row]) if alike else 0, len(sources[row]) if reads_alike and sources else 0

    max_rows = max(1, BATCH_LOGITS // language_model.vocab_size)
    if path != "own" and input_format(language_model.model).rows == "single":
        max_rows = 1
    nonempty = [i for i in range(len(prefixes)) if max_new_tokens[i] > 0]
    nonempty.sort(key=lambda i: (length_group(i), -max_new_tokens[i], len(prefixes[i])))
    batches: list[list[int]] = []
    widest = (0, 0, 0)
    for i in nonempty:
        own = len(prefixes[i]), max_new_tokens[i], 0 if sources is None else len(sources[i])
        joint = tuple(map(max, widest, own))
        fits = batches and len(batches[-1]) < max_rows and (len(batches[-1]) + 1) * sum(joint) <= BATCH_TOKENS
        if fits and length_group(i) == length_group(batches[-1][0]):
            batches[-1].append(i)
            widest = joint
        else:
            batches.append([i])
            widest = own
    return batches


def _needs_equal_lengths(model: Any) -> bool:
    """Return whether only prefixes of equal length can be decoded together.

    This holds for encoder–decoders that take the column of a token as its position.
    """
    return is_encoder_decoder(model) and not any(hasattr(module, "compute_bias") for module in model.modules())
