"""While a user waits: a line within a second, and lines that wrap between words."""

import io
import subprocess
import sys

import pytest
from rich.console import Console

from rlgf.cli import terminal


def test_lines_wrap_between_words_in_a_terminal_and_nowhere_else() -> None:
    words = "supercalifragilistic " * 9
    for is_terminal in (True, False):
        text = io.StringIO()
        terminal.write(words.strip(), to=Console(file=text, force_terminal=is_terminal, width=80, highlight=False))
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        assert len(lines) == (3 if is_terminal else 1)
        assert all(line.endswith("supercalifragilistic") for line in lines)
        assert all(len(line) <= 80 for line in lines) == is_terminal


def test_loading_is_announced_before_the_libraries_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(terminal, "report", said.append)
    terminal.announce_loading()  # torch is loaded in the tests
    assert said == []
    monkeypatch.delitem(sys.modules, "torch")
    terminal.announce_loading()
    assert said == ["loading torch and transformers …"]


@pytest.mark.integration
@pytest.mark.parametrize(
    "command",
    ["train prompts --data nowhere --dry-run", "evaluate quickstart", "check task prompts"],
)
def test_a_command_says_something_before_it_imports_torch(command: str) -> None:
    code = (
        "import sys\n"
        "class Stop:\n"
        "    def find_spec(name, path, target=None):\n"
        "        if name == 'torch': sys.stderr.flush(); import os; os._exit(9)\n"
        "sys.meta_path.insert(0, Stop)\n"
        f"sys.argv = ['rlgf', *{command.split()!r}]\n"
        "from rlgf.cli.app import main; main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (9, "loading torch and transformers …\n")
