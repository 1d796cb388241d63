"""Asking ahead: rollins do not depend on the policy, so a slow guide writes them while the policy trains.

Only the cache is filled, so the order of arrival changes nothing; who needs an answer later finds it there.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from rlgf.guides.base import Request
from rlgf.guides.remote import RemoteGuide


class Prefetcher:
    """Asks for the requests of the next `ahead` iterations, one iteration after the other, in the background."""

    def __init__(
        self, guide: RemoteGuide, requests_of: Callable[[int], Sequence[Request]], ahead: int, iterations: int
    ) -> None:
        self.guide, self.requests_of, self.ahead, self.iterations = guide, requests_of, ahead, iterations
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._under_way: dict[int, Future[None]] = {}

    def ready(self, iteration: int) -> None:
        """Wait until what was asked ahead for `iteration` is there, and have the following ones asked for."""
        for number in range(iteration + 1, min(iteration + 1 + self.ahead, self.iterations)):
            if number not in self._under_way:
                requests = self.requests_of(number)
                self._under_way[number] = self._pool.submit(self.guide.prefetch, requests)
        waiting = self._under_way.pop(iteration, None)
        if waiting is not None:
            with suppress(Exception):  # whoever needs the answer asks again, and fails in its own name
                waiting.result()

    def close(self) -> None:
        """Ask nothing more."""
        self.guide.stop_prefetching()
        self._pool.shutdown(wait=True, cancel_futures=True)
