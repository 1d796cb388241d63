"""Beam search by transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlgf.generation.base import BATCH_TOKENS, SampledCompletions
from rlgf.models.configs import decoder_opening
from rlgf.models.forward import autocast, cache_options, input_format, pad_rows
from rlgf.models.language_model import LanguageModel


def beam_search(
    language_model: LanguageModel,
    prefixes: Sequence[Sequence[int]],
    max_new_tokens: Sequence[int],
    min_new_tokens: Sequence[int],
    num_beams: int,
    precision: str,
    sources: Sequence[Sequence[int]] | None,
    with_cache: bool = True,
) -> SampledCompletions:
    """Return the most likely completions found by transformers' beam search with its defaults.

    Nothing is sampled, so the log-probabilities are zero and there is no support.
    """
    model, device, ends = language_model.model, language_model.device, list(language_model.eos_token_ids)
    rows, max_length = len(prefixes), max(max_new_tokens, default=0)
    tokens, lengths = torch.zeros((rows, max_length), dtype=torch.int64), torch.zeros(rows, dtype=torch.int64)
    ended_with_eos = torch.zeros(rows, dtype=torch.bool)
    opening = () if sources is None else decoder_opening(model)
    decoder_ids = [[*opening, *prefix] for prefix in prefixes]
    pads = input_format(model).rows in ("packed", "padded")
    options: dict[str, Any] = {} if with_cache else cache_options(model, False)
    if language_model.absent_ids is not None:
        options["suppress_tokens"] = language_model.absent_ids.tolist()
    groups: dict[tuple[int, int, int, int], list[int]] = {}
    for row in range(rows):
        if max_new_tokens[row]:
            source = 0 if pads or sources is None else len(sources[row])
            groups.setdefault((len(decoder_ids[row]), max_new_tokens[row], min_new_tokens[row], source), []).append(row)
    for (width, longest, shortest, _), indices in groups.items():
        # all beams of a batch run in one forward pass
        size = max(1, BATCH_TOKENS // 2 // (num_beams * (width + longest)))
        for batch in (indices[start : start + size] for start in range(0, len(indices), size)):
            ids = torch.tensor([decoder_ids[row] for row in batch], dtype=torch.int64).to(device)
            inputs: dict[str, Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            if sources is not None:
                encoder_ids = pad_rows([sources[row] for row in batch])
                mask = (torch.arange(encoder_ids.shape[1]) < torch.tensor([[len(sources[row])] for row in batch])).long()
                inputs = {"input_ids": encoder_ids.to(device), "attention_mask": mask.to(device), "decoder_input_ids": ids}
            with torch.no_grad(), language_model.activate(), autocast(device, precision):
                found = model.generate(
                    **inputs, num_beams=num_beams, do_sample=False, max_new_tokens=longest, min_new_tokens=shortest,
                    eos_token_id=ends, pad_token_id=ends[0], **options,
                )  # fmt: skip
            for row, text in zip(batch, found[:, width:].cpu()):
                ended = torch.isin(text, torch.tensor(ends)).nonzero().flatten().tolist()
                length = ended[0] + 1 if ended else len(text)
                tokens[row, :length], lengths[row], ended_with_eos[row] = text[:length], length, bool(ended)
    nothing = torch.zeros((rows, max_length))
    return SampledCompletions(tokens, lengths, ended_with_eos, nothing, nothing, None)
