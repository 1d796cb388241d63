"""The command line answers quickly: commands that only show something load no model library."""

import subprocess
import sys

import pytest

CODE = """
import sys
from rlgf.cli.app import main
sys.argv = ["rlgf", *sys.argv[1:]]
try:
    main()
except SystemExit:
    pass
print("loaded:", sorted({"torch", "transformers", "datasets"} & set(sys.modules)))
"""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["list"], ["show", "lols"], ["show", "config"]])
def test_commands_that_show_something_load_no_model_library(arguments: list[str]) -> None:
    ran = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("loaded: []\n"), ran.stdout[-300:]
