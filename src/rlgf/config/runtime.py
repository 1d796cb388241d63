"""The section of the machine: devices, checkpoints, trackers."""

from typing import Literal

from rlgf.bounds import Flag, LengthOrZero, Pause, PositiveInt, SmallInt, SmallIntOrZero
from rlgf.config.base import section


@section
class RuntimeConfig:
    """The settings of the machine; with the defaults, CPU results do not depend on them.

    `device` is 'auto' (a CUDA or ROCm GPU if there is one, otherwise the CPU), 'cpu', 'cuda',
    'cuda:1' or another name of torch's. `token_budget` is the number of tokens in one micro-batch.
    With 0 it is 2,048, or for RL on a
    GPU the largest that fits, found at the start. `offload` lists models kept in host memory while
    the GPU does other work. `kernels` is 'auto', 'native' (required), 'torch' (nothing compiled),
    or 'off' (unchanged transformers).
    """

    threads: SmallIntOrZero = 0  # 0: OMP_NUM_THREADS, else all cores (set by the command line only)
    device: str = "auto"  # auto: the GPU if there is one, else the CPU
    precision: Literal["fp32", "bf16"] = "fp32"
    token_budget: LengthOrZero = 0  # tokens per micro-batch; 0: 2,048, or what fits for RL on a GPU
    offload: tuple[Literal["reference", "critic"], ...] = ()  # kept in host memory between uses
    kernels: Literal["auto", "native", "torch", "off"] = "auto"  # off: as in transformers
    checkpoint_every: PositiveInt = 10  # iterations; there is always one after the last
    keep_checkpoints: SmallInt = 2  # the newest ones; earlier ones are deleted
    on_nonfinite: Literal["stop", "skip"] = "stop"  # skip: leave the optimizer step out and count it
    max_skipped: PositiveInt = 10  # optimizer steps left out in a row before the run stops
    grace_seconds: Pause = 20.0  # after a signal, for the iteration or step to end
    trackers: tuple[str, ...] = ("tensorboard",)
    profile: Flag = False  # profile the second iteration into RUN/profile/

    @property
    def micro_batch_tokens(self) -> int:
        """Return the tokens per micro-batch unless the largest that fits is searched for."""
        return self.token_budget or MICRO_BATCH_TOKENS


MICRO_BATCH_TOKENS = 2048  # fewer cost a CPU more calls, more exceed its caches
