"""Search for the largest micro-batch that fits in memory, in tokens.

On a CPU the size is a fixed number, on an accelerator the largest that fits, found by trying.
Micro-batches only split the data of an optimizer step: their size changes speed and memory, not
what is learned.
"""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from rlgf.config.runtime import MICRO_BATCH_TOKENS
from rlgf.errors import ConfigError, TrainingError
from rlgf.models.critic import Critic
from rlgf.models.forward import micro_batches, token_logits
from rlgf.models.language_model import LanguageModel
from rlgf.models.log_probs import token_log_probs
from rlgf.models.offload import on_device
from rlgf.types import Origin

T = TypeVar("T")

RESERVE = 10  # a tenth of the device's memory stays free


def searches_micro_batch_size(device: torch.device) -> bool:
    """Return whether the size of micro-batches on a device is to be found by trying."""
    return device.type != "cpu"


@dataclass(frozen=True)
class TrainedModels:
    """The models of an optimizer step, with their optimizers."""

    policy: LanguageModel
    critics: Mapping[Origin, Critic]
    policy_optimizer: torch.optim.Optimizer
    critic_optimizers: Mapping[Origin, torch.optim.Optimizer]  # empty if critics share the backbone
    precision: str

    def find_token_budget(self, rows: int, width: int, max_new_tokens: int) -> int:
        """Return the largest number of micro-batch tokens that fits in device memory.

        Args:
            rows: the rows of an optimizer step; more than their tokens are not tried.
            width: the length of the longest row.
            max_new_tokens: the number of its last tokens whose logits and values are computed.

        Raises:
            ConfigError: not even the smallest micro-batch fits.
        """
        return find_micro_batch_size(partial(self.probe, width=width, max_new_tokens=max_new_tokens), rows * width)

    def probe(self, max_tokens: int, width: int, max_new_tokens: int) -> None:
        """Run forward and backward on the largest micro-batch, to test that memory suffices.

        Memory is also allocated for the state of the optimizers, and a tenth of the device's memory
        as a reserve. No gradient or state is kept.

        Args:
            max_tokens: the tokens of the micro-batch.
            width: the length of the longest row.
            max_new_tokens: the number of its last tokens whose logits and values are computed.

        Raises:
            torch.OutOfMemoryError: the micro-batch does not fit.
        """
        policy = self.policy
        ids = torch.zeros((max(1, max_tokens // width), width), dtype=torch.int64)
        starts = torch.full((len(ids),), width - max_new_tokens)
        selected = (torch.arange(width) >= width - max_new_tokens).expand(len(ids), -1)
        optimizers = [self.policy_optimizer, *self.critic_optimizers.values()]
        trained = [p for o in optimizers for group in o.param_groups for p in group["params"] if p not in o.state]
        with ExitStack() as stack:
            for origin, critic in self.critics.items():
                stack.enter_context(on_device(critic, self.critic_optimizers.get(origin)))
            kept = [torch.empty_like(p) for p in trained for _ in range(2)]
            for batch in micro_batches(policy.model, ids, starts, selected, max_tokens):
                logits, hidden = token_logits(policy, batch, self.precision)
                loss = token_log_probs(logits, ids[batch.token_index].to(logits.device)).sum()
                for critic in self.critics.values():
                    loss = loss + critic(batch, self.precision, hidden if critic.backbone is None else None).sum()
                loss.backward()  # pyright: ignore[reportUnknownMemberType]
            kept.append(_reserve(policy.device))
        for optimizer in optimizers:
            optimizer.zero_grad()


def _reserve(device: torch.device) -> Any:
    """Allocate device memory that is to stay free."""
    total = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else 0
    return torch.empty(total // RESERVE, dtype=torch.uint8, device=device)


def run_within_memory(attempt: Callable[[int], T], token_budget: int, width: int) -> tuple[T, int]:
    """Run a task in smaller and smaller micro-batches until the memory of its device suffices.

    Args:
        attempt: called with the tokens of a micro-batch; must be repeatable after an error.
        token_budget: the tokens of the first attempt.
        width: the length of the longest row.

    Returns:
        The result, and the tokens of a micro-batch that sufficed.

    Raises:
        TrainingError: as `smaller_token_budget`.
    """
    while True:
        try:
            return attempt(token_budget), token_budget
        except (MemoryError, RuntimeError) as error:
            smaller = smaller_token_budget(error, token_budget, width)
        token_budget = smaller  # outside of the handler, whose error keeps the tensors alive


def smaller_token_budget(error: Exception, token_budget: int, width: int) -> int:
    """Return half of a token budget, after a device ran out of memory.

    Args:
        error: an error of an attempt; raised again if it is not about memory.
        token_budget: the tokens of a micro-batch.
        width: the length of the longest row.

    Raises:
        TrainingError: the memory of the host ran out, or the micro-batch is a single row.
    """
    on_device = isinstance(error, torch.OutOfMemoryError)
    if not on_device and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
        raise error
    if on_device and token_budget > width:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return max(width, token_budget // 2)
    place = "accelerator" if on_device else "host"
    raise TrainingError(
        f"the memory of the {place} is too small for micro-batches of {token_budget:,} tokens with rows of {width}: set "
        "runtime.token_budget or ppo.minibatch_size to less, train adapters (lora.rank), or shorten completions."
    ) from None


def find_micro_batch_size(attempt: Callable[[int], None], max_tokens: int) -> int:
    """Return the largest of 2,048, 4,096, 8,192, … tokens for which `attempt` succeeds.

    The first size that reaches `max_tokens` is the last one tried. `attempt` raises torch's
    out-of-memory error where a size does not fit. Raises ConfigError if none fits.
    """
    found, budget = 0, MICRO_BATCH_TOKENS
    while _fits(attempt, budget):
        found = budget
        if budget >= max_tokens:
            break
        budget *= 2
    if not found:
        raise ConfigError(
            f"a micro-batch of {MICRO_BATCH_TOKENS:,} tokens does not fit in the accelerator's memory: set "
            "runtime.token_budget to fewer, train adapters (lora.rank), or set runtime.offload."
        )
    return found


def _fits(attempt: Callable[[int], None], budget: int) -> bool:
    try:
        attempt(budget)
    except torch.OutOfMemoryError:
        return False
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return True
