"""Status lines when their terminal has gone away."""

import errno
import io
import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest

from rlgf.cli.terminal import StatusStream


@pytest.mark.parametrize("error", [errno.EIO, errno.EPIPE, errno.ENOSPC])
def test_status_lines_are_dropped_when_the_terminal_has_gone_away(tmp_path: Path, error: int) -> None:
    class Gone(io.TextIOWrapper):
        def flush(self) -> None:
            raise OSError(error, os.strerror(error))

        def write(self, text: str, /) -> int:
            raise OSError(error, os.strerror(error))

    with (tmp_path / "lines").open("wb") as file:
        stream = StatusStream(Gone(file))
        assert stream.write("a line\n") == 7
        stream.flush()
        os.write(file.fileno(), b"dropped")
    assert (tmp_path / "lines").read_bytes() == b""


def test_a_terminal_that_hangs_up_is_a_signal_like_others(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from rlgf.cli import app\n"
        "from rlgf.interrupts import deferred\n"
        "def work():\n"
        "    with deferred('the work'):\n"
        "        app._report('it begins')\n"
        "        for _ in range(100):\n"
        "            time.sleep(0.05)\n"
        "            app._report('it goes on')\n"
        "            if os.path.exists(sys.argv[1]):\n"
        "                break\n"
        "    time.sleep(5)\n"
        "app.app = work\n"
        "app.main()\n"
    )
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", script, str(tmp_path / "gone")])
    while b"begins" not in os.read(terminal, 4096):
        pass
    os.close(terminal)
    time.sleep(0.3)
    (tmp_path / "gone").touch()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP


def test_a_status_stream_may_be_closed_after_what_it_writes_to(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="utf-8") as file:
        stream = StatusStream(file)
    stream.close()  # as Python does when it frees the stream
    assert file.closed
