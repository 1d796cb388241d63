"""Deferred handling of the signals that end a run.

`handle_signals` is entered by `rlgf.train` and by the command line. Code that must not be left in
the middle, such as an optimizer step, runs in a `deferred` block, whether or not there are
handlers.
"""

import signal
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from types import FrameType
from typing import Any, Protocol

from rlgf.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
GRACE_SECONDS = 20.0  # schedulers kill a process about 30 s after SIGTERM
# The same signal again within this time is not a second one: `timeout`, Slurm and `rlgf compare`
# may send it to a process and to its group.
REPEAT_SECONDS = 1.0

Report = Callable[[str], None]


def no_report(line: str) -> None:
    """Ignore the line."""


class Steps(Protocol):
    """The store of the last step of a training that a signal stops, `rlgf.runs.steps.StepStore`."""

    capture: Callable[[], Mapping[str, Any]] | None
    """Returns the state after the last step; the training sets it."""

    def load(self) -> dict[str, Any] | None:
        """Return the state of an earlier part of the training, or None."""
        ...


@dataclass
class _State:
    """The signal that arrived, and the block in which it waits."""

    grace_seconds: float = GRACE_SECONDS
    report: Report = no_report
    leave: Callable[[int], None] | None = None  # ends the process; None: raise `Interrupted`
    handled: bool = False  # handlers are installed
    work: str | None = None  # done before a signal takes effect; None: it takes effect at once
    number: int | None = None  # the first signal
    arrived: float = 0.0
    waits: bool = False  # the signal arrived in a deferred block and was not raised yet
    expired: bool = False  # the grace is over
    before_leaving: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])
    timers: list[threading.Timer] = field(default_factory=list[threading.Timer])
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while `_expire` sends its signal


_state = _State()


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextmanager
def handle_signals(
    grace_seconds: float = GRACE_SECONDS, report: Report = no_report, leave: Callable[[int], None] | None = None
) -> Generator[None]:
    """Raise `Interrupted` for the first of `SIGNALS` that arrives within the block.

    In a `deferred` block it is raised when that block ends, or `grace_seconds` later. A second
    signal calls `leave` with its number, or raises at once. The handlers before are restored at the
    end. A signal that is ignored (as under nohup) stays ignored, and outside of the main thread, in
    which alone Python runs handlers, nothing is changed. Blocks may be nested: the inner one
    replaces `grace_seconds` and `report`.
    """
    if not _in_main_thread():
        yield
        return
    before = (_state.grace_seconds, _state.report, _state.leave, _state.handled)
    previous = {} if _state.handled else {number: signal.getsignal(number) for number in SIGNALS}
    _state.grace_seconds, _state.report, _state.leave = grace_seconds, report, leave or _state.leave
    _state.handled = True
    ours = [number for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)]
    try:
        for number in ours:
            signal.signal(number, _on_signal)
        yield
    finally:
        if not before[-1]:
            with _state.lock:
                _state.number, _state.waits = None, False
            _cancel_timers()
        for number in ours:
            signal.signal(number, previous[number])
        _state.grace_seconds, _state.report, _state.leave, _state.handled = before
        _state.expired = _state.expired and _state.handled


def set_grace(seconds: float) -> None:
    """Set the seconds of grace of the handlers that are installed."""
    _state.grace_seconds = seconds


@contextmanager
def deferred(work: str) -> Generator[None]:
    """Defer a signal to the end of the block, at most by the grace period.

    `work` names what is finished first. After the grace `Interrupted` is raised within the block,
    which names the work as lost. An error of the block takes precedence over the signal.
    """
    if not _in_main_thread():
        yield
        return
    outer, _state.work = _state.work, work
    try:
        yield
    finally:
        _state.work = outer
    _raise_waiting()


@contextmanager
def immediate() -> Generator[None]:
    """Let signals take effect at once in a part of a `deferred` block."""
    if not _in_main_thread():
        yield
        return
    outer, _state.work = _state.work, None
    try:
        _raise_waiting()
        yield
    finally:
        _state.work = outer


@contextmanager
def before_leaving(call: Callable[[], None]) -> Generator[None]:
    """Call a function if a second signal ends the block at once."""
    _state.before_leaving.append(call)
    try:
        yield
    finally:
        _state.before_leaving.remove(call)


def _raise_waiting() -> None:
    """Raise for a signal that waited, unless there is an outer deferred block."""
    if _state.waits and _state.work is None:
        _state.waits = False
        _cancel_timers()
        assert _state.number is not None
        raise Interrupted(_state.number)


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Handle a signal in the main thread."""
    if _state.expired:  # this one is of `_expire`
        _state.expired = False
        if _state.waits:
            _state.waits = False
            raise Interrupted(_state.number or number, lost=_state.work or "")
        return
    now = time.monotonic()
    if _state.number is not None:
        if number != _state.number or now - _state.arrived > REPEAT_SECONDS:
            _leave(number)
        return
    _state.number, _state.arrived = number, now
    if _state.work is None:
        raise Interrupted(number)
    _state.waits = True
    _start_timer(_state.grace_seconds, _expire)
    with suppress(RuntimeError):  # the signal may have interrupted a write to the same stream
        _state.report(
            f"{signal.Signals(number).name}: {_state.work} is finished first, in {_state.grace_seconds:g} s at most; a second "
            "signal leaves at once"
        )


def _leave(number: int) -> None:
    """Leave at once after a second signal."""
    _state.waits = False
    _cancel_timers()
    for call in _state.before_leaving:
        call()
    if _state.leave is not None:
        _state.leave(number)
    raise Interrupted(number, lost=_state.work or "what was being done")


def _expire() -> None:
    """End the grace: raise in the main thread, and leave if that has no effect."""
    main, leave = threading.main_thread().ident, _state.leave
    with _state.lock:
        number = _state.number
        if number is None or main is None or not _state.waits:
            return
        if leave is not None:
            _start_timer(_state.grace_seconds, partial(leave, number))
        _state.expired = True
        signal.pthread_kill(main, number)


def _start_timer(seconds: float, call: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    _state.timers.append(timer)
    timer.start()


def _cancel_timers() -> None:
    for timer in _state.timers:
        timer.cancel()
    _state.timers.clear()
