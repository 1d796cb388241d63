"""Two tasks at the same time on a CPU, each with half of its cores.

A model of a few million parameters cannot keep all cores busy: between its products lies work that one core does. Two models
that share nothing fill each other's gaps.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from rlgf.processes import several

S = TypeVar("S")
T = TypeVar("T")


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

        def beside() -> T:
            torch.set_num_threads(threads // 2)
            return second()

        waiting = self._beside.submit(beside)
        try:
            torch.set_num_threads(threads - threads // 2)
            result = first()
        finally:
            waiting.exception()  # the other one ends before anybody goes on
            torch.set_num_threads(threads)
        return result, waiting.result()
