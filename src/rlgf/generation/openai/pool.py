"""A pool of requests to one endpoint: concurrency, rate, retries, limits, cache and usage.

Its caller (a guide or a judge) decides what is sent and what a response means. The usage of a
response is counted where the response is used. It is stored next to the response for each run that
sent the request, and a replay of that run counts it again.
"""

import hashlib
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from rlgf.errors import TrainingError
from rlgf.generation.openai.cache import ResponseCache, cache_key
from rlgf.generation.openai.client import Server
from rlgf.generation.openai.refusals import RequestRefusedError
from rlgf.generation.openai.responses import InvalidError, PermanentError, ServerRequest, ServerResponse, TransientError
from rlgf.generation.openai.retries import call_with_retries
from rlgf.generation.openai.usage import UsageCounter

REPORT_PAUSES_ABOVE = 5.0  # seconds
REPORT_INTERVAL = 10.0  # seconds between reports

T = TypeVar("T")
KeyedResponse = tuple[str, dict[str, Any]]
"""A cache key and the stored response."""


class StoppedError(Exception):
    """A limit or a permanent failure of another request, after which none is sent."""


class RetriesExhaustedError(Exception):
    """A request whose retries are used up; later requests may succeed."""


@dataclass(frozen=True)
class PoolRequest:
    """A request and its samples; each is sent if all before it were invalid.

    `index` is part of the cache key, so that equal requests of two rows have their own responses.
    """

    index: int
    samples: Sequence[ServerRequest]


@dataclass(frozen=True)
class PoolResponse:
    """The stored responses to the samples of a request, up to the first valid one.

    Each has 'text', 'finished' and perhaps 'ids'; or 'invalid' (the reason), 'silent', 'refused' if
    the question was refused, and 'final' if no other sample would be answered; or 'given_up' (the
    failure). `is_new` is true if this run, or the run that it replays, sent the
    last one.
    """

    samples: Sequence[Mapping[str, Any]]
    is_new: bool

    @property
    def last(self) -> Mapping[str, Any]:
        """Return the response to the last sample."""
        return self.samples[-1]


def request_seed(seed: int, index: int, position: int, sample: int) -> int:
    """Return the seed of a server request, the same in whatever order responses arrive."""
    place = f"{seed}/{index}/{position}/{sample}"
    return int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big") >> 1  # servers accept seeds of 31 bits


class EndpointPool:
    """The requests to a `Server`, with the cache and the limits of its `EndpointConfig`.

    Failures raise `error`, whose sentences name the role of the server. `retry_forever` replaces
    the limit on retries. `run` identifies this run among those that share the cache. `sleep`
    replaces the pauses between retries; by default they end early when no more requests are sent.
    """

    def __init__(
        self, server: Server, cache: ResponseCache, report: Callable[[str], None] = lambda line: None, run: str = "",
        sleep: Callable[[float], None] | None = None, error: type[TrainingError] = TrainingError, retry_forever: bool = False,
    ) -> None:  # fmt: skip
        self.server, self.config, self.role, self.cache, self.run = server, server.config.endpoint, server.role, cache, run
        self._report, self._sleep, self._error, self._retry_forever = report, sleep, error, retry_forever
        self.usage = UsageCounter(self.config)
        self._server_key = server.key()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(self.config.concurrency)  # shared with prefetching
        self._stop_prefetching = threading.Event()
        self._in_flight: list[ThreadPoolExecutor] = []  # of calls that were interrupted
        self._next_start = 0.0  # earliest start of the next request under the rate limit
        self._last_report = -REPORT_INTERVAL  # time of the last report of a pause

    def complete(self, requests: Sequence[PoolRequest], use: Callable[[int, PoolResponse], T]) -> list[T]:
        """Return `use(row, response)` for each request; raise its first error.

        Requests without a cached response are sent concurrently. After an error none is sent.
        """
        cached = [self._collect_responses(request) for request in requests]
        missing = [row for row, keyed_responses in enumerate(cached) if not keyed_responses]

        def use_sent(row: int, stop: threading.Event) -> T:
            try:
                return use(row, self._count_usage(self._collect_responses(requests[row], stop)))
            except BaseException:
                stop.set()
                raise

        sent = iter(self._run_concurrently(use_sent, missing))
        return [
            use(row, self._count_usage(keyed_responses)) if keyed_responses else next(sent)
            for row, keyed_responses in enumerate(cached)
        ]

    def _run_concurrently(self, work: Callable[[int, threading.Event], T], rows: Sequence[int]) -> list[T]:
        """Return `work(row, stop)` of all rows; raise its first error once all have ended."""
        if not rows:
            return []
        stop = threading.Event()
        pool = ThreadPoolExecutor(min(self.config.concurrency, len(rows)), thread_name_prefix=self.role)
        try:
            futures = [pool.submit(work, row, stop) for row in rows]
            failures = [error for future in futures if (error := future.exception()) is not None]
        except KeyboardInterrupt:  # leaves at once; `wait` waits for the requests in flight, the others are cancelled
            self._in_flight.append(pool)
            raise
        finally:
            stop.set()
            pool.shutdown(wait=pool not in self._in_flight, cancel_futures=True)
        first = next((error for error in failures if not isinstance(error, StoppedError)), None)
        if first is not None:
            raise first
        return [future.result() for future in futures]

    def wait(self) -> None:
        """Wait for the requests that an interrupt left in flight; their responses are stored."""
        if self._in_flight:
            seconds = f"{self.config.timeout_seconds:g} s at most"
            self._report(f"{self.role}: waiting for requests in flight, {seconds}")
        while self._in_flight:
            self._in_flight.pop().shutdown(wait=True)

    def prefetch(self, requests: Sequence[PoolRequest]) -> None:
        """Send future requests, so that their responses are cached.

        Failures are ignored; `complete` sends such a request again.
        """
        if self.config.offline:
            return

        def fetch(request: PoolRequest) -> None:
            if not self._stop_prefetching.is_set():
                with suppress(Exception):
                    self._collect_responses(request, self._stop_prefetching)

        with ThreadPoolExecutor(self.config.concurrency, thread_name_prefix=f"{self.role} ahead") as pool:
            list(pool.map(fetch, requests))

    def stop_prefetching(self) -> None:
        """Start no more prefetching requests."""
        self._stop_prefetching.set()

    def _collect_responses(self, request: PoolRequest, stop: threading.Event | None = None) -> list[KeyedResponse]:
        """Return the responses to the samples of a request, up to the first valid one.

        Draws come from the cache or the server; without `stop` nothing is sent, and the result is
        empty if a sample is not cached.
        """
        keyed_responses: list[KeyedResponse] = []
        for server_request in request.samples:
            key = cache_key({**self._server_key, **server_request.key(), "index": request.index})
            stored = self._replay(key, request.index) if self.config.offline else self.cache.get(key)
            if stored is None:
                if stop is None:
                    return []
                stored = self._fetch(key, server_request, stop)
            keyed_responses.append((key, stored))
            if "invalid" not in stored or stored.get("final"):
                break
        return keyed_responses

    def _replay(self, key: str, index: int) -> dict[str, Any]:
        """Return the cached response, or this run's record that the request failed for good.

        The response includes its usage if this run sent the request. Raises if there is neither.
        """
        record = self.cache.get(self._record_key(key))
        if record is not None and "given_up" in record:
            return record
        stored = self.cache.get(key)
        if stored is None:
            raise self._error(
                f"the {self.role} is offline and the response for trajectory {index} is not in {self.cache.path}: "
                "run once with the server, or leave out --offline."
            )
        return {**stored, **(record or {})}

    def _fetch(self, key: str, server_request: ServerRequest, stop: threading.Event) -> dict[str, Any]:
        """Query the server and store the response for all runs, its usage for this run.

        If the retries are used up, stores and returns the record that it was given up.
        """
        try:
            stored = self._query_with_retries(key, server_request, stop)
        except RetriesExhaustedError as error:  # a replay of this run fails too; the next run retries
            stored = {"given_up": str(error), "took": self.usage.pending(key)}
            self.cache.put(self._record_key(key), stored, replace=True)
            return stored
        self.cache.put(self._record_key(key), {"took": self.usage.pending(key)}, replace=True)
        if not self.cache.put(key, stored):  # another process was first: both use its response
            return self.cache.get(key) or stored
        return stored

    def _record_key(self, key: str) -> str:
        """Return the cache key of this run's record of a request."""
        return f"{key}/{self.run}"

    def _count_usage(self, keyed_responses: Sequence[KeyedResponse]) -> PoolResponse:
        """Count the usage of all samples of a request that belong to this run.

        Draws belong to it if this run sent them, or replays the run that sent them.
        """
        are_new = [self.usage.use(key, stored.get("took") if self.config.offline else None) for key, stored in keyed_responses]
        return PoolResponse([stored for _, stored in keyed_responses], are_new[-1])

    def _query_with_retries(self, key: str, server_request: ServerRequest, stop: threading.Event) -> dict[str, Any]:
        """Send a request until the server responds, and return what the cache stores.

        An invalid response is also stored, so that a replay takes the same path.
        """

        def on_retry(error: Exception, pause: float) -> None:
            self._count_attempt(key, "retried")
            self._report_pause(f"{self.role}: {error}; retrying in", pause)

        try:
            return call_with_retries(
                lambda: self._query_once(key, server_request, stop), self.config, self._retry_forever,
                lambda seconds: self._pause(seconds, stop), on_retry,
            )  # fmt: skip
        except TransientError as cause:
            self._count_attempt(key, "given_up")
            raise RetriesExhaustedError(
                f"the {self.role} at {self.server.url} failed {self.config.retries + 1} times ({cause})"
            ) from None
        except PermanentError as error:
            self._count_attempt(key, "given_up")
            raise self._error(
                f"the {self.role} at {self.server.url} rejects requests ({error}): fix {self.role}.spec, its key or "
                "its options."
            ) from None

    def _query_once(self, key: str, server_request: ServerRequest, stop: threading.Event) -> dict[str, Any]:
        if stop.is_set():
            raise StoppedError
        self._start_request(stop)
        began = 0.0

        def again() -> None:
            self._count_attempt(key, "retried")
            self._start_request(stop)

        with self._slots:
            began = time.monotonic()
            try:
                response = self.server.send(server_request, again)
                stored: dict[str, Any] = {"text": response.text, "finished": response.finished}
                if response.ids is not None:
                    stored["ids"] = response.ids
            except InvalidError as error:
                response = ServerResponse("", False, error.usage)
                stored = {"invalid": str(error), "silent": error.is_empty}
                stored |= {"refused": True} if error.refused else {}
            except RequestRefusedError as error:
                self._count_attempt(key, "succeeded")
                return {"invalid": str(error), "silent": False, "refused": True, "final": True}
        usage = response.usage
        self._count_attempt(key, "succeeded")
        self.usage.add(key, {
            "responses_invalid": int("invalid" in stored), "responses_stripped": int(response.stripped),
            "prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens,
            "thinking_tokens": usage.thinking_tokens, "seconds": time.monotonic() - began,
        })  # fmt: skip
        if not usage.known and (self.config.max_tokens is not None or self.config.max_cost is not None):
            section = f"{self.role}.endpoint"
            raise self._error(
                f"the {self.role} at {self.server.url} reports no usage, so {section}.max_tokens and "
                f"{section}.max_cost cannot be enforced: leave them out and set {section}.max_requests."
            )
        return stored

    def _start_request(self, stop: threading.Event) -> None:
        """Wait for the rate limit and count a request; raise at any other limit."""
        self._take_turn(stop)
        reached = self.usage.start_request()
        if reached is not None:
            name, used, limit = reached
            raise self._error(
                f"the {self.role}'s budget is used up ({used:g} of {self.role}.endpoint.max_{name}={limit:g}): raise it and "
                "run the same command again; paid responses are cached."
            )

    def _count_attempt(self, key: str, outcome: str) -> None:
        self.usage.add(key, {"attempts": 1, outcome: 1})

    def _take_turn(self, stop: threading.Event) -> None:
        """Wait until the rate limit allows one more request."""
        if not self.config.requests_per_minute:
            return
        with self._lock:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + 60.0 / self.config.requests_per_minute
        self._pause(max(0.0, start - time.monotonic()), stop)
        if stop.is_set():
            raise StoppedError

    def _pause(self, seconds: float, stop: threading.Event) -> None:
        if self._sleep is not None:
            self._sleep(seconds)
        else:
            stop.wait(seconds)

    def _report_pause(self, what: str, seconds: float) -> None:
        """Report a long pause, at most once per interval."""
        with self._lock:
            is_quiet = seconds < REPORT_PAUSES_ABOVE or time.monotonic() - self._last_report < REPORT_INTERVAL
            self._last_report = self._last_report if is_quiet else time.monotonic()
        if not is_quiet:
            self._report(f"{what} {seconds:.0f} s")
