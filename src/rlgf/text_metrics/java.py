"""A persistent Java worker process: started on first use, restarted if it dies."""

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import IO, Any, cast

from rlgf.errors import ConfigError, TrainingError
from rlgf.text_metrics.optional import require_extra

WORKER = Path(__file__).with_name("worker.py")
HEAP = "4g"  # SPICE needs it for long sentences; the tokenizer uses little of it
KEPT_LINES = 30  # last lines of the standard error of Java
INSTALL = (
    "install one (`apt install default-jre-headless`, `brew install openjdk`, `conda install openjdk`) "
    "or point JAVA_HOME at one"
)


class Java:
    """A handle on the worker process (`worker.py`).

    `ask` may be called from several threads. A worker that died is restarted once for the same
    request; if it dies again the request fails. The worker ends when its standard input is closed,
    so it never outlives this process.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0  # PID that started it: after a fork the pipes belong to the parent
        self.version = ""
        self.stderr_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.listener: threading.Thread | None = None

    def start(self) -> None:
        """Start the worker unless it runs; raise `ConfigError` if Java is missing or too old."""
        with self.lock:
            self._start()

    def request(self, operation: str, **values: Any) -> Any:
        """Send a request to the worker and return the result.

        `operation` is a method of `worker.Libraries`, `values` are its arguments. Raises
        `TrainingError` if the worker fails.
        """
        question = json.dumps({"operation": operation, **values}) + "\n"
        with self.lock:
            response = self._answer(question)
            if response is None:
                self.close()  # the process may still run after closing its output
                response = self._answer(question)
            if response is None:
                self.close()
        if response is None:
            raise TrainingError(
                f"the Java process crashed twice at the same operation ({operation}); its last output: {self._last_stderr()}"
            )
        if "refused" in response:
            raise TrainingError(response["refused"])
        if "error" in response:
            raise TrainingError(
                f"the Java process failed at an operation ({operation}): {response['error']}; its last output: "
                f"{self._last_stderr()}"
            )
        return response["result"]

    def close(self) -> None:
        """End the worker if it runs."""
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):  # it died with a request in the pipe
                    cast("IO[str]", pipe).close()

    def _start(self) -> None:
        if self.process is not None and self.owner == os.getpid() and self.process.poll() is None:
            return
        self.close()
        require_extra("the PTB tokenizer", "captions", "jpype", "pycocoevalcap")
        settings = {"heap": HEAP, "package": str(package_folder())}
        self.stderr_lines = deque(maxlen=KEPT_LINES)
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
            errors="replace", start_new_session=True,  # Ctrl-C must not reach the worker
            cwd=tempfile.gettempdir(),
        )  # fmt: skip
        self.listener = threading.Thread(target=_listen, args=(self.process, self.stderr_lines), daemon=True)
        self.listener.start()
        response = _read(self.process)
        if response is None:
            self.close()
            raise ConfigError(f"the Java process crashed at startup; its last output: {self._last_stderr()}")
        if "failed" in response:
            self.close()
            raise ConfigError(f"Java 11 or newer is needed for these metrics, but {response['failed']}: {INSTALL}.")
        self.version = response["ready"]

    def _answer(self, question: str) -> dict[str, Any] | None:
        """Send one request and return the response; None if the worker died."""
        self._start()
        process = cast("subprocess.Popen[str]", self.process)
        try:
            questions = cast("IO[str]", process.stdin)
            questions.write(question)
            questions.flush()
            return _read(process)
        except BrokenPipeError:
            return None
        except BaseException:  # after an interrupt the next request would get this response
            self.close()
            raise

    def _last_stderr(self) -> str:
        if self.process is None and self.listener is not None:
            self.listener.join(5)
        lines = [line for line in self.stderr_lines if line]
        return " | ".join(lines[-3:]) or "nothing"


def _read(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """Return the next response; None if the worker died before."""
    line = cast("IO[str]", process.stdout).readline()
    return json.loads(line) if line.endswith("\n") else None


def _listen(process: "subprocess.Popen[str]", last_lines: deque[str]) -> None:
    """Store the last lines of Java's standard error; a full pipe would block it."""
    with cast("IO[str]", process.stderr) as lines:
        for line in lines:
            last_lines.append(line.strip())


def package_folder() -> Path:
    """Return the folder of the installed package pycocoevalcap.

    It contains the jars of the tokenizer, METEOR and SPICE.
    """
    found = importlib.util.find_spec("pycocoevalcap")
    return Path(next(iter(cast("list[str]", found and found.submodule_search_locations))))


JAVA = Java()
"""The worker of this process."""

atexit.register(JAVA.close)
