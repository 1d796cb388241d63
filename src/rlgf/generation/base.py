"""The result of sampling completions."""

from dataclasses import dataclass

from torch import Tensor

from rlgf.models.log_probs import SampledSupport

# bounds memory; changes samples only by rounding
BATCH_TOKENS = 32_768  # tokens in the key-value cache of one decoding batch


@dataclass(frozen=True)
class SampledCompletions:
    """Completions of a batch of prefixes, padded on the right.

    Log-probabilities are those of the sampled tokens; `width` is the largest max_new_tokens.
    """

    tokens: Tensor  # int64 [rows, width], 0 after a row's length
    lengths: Tensor  # int64 [rows]
    ended_with_eos: Tensor  # bool [rows], true if the row ended with an EOS token
    log_probs: Tensor  # float [rows, width], under the sampling distribution
    full_log_probs: Tensor  # float [rows, width], at temperature 1 over the whole vocabulary
    support: SampledSupport | None  # tokens kept by top-k or top-p; counts [rows, width]
