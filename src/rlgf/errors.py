"""The errors of the library.

Every message is one sentence: the problem, its location and how to fix it.
"""

import os
import re
import signal
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rlgf.credentials import mask_credentials
from rlgf.hints import closest
from rlgf.untrusted_text import describe_failure, escape_control_characters, shorten, shorten_sentence

MAX_LENGTH = 1000  # characters of a message
MAX_NAME = 60  # characters of a name in a message


class RlgfError(Exception):
    """The base of all errors that the library raises on purpose.

    `exit_code` is the exit status of the command line. Text from outside may be in the message, so
    its control characters are escaped and credentials masked.

    Example:
        >>> try:
        ...     rlgf.recipe("quikstart")
        ... except rlgf.RlgfError as error:
        ...     print(error.exit_code, error)
        2 unknown recipe 'quikstart': did you mean 'quickstart'?
    """

    exit_code = 1
    """The exit status of the command line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(shorten_sentence(escape_control_characters(mask_credentials(str(message))), MAX_LENGTH))


class ConfigError(RlgfError, ValueError):
    """A setting, name or model that cannot be used, found before any work.

    It is a `ValueError` as well.

    Example:
        >>> rlgf.override(rlgf.Config(), [("ppo.epoch", 4)])
        Traceback (most recent call last):
        rlgf.errors.ConfigError: override: unknown key 'ppo.epoch': did you mean 'ppo.epochs'?
    """

    exit_code = 2


class FieldError(ConfigError):
    """A field's value that cannot be used.

    The message begins with the field's name, and a config puts the name of its section before it.
    """


class DataError(RlgfError):
    """A dataset or file whose content cannot be used, found before any work.

    Example:
        >>> _ = Path("rows.jsonl").write_text('{"question": "2 + 2 ="}')
        >>> changes = [("task.data", "rows.jsonl"), ("reward.path", "ngram")]
        >>> config = rlgf.override(rlgf.recipe("prompts"), changes)
        >>> rlgf.prepare(config, Path("runs/stages"))
        Traceback (most recent call last):
        rlgf.errors.DataError: rows.jsonl, split train, line 1: there is no 'prompt'; ...
    """

    exit_code = 2


class TrainingError(RlgfError):
    """A failure while training or evaluating; during training a checkpoint is written first.

    Example:
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> try:
        ...     trainer = rlgf.train(config, out="runs/mine", stages="runs/stages")
        ... except rlgf.TrainingError as error:
        ...     print(error, "Fix it and run again: the run goes on from its checkpoint.")
    """

    exit_code = 3


class GuideError(TrainingError):
    """A guide that fails, or returns no completion for a request.

    Example:
        >>> class Silent:
        ...     capabilities = rlgf.Capabilities(can_continue=True)
        ...
        ...     def complete(self, requests):
        ...         return []
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> components = replace(rlgf.prepare(config, Path("runs/stages")), guide=Silent())
        >>> rlgf.Trainer(components).collect_rollout(0)
        Traceback (most recent call last):
        rlgf.errors.GuideError: the guide returned 0 completions for 4 requests: ...
    """


class RewardError(TrainingError):
    """A reward that fails, or returns no finite number for a completion.

    Example:
        >>> def reward(prompts, completions):
        ...     return [len(text) / 0 for text in completions]
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> components = replace(rlgf.prepare(config, Path("runs/stages")), reward=reward)
        >>> rlgf.Trainer(components).step(0)
        Traceback (most recent call last):
        rlgf.errors.RewardError: the reward failed on 4 completions (ZeroDivisionError: ...): ...
    """


class CheckpointError(TrainingError):
    """A checkpoint that cannot be loaded.

    Example:
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> try:
        ...     trainer = rlgf.train(config, out="runs/mine", stages="runs/stages")
        ... except rlgf.CheckpointError as error:
        ...     print(error, "Remove runs/mine/checkpoints to begin again.")
    """


class Interrupted(KeyboardInterrupt):
    """The end of a run by a signal; the message says what is lost.

    It is a `KeyboardInterrupt`, so that no `except Exception` takes it for a failure.

    Example:
        >>> config = rlgf.override(rlgf.recipe("quickstart"), small)
        >>> try:
        ...     trainer = rlgf.train(config, out="runs/mine", stages="runs/stages")
        ... except rlgf.Interrupted as error:
        ...     print(error.exit_code, error)
    """

    def __init__(self, number: int, message: str = "", lost: str = "") -> None:
        super().__init__(message)
        self.number = number
        self.message = message
        self.lost = lost
        """What the signal ended in the middle, such as 'iteration 3 of 9', or nothing."""

    def __str__(self) -> str:
        message = self.message or "finished work is kept, and the same command resumes."
        return f"interrupted by {signal.Signals(self.number).name}; {message}"

    @property
    def exit_code(self) -> int:
        """Return the exit status of the command line, 128 and the signal's number."""
        return 128 + self.number


INPUT_ERRORS = (ConfigError, DataError)
"""The errors that are found before any work is done."""

REFUSED_INPUTS = (
    AssertionError, AttributeError, ImportError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What models of transformers raise for inputs, a layer or a cache that they do not take."""

OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory|unable to mmap", re.IGNORECASE
)

USER_FAILURES = (Exception, SystemExit)
"""What a function of a user may raise; its `sys.exit` must not end a run as a success."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, which says nothing about what was tried."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error))))


def raise_if_out_of_memory(error: BaseException) -> None:
    """Raise an error again if memory ran out."""
    if is_out_of_memory(error):
        raise error


@contextmanager
def restored_state() -> Generator[None]:
    """Restore the working directory and PyTorch's settings after the block.

    Paths of a run may be relative to the first; the others (whether gradients are computed, the
    default type and device of tensors, the number of threads) decide the numbers of training.
    """
    torch: Any = sys.modules.get("torch")  # not imported here: names and errors must load fast
    before: dict[str, Any] = {"grad_mode": True} if torch is None else _torch_settings(torch)
    try:
        folder = os.getcwd()
    except FileNotFoundError:  # it was deleted
        folder = None
    try:
        yield
    finally:
        torch = sys.modules.get("torch")
        after = {} if torch is None else _torch_settings(torch)
        setters = {
            "grad_mode": "set_grad_enabled", "dtype": "set_default_dtype", "device": "set_default_device",
            "threads": "set_num_threads",
        }  # fmt: skip
        for name, setter in setters.items():
            if name in before and name in after and before[name] != after[name]:
                getattr(torch, setter)(None if name == "device" and str(before[name]) == "cpu" else before[name])
        with suppress(OSError):
            if folder is not None and (not os.path.exists(".") or not os.path.samefile(folder, ".")):
                os.chdir(folder)


def _torch_settings(torch: Any) -> dict[str, Any]:
    """Return the settings of PyTorch that a function may change for the code after it."""
    return {
        "grad_mode": torch.is_grad_enabled(), "dtype": torch.get_default_dtype(), "device": torch.get_default_device(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip


@contextmanager
def user_code(
    what: str, error: type[RlgfError], passed: type[RlgfError] = RlgfError, columns: Mapping[str, object] | None = None
) -> Generator[None]:
    """Convert failures of a user's code in the block to `error`, except `passed` ones.

    `what` begins the message, as in 'the task failed'; `columns` are those that the code may read
    as `prompt.columns`. `sys.exit` is a failure too, Ctrl-C is not. The working directory and the
    grad mode are restored afterwards.
    """
    try:
        with restored_state():
            yield
    except (passed, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as failure:  # also those that are no Exception: sys.exit, a cancelled task, a panic in Rust
        known = f"; prompt.columns has {list_columns(columns)}" if columns else ""
        if isinstance(failure, AttributeError | TypeError) and "Prompt" in str(failure):
            known += "; a prompt is a rlgf.Prompt, its text is prompt.text"
        raise error(
            f"{what} ({describe_failure(failure)}{known}): fix it and run again (with --accept-changes if its source changed)."
        ) from failure


def unknown(kind: str, name: str, valid: Iterable[str], prefix: str = "") -> ConfigError:
    """Return the error for a name not in `valid`, with the closest valid name.

    `prefix` is shown before each name.
    """
    names = sorted(valid)
    shown = shorten(name, MAX_NAME)
    close = closest(shown, names)
    listed = ", ".join(prefix + name for name in names)
    hint = f"did you mean '{prefix}{close}'?" if close else f"choose from: {listed}."
    return ConfigError(f"unknown {kind} '{prefix}{shown}': {hint}")


def list_columns(row: Mapping[str, object]) -> str:
    """Return the names of a row's columns, sorted, at most twelve, for an error."""
    names = [shorten(str(name), 40) for name in sorted(map(str, row))]
    more = f" and {len(names) - 12:,} more" if len(names) > 12 else ""
    return ", ".join(names[:12]) + more
