"""A guide outside this process: asked side by side, again where that helps, never twice for the same thing, within limits.

Every draw of a server is made from (seed, trajectory, position, attempt), so the order in which answers arrive changes nothing.
"""

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rlgf.config import GuideConfig
from rlgf.errors import RunError
from rlgf.guides.base import Capabilities, Request, Text
from rlgf.guides.cache import AnswerCache, key_of
from rlgf.guides.server import Answer, InvalidError, PermanentError, Question, Server, TransientError

COUNTS = (
    "attempts", "answered", "retried", "given_up", "rows_needed", "rows_answered", "rows_cached", "rows_given_up",
    "answers_invalid", "answers_stripped", "prompt_tokens", "completion_tokens",
)  # fmt: skip


GIVEN_UP = "/given up"


class StoppedError(Exception):
    """A limit was reached, or another question has failed for good: what is not under way is not asked any more."""


class RowFailedError(Exception):
    """One text cannot be had, though the server may be well: retries or draws are used up."""


class RemoteGuide:
    """Any number of questions to a `Server`, through the cache, under the limits of the config."""

    def __init__(
        self, server: Server, config: GuideConfig, cache: AnswerCache, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self.server, self.config, self.cache, self._sleep = server, config, cache, sleep
        self.capabilities = Capabilities(can_finish=server.can_finish)
        self.spent: Counter[str] = Counter()  # over the whole run
        self._begun = 0  # requests over the whole run, those under way included
        self._counts: Counter[str] = Counter()  # since they were last taken
        self._latencies: list[float] = []
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(config.concurrency)  # shared by what is needed now and what is asked ahead
        self._prefetched: set[str] = set()  # keys of answers that were asked for ahead in this process
        self._stop_prefetching = threading.Event()
        self._next_start = 0.0  # when the rate limit lets the next request begin

    def complete(self, requests: Sequence[Request]) -> list[Text]:
        """One text for each request; `RunError` where one cannot be had."""
        self._count("rows_needed", len(requests))
        stop = threading.Event()
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            futures = [pool.submit(self._row, request, stop) for request in requests]
        failures = [error for future in futures if (error := future.exception()) is not None]
        first = next((error for error in failures if not isinstance(error, StoppedError)), None)
        if first is not None:
            raise first
        return [future.result() for future in futures]

    def prefetch(self, requests: Sequence[Request]) -> None:
        """Put the answers to requests that will come into the cache. Failures are left to whoever needs the answer."""
        if self.config.offline:
            return

        def fetch(request: Request) -> None:
            if not self._stop_prefetching.is_set():
                with suppress(Exception):
                    self._answer(request, self._stop_prefetching, ahead=True)

        with ThreadPoolExecutor(self.config.concurrency) as pool:
            list(pool.map(fetch, requests))

    def stop_prefetching(self) -> None:
        """Begin no more requests ahead."""
        self._stop_prefetching.set()

    def take_counts(self) -> dict[str, float]:
        """What was asked, answered and paid since the last call; keys as in docs/metrics.md."""
        with self._lock:
            counts, self._counts = self._counts, Counter()
            latencies, self._latencies = self._latencies, []
        found: dict[str, float] = {f"guide_{name}": counts[name] for name in COUNTS}
        found["guide_latency_mean"] = sum(latencies) / len(latencies) if latencies else 0.0
        cost = self.cost(counts)
        return found if cost is None else {**found, "guide_cost": cost}

    def cost(self, counts: Counter[str]) -> float | None:
        """The price of these tokens; None where no price is known."""
        if self.config.price_input is None or self.config.price_output is None:
            return None
        paid = counts["prompt_tokens"] * self.config.price_input + counts["completion_tokens"] * self.config.price_output
        return paid / 1e6

    def state(self) -> dict[str, int]:
        """What a checkpoint holds, so that a limit counts over resumed runs too."""
        return {**self.spent, "begun": self._begun}

    def load_state(self, state: dict[str, int]) -> None:
        """Continue from a checkpoint."""
        self.spent = Counter(state)
        self._begun = self.spent.pop("begun", 0)

    def question(self, request: Request, draw: int) -> Question:
        """What the server is asked: a text of up to the horizon, its seed from trajectory, position and attempt."""
        place = f"{request.seed}/{request.index}/{len(request.prefix_ids)}/{draw}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big") >> 1  # what servers take: 31 bits
        tokens = max(1, round(request.budget * self.config.tokens_per_policy_token))
        return Question(request.prompt.text, request.prefix, tokens, seed)

    def _row(self, request: Request, stop: threading.Event) -> Text:
        """A usable answer to one request: from the cache, or asked for with new draws while they are invalid."""
        try:
            return self._answer(request, stop)
        except RowFailedError as error:
            self._count("rows_given_up")
            if self.config.on_failure == "policy":
                return Text("", finished=True, given_up=True)
            stop.set()
            raise RunError(str(error)) from None
        except BaseException:
            stop.set()
            raise

    def _answer(self, request: Request, stop: threading.Event, ahead: bool = False) -> Text:
        """From the cache, or asked for with new draws while they are invalid; `RowFailedError` where none comes."""
        reason = ""
        for draw in range(self.config.invalid_retries + 1):
            question = self.question(request, draw)
            key = key_of({**self.server.key(), **asdict(question), "index": request.index})
            stored = self.cache.get(key)
            fresh = stored is None
            if stored is None:
                if self.config.offline:
                    if self.cache.get(key + GIVEN_UP) is not None:
                        raise RowFailedError("it was given up in the run that is replayed")
                    raise RunError(
                        f"the guide is offline and the answer for trajectory {request.index} is not in {self.cache.path}: "
                        "run once with the server, or leave out --offline."
                    )
                try:
                    stored = self._ask(question, stop)
                except RowFailedError as error:  # asked again by the next run, but a replay goes the same way
                    self.cache.put(key + GIVEN_UP, {"reason": str(error)})
                    raise
                self.cache.put(key, stored)
                stored = self.cache.get(key) or stored
            if "invalid" in stored:
                reason = str(stored["invalid"])
                continue
            if ahead and fresh:
                with self._lock:
                    self._prefetched.add(key)
            elif not ahead:
                self._count("rows_answered" if fresh or key in self._prefetched else "rows_cached")
            return Text(stored["text"], stored["finished"])
        raise RowFailedError(
            f"the guide gave no usable text for the prompt {request.prompt.text[:60]!r} "
            f"in {self.config.invalid_retries + 1} draws ({reason}): raise guide.invalid_retries, or choose another guide."
        )

    def _ask(self, question: Question, stop: threading.Event) -> dict[str, Any]:
        """Ask until the server answers; an invalid answer is an answer too, kept as such so that a replay goes the same way."""
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

        retrying = Retrying(
            stop=stop_never if self.config.on_failure == "wait" else stop_after_attempt(self.config.retries + 1),
            wait=wait,
            retry=retry_if_exception_type(TransientError),
            before_sleep=lambda state: self._ended("retried"),
            sleep=self._sleep,
        )
        try:
            return retrying(self._once, question, stop)
        except RetryError as error:
            self._ended("given_up")
            cause = error.last_attempt.exception()
            raise RowFailedError(
                f"the guide at {self.server.url} failed {self.config.retries + 1} times ({cause}): run the same command again "
                "when it is back, raise guide.retries, or set guide.on_failure=wait."
            ) from None
        except PermanentError as error:
            self._ended("given_up")
            raise RunError(
                f"the guide at {self.server.url} refuses ({error}): mend guide.spec, its key or its options."
            ) from None

    def _once(self, question: Question, stop: threading.Event) -> dict[str, Any]:
        if stop.is_set():
            raise StoppedError
        self._take_turn()
        with self._lock:  # together, or requests side by side would pass a limit
            self._within_limits()
            self._begun += 1
        began = time.monotonic()
        try:
            with self._slots:
                answer = self.server.ask(question)
            stored: dict[str, Any] = {"text": answer.text, "finished": answer.finished}
        except InvalidError as error:
            answer = error.answer or Answer("", False, 0, 0)
            stored = {"invalid": str(error)}
            self._count("answers_invalid")
        with self._lock:
            self._latencies.append(time.monotonic() - began)
        self._ended("answered")
        self._count("answers_stripped", int(answer.stripped))
        self._count("prompt_tokens", answer.prompt_tokens)
        self._count("completion_tokens", answer.completion_tokens)
        return stored

    def _within_limits(self) -> None:
        """Refuse to begin a request once a limit on requests, tokens or money is reached."""
        config, spent = self.config, self.spent
        tokens, cost = spent["prompt_tokens"] + spent["completion_tokens"], self.cost(spent)
        for name, used, most in (
            ("requests", self._begun, config.max_requests),
            ("tokens", tokens, config.max_tokens),
            ("cost", cost, config.max_cost),
        ):
            if most is not None and used is not None and used >= most:
                raise RunError(
                    f"the guide's budget is used up ({used:g} of guide.max_{name}={most:g}): raise it and run the same command "
                    "again; answers that were paid for are kept."
                )

    def _take_turn(self) -> None:
        """Wait until the rate limit lets one more request begin."""
        if not self.config.requests_per_minute:
            return
        with self._lock:
            start = max(self._next_start, time.monotonic())
            self._next_start = start + 60.0 / self.config.requests_per_minute
        self._sleep(max(0.0, start - time.monotonic()))

    def _ended(self, outcome: str) -> None:
        """One request more, and how it ended: at once, so that the sums hold whenever the counts are taken."""
        with self._lock:
            for name in ("attempts", outcome):
                self._counts[name] += 1
                self.spent[name] += 1

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] += amount
            self.spent[name] += amount
