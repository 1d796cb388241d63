"""The sampler protocol: token ids in, token ids out, whichever engine generates them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rlgf.models.language_model import LanguageModel
from rlgf.models.log_probs import SampledSupport
from rlgf.randomness import Purpose
from rlgf.types import SamplingParams

# bounds memory; changes samples only by rounding
BATCH_TOKENS = 32_768  # tokens in the key-value cache of one decoding batch


@dataclass(frozen=True)
class SampleRequest:
    """A prompt and a prefix of its completion, which a model continues.

    A causal model takes both as one sequence; an encoder–decoder takes the prompt as its source.
    """

    prompt_ids: Sequence[int]
    prefix_ids: Sequence[int]  # the completion so far; may be empty
    max_new_tokens: int  # after the prefix
    min_new_tokens: int  # after the prefix; no EOS token before
    index: int  # the global trajectory index, which determines the random numbers
    position: int  # of the first new token's random number in the trajectory


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


class Sampler(Protocol):
    """The engine that generates the tokens of a model."""

    @property
    def is_exact(self) -> bool:
        """Return whether log-probabilities are the trainer's in fp32, up to rounding.

        They are for the trainer's own model in its own process. Sampler and trainer may then
        differ less (`rlgf.rl.agreement`).
        """
        ...

    def sample(
        self, requests: Sequence[SampleRequest], params: SamplingParams, seed: int, purpose: Purpose
    ) -> SampledCompletions:
        """Sample a completion of each request.

        A row depends on its request, `seed` and `purpose` alone, not on the rows next to it.
        """
        ...

    def sync(self, policy: LanguageModel) -> None:
        """Take over the policy's weights, after each update."""
        ...
