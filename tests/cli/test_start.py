"""The command line answers quickly: commands that only show something load no model library."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from rlgf.cli.app import app

COMMANDS = {
    "--help": "",
    "--version": "",
    "train --help": "",
    "list": "rlgf.config.schema",
    "show lols": "numpy",
    "show config": "rlgf.config.schema",
}
CODE = """
import os, sys
from rlgf.cli.app import main
for command in sys.argv[1:]:
    if child := os.fork():  # each command begins with what this process has loaded, and with nothing of the others
        os.waitpid(child, 0)
        continue
    sys.argv = ["rlgf", *command.split()]
    try:
        main()
    except SystemExit:
        pass
    heavy = {"torch", "transformers", "datasets", "rlgf.config.schema", "numpy"}
    print(f"\\n{command} loaded:", *sorted(heavy & set(sys.modules)), flush=True)
    os._exit(0)
"""


@pytest.mark.integration
def test_commands_that_show_something_load_only_what_they_need() -> None:
    ran = subprocess.run([sys.executable, "-c", CODE, *COMMANDS], capture_output=True, text=True, check=True)
    lines = [line.partition(" loaded:") for line in ran.stdout.splitlines() if " loaded:" in line]
    assert {command: loaded.strip() for command, _, loaded in lines} == COMMANDS


@pytest.mark.parametrize("defaults", [["lols", "--alpha", "0.8"], ["d2lols", "--alpha", "20"], ["ppo_pp", "--beta", "0.2"]])
def test_show_draws_the_same_defaults_with_and_without_the_config(defaults: list[str]) -> None:
    without, with_config = (CliRunner().invoke(app, ["show", *given]) for given in (defaults[:1], defaults))
    assert without.output == with_config.output
    assert "phase 0" in without.output
    assert CliRunner().invoke(app, ["show", *defaults[:2], "0.5" if defaults[0] != "d2lols" else "5"]).output != without.output
