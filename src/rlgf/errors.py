"""The errors of the library.

Every message is one sentence: the problem, its location and how to fix it.
"""

import difflib
import signal
from collections.abc import Iterable


class RlgfError(Exception):
    """The base of all errors that the library raises on purpose.

    `exit_code` is the exit status of the command line.

    Example:
        >>> try:
        ...     rlgf.recipe("quikstart")
        ... except rlgf.RlgfError as error:
        ...     print(error.exit_code, error)
        2 unknown recipe 'quikstart': did you mean 'quickstart'?
    """

    exit_code = 1
    """The exit status of the command line."""


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
        rlgf.errors.DataError: rows.jsonl, split train, row 1: there is no 'prompt'; ...
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
    """The end of a run by a signal; the message says what is kept or lost.

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


def unknown(kind: str, name: str, valid: Iterable[str]) -> ConfigError:
    """Return the error for a name not in `valid`, with the closest valid name."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(names)}."
    return ConfigError(f"unknown {kind} '{name}': {hint}")
