"""Concurrent execution of two tasks on a CPU, each with half of its cores.

A model of a few million parameters cannot keep all cores busy: between its matrix products lies
work that one core does. Two models that share nothing fill each other's gaps. The second task, when
it is done, computes the gradients that the first one deferred.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlgf.distributed import is_distributed

S = TypeVar("S")
T = TypeVar("T")


class DeferredGradients:
    """Parameter gradients that are not needed at once, computed by the first idle thread.

    Gradients of one parameter are summed in the order in which they were deferred. Few wait at a
    time, to save memory.
    """

    MAX_WAITING = 6

    def __init__(self) -> None:
        self._waiting: deque[tuple[nn.Parameter, Callable[[], Tensor]]] = deque()
        self._computing: set[nn.Parameter] = set()
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._news, self._closed = threading.Condition(), False

    def defer(self, parameter: nn.Parameter, compute: Callable[[], Tensor]) -> None:
        """Queue the computation of a gradient of `parameter`, which `accumulate` adds."""
        while len(self._waiting) >= self.MAX_WAITING and self._compute_one():
            pass
        with self._news:
            self._waiting.append((parameter, compute))
            self._news.notify()

    def work(self) -> None:
        """Compute all queued gradients."""
        while self._compute_one():
            pass

    def work_until_closed(self) -> None:
        """Compute queued gradients until the queue is closed and empty."""
        while True:
            self.work()
            with self._news:
                if self._closed and not self._waiting:
                    return
                if self._next() is None:
                    self._news.wait()

    def close(self) -> None:
        """Close the queue: no more gradients will be deferred."""
        with self._news:
            self._closed = True
            self._news.notify()

    def accumulate(self) -> None:
        """Add the computed gradients to those of the parameters."""
        for parameter, gradient in self._sums.items():
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _next(self) -> int | None:
        """Return the index of the next gradient to compute, or None.

        Two gradients of one parameter are never computed at the same time.
        """
        return next((i for i, (parameter, _) in enumerate(self._waiting) if parameter not in self._computing), None)

    def _compute_one(self) -> bool:
        """Compute the next queued gradient; return False if there is none."""
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


def deferred_gradients() -> DeferredGradients | None:
    """Return the queue to which this thread may defer gradients, or None.

    It is None unless the thread runs the first task of a `ConcurrentPair`.
    """
    return getattr(_mine, "deferred", None)


class ConcurrentPair:
    """A runner of two concurrent tasks, with one persistent thread next to the caller's.

    Memory that a task of this thread frees is reused by the tasks after it.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="rlgf-second")

    def run(self, first: Callable[[], S], second: Callable[[], T]) -> tuple[S, T]:
        """Run both functions concurrently and return both results.

        They run one after the other with a single torch thread, and in distributed training, where
        collective sums must come in one order. If both fail, the first one's error is raised.
        """
        threads = torch.get_num_threads()
        if threads < 2 or is_distributed():
            return first(), second()
        queue = DeferredGradients()

        def run_second() -> T:
            torch.set_num_threads(threads // 2)
            result = second()
            queue.work_until_closed()
            return result

        waiting = self._executor.submit(run_second)
        try:
            torch.set_num_threads(threads - threads // 2)
            # with an odd thread count, results would depend on which task computes a gradient
            _mine.deferred = queue if threads % 2 == 0 else None
            result = first()
            queue.work()
        finally:
            _mine.deferred = None
            queue.close()
            waiting.exception()  # wait for the second task, even after an error
            torch.set_num_threads(threads)
        second_result = waiting.result()
        queue.accumulate()
        return result, second_result
