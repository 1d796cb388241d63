"""Prefetching of rollins from a slow guide while the policy trains.

Rollins do not depend on the policy. Prefetching only fills the cache, so the order of arrival has
no effect.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

from rlgf.guides.base import CompletionRequest
from rlgf.guides.remote import RemoteGuide


class Prefetcher:
    """A background thread that sends the requests of the next `ahead` iterations, in order."""

    def __init__(
        self, guide: RemoteGuide, requests_of: Callable[[int], Sequence[CompletionRequest]], ahead: int, iterations: int
    ) -> None:
        self.guide, self.requests_of, self.ahead, self.iterations = guide, requests_of, ahead, iterations
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._in_flight: dict[int, Future[None]] = {}

    def wait_for(self, iteration: int) -> None:
        """Wait for the prefetched requests of `iteration`, and start those of later ones."""
        for number in range(iteration + 1, min(iteration + 1 + self.ahead, self.iterations)):
            if number not in self._in_flight:
                requests = self.requests_of(number)
                self._in_flight[number] = self._pool.submit(self.guide.prefetch, requests)
        waiting = self._in_flight.pop(iteration, None)
        if waiting is not None:
            # RemoteGuide.complete sends a failed request again and raises there
            with suppress(Exception):
                waiting.result()

    def close(self) -> None:
        """Stop prefetching and wait for the requests in flight."""
        self.guide.stop_prefetching()
        self._pool.shutdown(wait=True, cancel_futures=True)
