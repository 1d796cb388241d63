"""The command line: `rlgf train`, `compare`, `evaluate`, `score` and more (`rlgf --help`).

Slow libraries are imported inside the commands, so that `--help` and a mistyped key are fast.
"""

import os
import sys
from typing import Annotated

import typer

from rlgf import __version__
from rlgf.cli import check, compare, evaluate, inspect, train
from rlgf.cli.options import INTERRUPTED, InterruptedRunError
from rlgf.errors import RlgfError

app = typer.Typer(
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
app.add_typer(check_app, name="check")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Define the global options."""


def main() -> None:
    """Run the command line.

    Errors of rlgf are printed as one sentence, with exit code 2 (invalid use) or 3 (failed while
    running).
    """
    # Waiting threads sleep instead of spinning: as fast on a free machine, much faster on a busy
    # one (bench/busy_machine.py). GNU's OpenMP, which torch and the C kernels share, reads this
    # when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except RlgfError as error:
        _fail(str(error), error.exit_code)
    except InterruptedRunError as error:
        _fail(f"interrupted; {error}", INTERRUPTED)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _fail("interrupted; finished work is kept, and the same command resumes.", INTERRUPTED)
        raise


def _fail(message: str, code: int) -> None:
    from rlgf.cli import terminal

    terminal.fail(message)
    sys.exit(code)


if __name__ == "__main__":
    main()
