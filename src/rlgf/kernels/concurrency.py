"""Two tasks at the same time on a CPU, each with half of its cores.

A model of a few million parameters cannot keep all cores busy: between its products lies work that one core does. Two models
that share nothing fill each other's gaps. What the first one lends out, the second one does when it is done with its own.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlgf.distributed import several

S = TypeVar("S")
T = TypeVar("T")


class Loans:
    """Gradients of parameters that nobody waits for, computed by whoever has the time.

    Those of one parameter are summed in the order they were lent in. Few wait at a time, so that little is kept in memory.
    """

    MOST = 6

    def __init__(self) -> None:
        self._waiting: deque[tuple[nn.Parameter, Callable[[], Tensor]]] = deque()
        self._computing: set[nn.Parameter] = set()
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._news, self._closed = threading.Condition(), False

    def lend(self, parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        """Let somebody compute a gradient of a parameter; it is added to its own by `settle`."""
        while len(self._waiting) >= self.MOST and self._compute_one():
            pass
        with self._news:
            self._waiting.append((parameter, compute))
            self._news.notify()

    def work(self) -> None:
        """Compute what waits."""
        while self._compute_one():
            pass

    def work_until_closed(self) -> None:
        """Compute whatever is lent until nothing more will be."""
        while True:
            self.work()
            with self._news:
                if self._closed and not self._waiting:
                    return
                if self._next() is None:
                    self._news.wait()

    def close(self) -> None:
        """Nothing more will be lent."""
        with self._news:
            self._closed = True
            self._news.notify()

    def settle(self) -> None:
        """Add the gradients to those that the parameters have."""
        for parameter, gradient in self._sums.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _next(self) -> int | None:
        """Which of those waiting is to be computed next: two of one parameter never at the same time."""
        return next((i for i, (parameter, _) in enumerate(self._waiting) if parameter not in self._computing), None)

    def _compute_one(self) -> bool:
        """Compute the first of those waiting; False where there is none."""
        with self._news:
            place = self._next()
            if place is None:
                return False
            parameter, compute = self._waiting[place]
            del self._waiting[place]
            self._computing.add(parameter)
        try:
            gradient = compute()
            known = self._sums.get(parameter)
            self._sums[parameter] = gradient if known is None else known.add_(gradient)
        finally:
            with self._news:
                self._computing.discard(parameter)
                self._news.notify()
        return True


_mine = threading.local()


def loans() -> Loans | None:
    """To whom the task of this thread may lend gradients; None where nobody is beside it."""
    return getattr(_mine, "loans", None)


class Lanes:
    """Keeps one thread beside the caller's; what its tasks free stays with it for the next ones."""

    def __init__(self) -> None:
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="rlgf-lane")

    def run(self, first: Callable[[], S], second: Callable[[], T]) -> tuple[S, T]:
        """What both return. One after the other with a single thread, or among processes, whose sums must come in one order.

        If both fail, the first one's error is raised.
        """
        threads = torch.get_num_threads()
        if threads < 2 or several():
            return first(), second()
        lent = Loans()

        def beside() -> T:
            torch.set_num_threads(threads // 2)
            result = second()
            lent.work_until_closed()
            return result

        waiting = self._beside.submit(beside)
        try:
            torch.set_num_threads(threads - threads // 2)
            # with an odd number of threads it would matter who computes a gradient
            _mine.loans = lent if threads % 2 == 0 else None
            result = first()
            lent.work()
        finally:
            _mine.loans = None
            lent.close()
            waiting.exception()  # the other one ends before anybody goes on
            torch.set_num_threads(threads)
        beside_result = waiting.result()
        lent.settle()
        return result, beside_result
