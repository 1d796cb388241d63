"""A guide on a server: concurrent requests, retries, cached responses, limits.

The seed of every request is made from (seed, trajectory index, position, draw), so the order in
which responses arrive has no effect. The usage of a response (requests, tokens) is counted where
the response is used, so prefetching does not change the counts either. It is stored next to the
response for each run that sent the request, and a replay of that run counts it again.
"""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rlgf.config.sections import GuideConfig
from rlgf.errors import GuideError
from rlgf.generation.openai.cache import ResponseCache, cache_key
from rlgf.generation.openai.client import Server
from rlgf.generation.openai.responses import InvalidError, PermanentError, ServerRequest, ServerResponse, TransientError
from rlgf.guides.base import Capabilities, Completion, CompletionRequest

COUNTS = (
    "attempts", "answered", "retried", "given_up", "rows_needed", "rows_answered", "rows_cached", "rows_given_up",
    "answers_invalid", "answers_stripped", "prompt_tokens", "completion_tokens", "thinking_tokens",
)  # fmt: skip


REPORT_PAUSES_ABOVE = 5.0  # seconds
REPORT_INTERVAL = 10.0  # seconds between reports


class StoppedError(Exception):
    """A limit or a permanent failure of another request, after which none is sent."""


class RowFailedError(Exception):
    """A request whose retries are used up; later requests may succeed."""


class RemoteGuide:
    """A guide on a `Server`, with the cache and the limits of the config.

    `run` identifies this run among those that share the cache. `sleep` replaces the pauses between
    retries; by default they end early when no more requests are sent.
    """

    def __init__(
        self, server: Server, config: GuideConfig, cache: ResponseCache, report: Callable[[str], None] = lambda line: None,
        run: str = "", sleep: Callable[[float], None] | None = None,
    ) -> None:  # fmt: skip
        self.run = run
        self.server, self.config, self.cache, self._report, self._sleep = server, config, cache, report, sleep
        self.capabilities = Capabilities(can_continue=server.can_continue, exact_length=server.exact)
        self.usage: Counter[str] = Counter()  # over the whole run
        self._continues = False  # true once the usage of an earlier part of the run was added
        self._num_started = 0  # requests of the whole run, including those in flight
        self._counts: dict[str, float] = {}  # since the last pop_metrics
        # by key, the usage of responses that no row has used yet
        self._pending_usage: dict[str, dict[str, float]] = {}
        self._server_key = self.server.key()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(config.concurrency)  # shared with prefetching
        self._stop_prefetching = threading.Event()
        self._next_start = 0.0  # earliest start of the next request under the rate limit
        self._last_report = -REPORT_INTERVAL  # time of the last report of a pause

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Return one completion for each request; raise `TrainingError` if one fails."""
        self._count("rows_needed", len(requests))
        kept = [self._draw(request) for request in requests]
        asked = iter(self._query_concurrently([request for request, drawn in zip(requests, kept) if not drawn]))
        return [self._use(request, drawn) if drawn else next(asked) for request, drawn in zip(requests, kept)]

    def _query_concurrently(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Send requests without a cached response concurrently and return their completions."""
        if not requests:
            return []
        stop = threading.Event()
        pool = ThreadPoolExecutor(min(self.config.concurrency, len(requests)), thread_name_prefix="guide")
        try:
            futures = [pool.submit(self._row, request, stop) for request in requests]
            failures = [error for future in futures if (error := future.exception()) is not None]
        except KeyboardInterrupt:
            self._report(f"guide: requests under way come to their end first, in {self.config.timeout_seconds:g} s at most")
            raise
        finally:  # also after an interrupt: finish and store requests in flight, cancel the rest
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        first = next((error for error in failures if not isinstance(error, StoppedError)), None)
        if first is not None:
            raise first
        return [future.result() for future in futures]

    def _row(self, request: CompletionRequest, stop: threading.Event) -> Completion:
        try:
            return self._use(request, self._draw(request, stop))
        except BaseException:
            stop.set()
            raise

    def prefetch(self, requests: Sequence[CompletionRequest]) -> None:
        """Send future requests, so that their responses are cached.

        Failures are ignored; `complete` sends such a request again.
        """
        if self.config.offline:
            return

        def fetch(request: CompletionRequest) -> None:
            if not self._stop_prefetching.is_set():
                with suppress(Exception):
                    self._draw(request, self._stop_prefetching)

        with ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="guide ahead") as pool:
            list(pool.map(fetch, requests))

    def stop_prefetching(self) -> None:
        """Start no more prefetching requests."""
        self._stop_prefetching.set()

    def pop_metrics(self) -> dict[str, float]:
        """Return the usage since the last call: requests, responses, tokens, cost.

        The keys are those of docs/metrics.md.
        """
        with self._lock:
            counts, self._counts = self._counts, {}
        found = {f"guide_{name}": counts.get(name, 0) for name in COUNTS}
        found["guide_latency_mean"] = counts.get("seconds", 0.0) / max(1, counts.get("answered", 0))
        cost = self.cost(counts)
        return found if cost is None else {**found, "guide_cost": cost}

    def cost(self, counts: Mapping[str, float]) -> float | None:
        """Return the cost of the counted tokens, or None if no price is configured."""
        if self.config.price_input is None or self.config.price_output is None:
            return None
        paid = (counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0))
        return (paid[0] * self.config.price_input + paid[1] * self.config.price_output) / 1e6

    def state(self) -> dict[str, float]:
        """Return the usage of the whole run, including its parts before a resume."""
        with self._lock:
            found: dict[str, float] = {**self.usage, "begun": self._num_started}
        cost = self.cost(self.usage)
        return found if cost is None else {**found, "cost": cost}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Add the usage of an earlier part of the run; a second call has no effect.

        Limits then apply to the whole run.
        """
        with self._lock:
            if self._continues:
                return
            self._continues = True
            self._num_started += int(state.get("begun", 0))
            self.usage.update({name: int(value) for name, value in state.items() if name not in ("begun", "cost")})

    def server_request(self, request: CompletionRequest, draw: int) -> ServerRequest:
        """Return the server request of a completion request.

        Its seed is made from seed, trajectory index, position and draw. With text, max_tokens is
        max_new_tokens times guide.tokens_per_policy_token; with token ids, max_new_tokens and
        min_new_tokens are exact.
        """
        place = f"{request.seed}/{request.index}/{len(request.prefix_ids)}/{draw}"
        # servers accept seeds of 31 bits
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big") >> 1
        if self.server.mode == "token_ids":
            minimum = min(request.min_new_tokens, request.max_new_tokens) if self.server.exact else 0
            return ServerRequest("", "", request.max_new_tokens, seed, (*request.prompt_ids, *request.prefix_ids), minimum)
        tokens = max(1, round(request.max_new_tokens * self.config.tokens_per_policy_token))
        return ServerRequest(request.prompt.text, request.prefix, tokens, seed)

    def _draw(self, request: CompletionRequest, stop: threading.Event | None = None) -> list[tuple[str, dict[str, Any]]]:
        """Return the draws of a request, up to the first valid one.

        Each is a pair of cache key and stored response. Draws come from the cache or the
        server; without `stop` nothing is sent, and the result is empty if a draw is not cached.
        """
        drawn: list[tuple[str, dict[str, Any]]] = []
        for draw in range(self.config.invalid_retries + 1):
            question = self.server_request(request, draw)
            key = cache_key({**self._server_key, **asdict(question), "index": request.index})
            stored = self._replay(key, request) if self.config.offline else self.cache.get(key)
            if stored is None:
                if stop is None:
                    return []
                stored = self._fetch(key, question, stop)
            drawn.append((key, stored))
            if "invalid" not in stored:
                break
        return drawn

    def _replay(self, key: str, request: CompletionRequest) -> dict[str, Any]:
        """Return the cached response, or the record that this run gave it up.

        The response includes its usage if this run sent the request. Raises `TrainingError` if
        there is neither.
        """
        record = self.cache.get(self._record_key(key))
        if record is not None and "given_up" in record:
            return record
        stored = self.cache.get(key)
        if stored is None:
            raise GuideError(
                f"the guide is offline and the answer for trajectory {request.index} is not in {self.cache.path}: "
                "run once with the server, or leave out --offline."
            )
        return {**stored, **(record or {})}

    def _fetch(self, key: str, question: ServerRequest, stop: threading.Event) -> dict[str, Any]:
        """Query the server and store the response for all runs, its usage for this run.

        If the retries are used up, stores and returns the record that it was given up.
        """
        try:
            stored = self._query_with_retries(key, question, stop)
        except RowFailedError as error:  # a replay of this run fails too; the next run retries
            stored = {"given_up": str(error), "took": self._usage_of(key)}
            self.cache.put(self._record_key(key), stored, replace=True)
            return stored
        self.cache.put(self._record_key(key), {"took": self._usage_of(key)}, replace=True)
        if not self.cache.put(key, stored):  # another process was first: both use its response
            return self.cache.get(key) or stored
        return stored

    def _record_key(self, key: str) -> str:
        """Return the cache key of this run's record of a request."""
        return f"{key}/{self.run}"

    def _use(self, request: CompletionRequest, drawn: Sequence[tuple[str, dict[str, Any]]]) -> Completion:
        """Return the completion of a row and count the usage of its draws."""
        fresh = [self._count_usage(key, stored) for key, stored in drawn]
        last = drawn[-1][1]
        text: Completion | None = None
        if "text" in last:
            ids = last.get("ids")
            text = Completion(last["text"], last["finished"], ids if ids is None else tuple(ids))
        elif request.prefix and all(stored.get("silent") for _, stored in drawn):
            text = Completion("", finished=True)  # every draw was empty: the prefix is complete
        if text is not None:
            self._count("rows_answered" if fresh[-1] else "rows_cached")
            return text
        self._count("rows_given_up")
        if self.config.on_failure == "policy":
            return Completion("", finished=True, failed=True)
        raise GuideError(
            last.get("given_up")
            or f"the guide gave no usable text for the prompt {request.prompt.text[:60]!r} in {len(drawn)} draws "
            f"({last['invalid']}): raise guide.invalid_retries, or choose another guide."
        )

    def _count_usage(self, key: str, stored: Mapping[str, Any]) -> bool:
        """Count the usage of a response if it belongs to this run; return whether it does.

        It does if this run sent the request, or replays the run that sent it.
        """
        with self._lock:
            took = self._pending_usage.pop(key, None)
            if took is None and self.config.offline:
                took = stored.get("took")
            for name, amount in (took or {}).items():
                self._counts[name] = self._counts.get(name, 0) + amount
        return took is not None

    def _query_with_retries(self, key: str, question: ServerRequest, stop: threading.Event) -> dict[str, Any]:
        """Send a request until the server responds, and return what the cache stores.

        An invalid response is also stored, so that a replay takes the same path.
        """
        from tenacity import (
            RetryError,
            Retrying,
            retry_if_exception_type,
            stop_after_attempt,
            stop_never,
            wait_exponential_jitter,
        )

        backoff = wait_exponential_jitter(multiplier=self.config.retry_seconds, max=60.0, jitter=self.config.retry_seconds)

        def wait(state: Any) -> float:
            error = state.outcome.exception()
            return max(backoff(state), error.retry_after if isinstance(error, TransientError) else 0.0)

        def before(state: Any) -> None:
            self._count_attempt(key, "retried")
            self._report_pause(f"guide: {state.outcome.exception()}; asked again in", state.upcoming_sleep)

        retrying = Retrying(
            stop=stop_never if self.config.on_failure == "wait" else stop_after_attempt(self.config.retries + 1),
            wait=wait,
            retry=retry_if_exception_type(TransientError),
            before_sleep=before,
            sleep=lambda seconds: self._pause(seconds, stop),
        )
        try:
            return retrying(self._query_once, key, question, stop)
        except RetryError as error:
            self._count_attempt(key, "given_up")
            cause = error.last_attempt.exception()
            raise RowFailedError(
                f"the guide at {self.server.url} failed {self.config.retries + 1} times ({cause}): run the same command again "
                "when it is back, raise guide.retries, or set guide.on_failure=wait."
            ) from None
        except PermanentError as error:
            self._count_attempt(key, "given_up")
            raise GuideError(
                f"the guide at {self.server.url} refuses ({error}): mend guide.spec, its key or its options."
            ) from None

    def _query_once(self, key: str, question: ServerRequest, stop: threading.Event) -> dict[str, Any]:
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
                answer = self.server.send(question, again)
                stored: dict[str, Any] = {"text": answer.text, "finished": answer.finished}
                if answer.ids is not None:
                    stored["ids"] = answer.ids
            except InvalidError as error:
                answer = ServerResponse("", False, error.usage)
                stored = {"invalid": str(error), "silent": error.is_empty}
        self._count_attempt(key, "answered")
        bill = answer.usage
        for name, amount in (
            ("answers_invalid", int("invalid" in stored)), ("answers_stripped", int(answer.stripped)),
            ("prompt_tokens", bill.prompt_tokens), ("completion_tokens", bill.completion_tokens),
            ("thinking_tokens", bill.thinking_tokens), ("seconds", time.monotonic() - began),
        ):  # fmt: skip
            self._add_usage(key, name, amount)
        if not bill.known and (self.config.max_tokens is not None or self.config.max_cost is not None):
            raise GuideError(
                f"the guide at {self.server.url} does not say what an answer costs, so guide.max_tokens and guide.max_cost "
                "cannot be kept: leave them out and set guide.max_requests."
            )
        return stored

    def _start_request(self, stop: threading.Event) -> None:
        """Wait for the rate limit and count one more request; raise if a limit is reached."""
        self._take_turn(stop)
        with self._lock:  # atomic, or concurrent requests could exceed a limit
            self._within_limits()
            self._num_started += 1

    def _within_limits(self) -> None:
        """Raise `TrainingError` once the limit on requests, tokens or cost is reached."""
        config, spent = self.config, self.usage
        tokens, cost = spent["prompt_tokens"] + spent["completion_tokens"], self.cost(spent)
        for name, used, most in (
            ("requests", self._num_started, config.max_requests),
            ("tokens", tokens, config.max_tokens),
            ("cost", cost, config.max_cost),
        ):
            if most is not None and used is not None and used >= most:
                raise GuideError(
                    f"the guide's budget is used up ({used:g} of guide.max_{name}={most:g}): raise it and run the same command "
                    "again; answers that were paid for are kept."
                )

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
            silent = seconds < REPORT_PAUSES_ABOVE or time.monotonic() - self._last_report < REPORT_INTERVAL
            self._last_report = self._last_report if silent else time.monotonic()
        if not silent:
            self._report(f"{what} {seconds:.0f} s")

    def _count_attempt(self, key: str, outcome: str) -> None:
        """Count one more attempt and its outcome.

        Both are counted together, so that the sums are consistent at any time.
        """
        self._add_usage(key, "attempts", 1)
        self._add_usage(key, outcome, 1)

    def _add_usage(self, key: str, name: str, amount: float) -> None:
        """Add to the usage of a request.

        The usage of the run includes it now, the metrics when the response is used.
        """
        with self._lock:
            took = self._pending_usage.setdefault(key, {})
            took[name] = took.get(name, 0) + amount
            if name != "seconds":
                self.usage[name] += int(amount)

    def _usage_of(self, key: str) -> dict[str, float]:
        """Return the usage of a request so far, except the time, for a replay."""
        with self._lock:
            return {name: amount for name, amount in self._pending_usage.get(key, {}).items() if name != "seconds"}

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount
