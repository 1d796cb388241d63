"""Signals: at once, after the work at hand, after the grace, and a second one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rlgf import interrupts
from rlgf.errors import Interrupted
from rlgf.interrupts import SIGNALS, before_leaving, deferred, handle_signals, immediate


def send(number: int = signal.SIGTERM) -> None:
    """Send a signal to this process; its handler runs before this returns."""
    os.kill(os.getpid(), number)


def interruption_of(work: Callable[[], None], **options: Any) -> Interrupted:
    """Run something under the handlers and return the interruption that ends it."""
    with pytest.raises(Interrupted) as caught, handle_signals(**options):
        work()
    return caught.value


@pytest.mark.parametrize("number", SIGNALS)
def test_each_signal_takes_effect_at_once_and_has_its_own_exit_code(number: int) -> None:
    def work() -> None:
        send(number)
        pytest.fail("the signal was ignored")

    error = interruption_of(work)
    assert str(error).startswith(f"interrupted by {signal.Signals(number).name}; finished work is kept")
    assert error.exit_code == 128 + number
    assert not error.lost


def test_a_signal_waits_for_the_end_of_deferred_work_and_says_so() -> None:
    done, lines = list[str](), list[str]()

    def work() -> None:
        with deferred("iteration 3 of 9"):
            with deferred("a step in it"):
                send()
            done.append("work")
        done.append("the next iteration")

    assert not interruption_of(work, grace_seconds=30, report=lines.append).lost
    assert done == ["work"]
    assert lines == ["SIGTERM: a step in it is finished first, in 30 s at most; a second signal leaves at once"]


def test_within_deferred_work_a_part_can_be_left_at_once() -> None:
    done = list[str]()

    def work() -> None:
        with deferred("iteration 1 of 2"):
            with immediate():
                send()
                done.append("completions")
            done.append("update")

    assert not interruption_of(work).lost
    assert not done


def test_a_signal_that_waits_ends_the_part_that_can_be_left() -> None:
    def work() -> None:
        with deferred("iteration 1 of 2"):
            send()
            with immediate():
                pytest.fail("the part began")

    assert not interruption_of(work).lost


def test_an_error_of_deferred_work_comes_before_the_signal() -> None:
    def work() -> None:
        with handle_signals(), deferred("iteration 1 of 2"):
            send()
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        work()


def test_after_the_grace_the_work_is_left_and_named_as_lost() -> None:
    def work() -> None:
        with deferred("iteration 3 of 9"):
            send(signal.SIGHUP)
            time.sleep(20)

    began = time.monotonic()
    error = interruption_of(work, grace_seconds=0.05)
    assert time.monotonic() - began < 10
    assert error.lost == "iteration 3 of 9"
    assert error.exit_code == 129


class LeftError(Exception):
    """The process would have ended here."""


def leave(number: int) -> None:
    raise LeftError(number)


def send_two(first: int, second: int) -> None:
    """Send two signals while work is done that is not left at once."""
    with deferred("iteration 1 of 2"):
        send(first)
        send(second)


def test_a_second_signal_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "REPEAT_SECONDS", 0.0)
    called = list[str]()
    with pytest.raises(LeftError, match="15"), handle_signals(leave=leave), before_leaving(lambda: called.append("kill")):
        send_two(signal.SIGTERM, signal.SIGTERM)
    assert called == ["kill"]


def test_a_second_signal_raises_at_once_where_the_process_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "REPEAT_SECONDS", 0.0)
    assert interruption_of(lambda: send_two(signal.SIGINT, signal.SIGINT)).lost == "iteration 1 of 2"


def test_the_same_signal_to_the_process_and_its_group_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "REPEAT_SECONDS", 60.0)
    assert not interruption_of(lambda: send_two(signal.SIGUSR1, signal.SIGUSR1), leave=leave).lost
    with pytest.raises(LeftError), handle_signals(leave=leave):  # another one is a second one
        send_two(signal.SIGUSR1, signal.SIGTERM)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in SIGNALS]


@contextmanager
def ignoring(number: int) -> Iterator[None]:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_the_handlers_before_are_restored_and_ignored_signals_stay_ignored() -> None:
    before = handlers()
    with ignoring(signal.SIGHUP), handle_signals():  # as under nohup
        assert signal.getsignal(signal.SIGTERM) not in before
        send(signal.SIGHUP)
        with handle_signals(grace_seconds=1.0):
            pass
        assert signal.getsignal(signal.SIGTERM) not in before  # the outer block still handles them
    assert handlers() == before
    with pytest.raises(Interrupted), handle_signals():
        send()
    assert handlers() == before


def test_other_threads_change_no_handler() -> None:
    before, seen = handlers(), list[list[object]]()

    def work() -> None:
        with handle_signals(), deferred("iteration 1 of 2"), immediate():
            seen.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


CHILD = """
import os, signal, sys, time
from rlgf import interrupts
from rlgf.cli import app
interrupts.REPEAT_SECONDS = 0.0

def work():
    interrupts.set_grace(0.1)
    with interrupts.deferred("iteration 1 of 2"):
        os.kill(os.getpid(), signal.SIGTERM)
        if sys.argv[1] == "twice":
            os.kill(os.getpid(), signal.SIGINT)
        while True:  # as a reward function that hangs
            try:
                time.sleep(60)
            except BaseException:
                pass

app.app = work
app.main()
"""


@pytest.mark.integration
@pytest.mark.parametrize(("how", "code", "name"), [("twice", 130, "SIGINT"), ("once", 143, "SIGTERM")])
def test_the_command_line_leaves_work_that_never_ends(how: str, code: int, name: str) -> None:
    ran = subprocess.run([sys.executable, "-c", CHILD, how], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == code, ran.stderr
    assert f"error: interrupted by {name}, left at once; the same command resumes" in ran.stderr
    assert "Traceback" not in ran.stderr
