"""Java in a process of its own that stays up: started when first asked, asked again when it dies, gone when we are."""

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

from rlgf.errors import RunError, UserError
from rlgf.scoring.extras import need

WORKER = Path(__file__).with_name("worker.py")
HEAP = "4g"  # what SPICE needs for long sentences; the tokenizer alone uses little of it
KEPT_LINES = 30  # of what Java last said on its standard error
INSTALL = (
    "install one (`apt install default-jre-headless`, `brew install openjdk`, `conda install openjdk`) "
    "or point JAVA_HOME at one"
)


class Java:
    """A handle on the worker process (`worker.py`).

    `ask` may be called from several threads. A worker that has died is started once more for the same question; if it dies
    again the question fails. The worker ends when its standard input does, so it never outlives this process.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.owner = 0  # the process that started it: after a fork the pipes belong to the parent
        self.version = ""
        self.said: deque[str] = deque(maxlen=KEPT_LINES)
        self.listener: threading.Thread | None = None

    def start(self) -> None:
        """See to it that the worker is up. Raises `UserError` where there is no Java, or one that is too old."""
        with self.lock:
            self._start()

    def ask(self, operation: str, **values: Any) -> Any:
        """The answer to a question (`worker.Libraries` has one method for each). Raises `RunError` where there is none."""
        question = json.dumps({"operation": operation, **values}) + "\n"
        with self.lock:
            answer = self._answer(question)
            if answer is None:
                self.close()  # it may not have ended yet, only its answers
                answer = self._answer(question)
            if answer is None:
                self.close()
        if answer is None:
            raise RunError(f"Java died twice at the same task ({operation}); the last it said: {self._last_words()}")
        if "refused" in answer:
            raise RunError(answer["refused"])
        if "error" in answer:
            raise RunError(f"Java failed at a task ({operation}): {answer['error']}; the last it said: {self._last_words()}")
        return answer["result"]

    def close(self) -> None:
        """End the worker, if it is up."""
        process, self.process = self.process, None
        if process is not None and self.owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(BrokenPipeError):  # it died with a question in the pipe
                    cast("IO[str]", pipe).close()

    def _start(self) -> None:
        if self.process is not None and self.owner == os.getpid() and self.process.poll() is None:
            return
        self.close()
        need("the PTB tokenizer", "captions", "jpype", "pycocoevalcap")
        settings = {"heap": HEAP, "package": str(package_folder())}
        self.said = deque(maxlen=KEPT_LINES)
        self.owner = os.getpid()
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8",
            errors="replace", start_new_session=True,  # an interrupt in the terminal is for us
            cwd=tempfile.gettempdir(),
        )  # fmt: skip
        self.listener = threading.Thread(target=_listen, args=(self.process, self.said), daemon=True)
        self.listener.start()
        answer = _read(self.process)
        if answer is None:
            self.close()
            raise UserError(f"Java died while it started; the last it said: {self._last_words()}")
        if "failed" in answer:
            self.close()
            raise UserError(f"Java 11 or newer is needed for these metrics, but {answer['failed']}: {INSTALL}.")
        self.version = answer["ready"]

    def _answer(self, question: str) -> dict[str, Any] | None:
        """One question put, and its answer read; None where the worker died of it."""
        self._start()
        process = cast("subprocess.Popen[str]", self.process)
        try:
            questions = cast("IO[str]", process.stdin)
            questions.write(question)
            questions.flush()
            return _read(process)
        except BrokenPipeError:
            return None
        except BaseException:  # interrupted: the answer would be taken for that of the next question
            self.close()
            raise

    def _last_words(self) -> str:
        if self.process is None and self.listener is not None:
            self.listener.join(5)
        said = [line for line in self.said if line]
        return " | ".join(said[-3:]) or "nothing"


def _read(process: "subprocess.Popen[str]") -> dict[str, Any] | None:
    """The next answer; None where the worker died before it had given it."""
    line = cast("IO[str]", process.stdout).readline()
    return json.loads(line) if line.endswith("\n") else None


def _listen(process: "subprocess.Popen[str]", said: deque[str]) -> None:
    """Keep the last lines of what Java says; a pipe that nobody reads would stop it."""
    with cast("IO[str]", process.stderr) as lines:
        for line in lines:
            said.append(line.strip())


def package_folder() -> Path:
    """Where pycocoevalcap, which brings the jars of the tokenizer, METEOR and SPICE, is installed."""
    found = importlib.util.find_spec("pycocoevalcap")
    return Path(next(iter(cast("list[str]", found and found.submodule_search_locations))))


JAVA = Java()
"""The one worker of this process."""

atexit.register(JAVA.close)
