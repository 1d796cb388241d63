"""The command line: `rlgf train`, `compare`, `evaluate`, `score` and more (`rlgf --help`).

Slow libraries are imported inside the commands, so that `--help` and a mistyped key are fast.
"""

import io
import os
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from rlgf import __version__
from rlgf.cli import check, compare, evaluate, inspect, train
from rlgf.errors import Interrupted, RlgfError
from rlgf.hints import option_hint
from rlgf.interrupts import handle_signals
from rlgf.runs.failures import as_sentences
from rlgf.untrusted_text import escape_control_characters

WAIT_POLICY = "OMP_WAIT_POLICY"
LOADAVG = Path("/proc/loadavg")  # its fourth field: the entities that run now, and all of them


class _InterruptedCommandError(Exception):
    """A wrapper of `Interrupted` that typer does not handle."""

    def __init__(self, interruption: Interrupted) -> None:
        super().__init__(str(interruption))
        self.interruption = interruption


class _Commands(TyperGroup):
    """The commands.

    An interruption keeps its message and its exit code, and usage errors show what was typed
    without control characters.
    """

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the command line."""
        with _passing_interruptions(), _escaped_usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with _passing_interruptions(), _escaped_usage_errors():
            return super().invoke(ctx)


@contextmanager
def _escaped_usage_errors() -> Generator[None]:
    """Escape the control characters in the message of a usage error within the block."""
    try:
        yield
    except Exception as error:
        option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
        if isinstance(option, str) and hasattr(error, "possibilities") and context is not None:
            known = [name for parameter in context.command.params for name in parameter.opts]
            hint = option_hint(option, known)
            error.message = f"No such option: {option}" + (f"; {hint}" if hint else "")  # pyright: ignore[reportAttributeAccessIssue]
            error.possibilities = None  # pyright: ignore[reportAttributeAccessIssue]
        message = getattr(error, "message", None)
        if isinstance(message, str) and hasattr(error, "format_message"):
            error.message = escape_control_characters(message)  # pyright: ignore[reportAttributeAccessIssue]
        raise


@contextmanager
def _passing_interruptions() -> Generator[None]:
    """Pass an interruption around typer, which would exit with its own code."""
    try:
        yield
    except KeyboardInterrupt as error:
        found = error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT)
        raise _InterruptedCommandError(found) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Reinforcement learning from guided feedback: a policy and a guide generate completions together, and "
    "the policy learns from their rewards.",
    epilog="Start with: rlgf compare quickstart --out runs/quickstart",
)
check_app = typer.Typer(no_args_is_help=True, help="Validate a part before training with it.")

COMMANDS = (
    train.train, compare.compare, compare.report, train.pretrain, train.sft, train.reward, train.merge, evaluate.evaluate,
    evaluate.score, inspect.download, inspect.samples, inspect.show, inspect.env,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.command("list")(inspect.list_)
check_app.command("guide")(check.check_guide)
check_app.command("task")(check.check_task)
check_app.command("model")(check.check_model)
app.add_typer(check_app, name="check")


def _version(wanted: bool) -> None:
    if wanted:
        from rlgf.cli import terminal

        terminal.write(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Define the global options."""


def choose_wait_policy() -> None:
    """Let waiting threads sleep instead of spinning, if other processes are running.

    Next to a busy process an iteration of a small model then takes about half as long; on a free
    machine it would take up to 1.4 times as long (bench/busy_machine.py). GNU's OpenMP, which torch
    and the C kernels share, reads the variable when torch is imported. One that is set stays.
    """
    if WAIT_POLICY not in os.environ and is_machine_busy():
        os.environ[WAIT_POLICY] = "PASSIVE"


def is_machine_busy(samples: int = 5, interval: float = 0.004) -> bool:
    """Return whether other processes or threads are running in most of the samples.

    Args:
        samples: the number of samples.
        interval: the seconds between two of them.

    Returns:
        False where the system does not say (only Linux has /proc/loadavg).
    """
    busy = 0
    for _ in range(samples):
        try:
            running = int(LOADAVG.read_text(encoding="ascii").split()[3].partition("/")[0])
        except (OSError, ValueError, IndexError):
            return False
        busy += running > 1  # this process is one of them
        time.sleep(interval)
    return busy > samples / 2


def main() -> None:
    """Run the command line.

    Errors of rlgf are printed as one sentence, with exit code 2 (invalid use) or 3 (failed while
    running). A signal ends the command with 128 plus its number, a second one at once.
    """
    choose_wait_policy()
    for stream in (sys.stdout, sys.stderr):  # of an encoding that may lack characters
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with handle_signals(report=_report, leave=_leave):
        from rlgf.cli import terminal

        if isinstance(sys.stderr, io.TextIOWrapper):
            sys.stderr = terminal.StatusStream(sys.stderr)
        try:
            with terminal.escape_warnings(), as_sentences():
                app()
        except RlgfError as error:
            _fail(str(error), error.exit_code)
        except _InterruptedCommandError as error:
            _end(error.interruption)
        except KeyboardInterrupt as error:
            _end(error if isinstance(error, Interrupted) else Interrupted(signal.SIGINT))
        except Exception as error:  # an error that no code expects
            terminal.print_traceback(error)
            sys.exit(1)


def _report(line: str) -> None:
    from rlgf.cli import terminal

    terminal.report(line)


def _fail(message: str, code: int) -> NoReturn:
    from rlgf.cli import terminal

    terminal.fail(message)
    sys.exit(code)


def _end(interruption: Interrupted) -> NoReturn:
    """End the command after a signal."""
    if not interruption.lost:
        _fail(str(interruption), interruption.exit_code)
    with suppress(SystemExit):
        _fail(str(interruption), interruption.exit_code)
    os._exit(interruption.exit_code)  # the thread of what was left may never end


def _leave(number: int) -> None:
    """Leave the process at once; a handler may not write to a stream."""
    name = signal.Signals(number).name
    with suppress(OSError):  # a terminal that hung up
        os.write(2, f"error: interrupted by {name}, left at once; the same command resumes from what was saved.\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()
