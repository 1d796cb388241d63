"""A guide outside this process: asked side by side, again where that helps, never twice for the same thing, within limits.

Every draw of a server is made from (seed, trajectory, position, attempt), so the order in which answers arrive changes nothing.
What an answer took (requests, tokens) is counted where the answer is used, so that asking ahead does not change the counts
either; it is kept beside the answer for each run that asked, and a replay of that run counts it again.
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

from rlgf.config import GuideConfig
from rlgf.errors import RunError
from rlgf.guides.answers import Answer, InvalidError, PermanentError, Question, TransientError
from rlgf.guides.base import Capabilities, Request, Text
from rlgf.guides.cache import AnswerCache, key_of
from rlgf.guides.server import Server

COUNTS = (
    "attempts", "answered", "retried", "given_up", "rows_needed", "rows_answered", "rows_cached", "rows_given_up",
    "answers_invalid", "answers_stripped", "prompt_tokens", "completion_tokens", "thinking_tokens",
)  # fmt: skip


WORTH_SAYING = 5.0  # seconds of a pause
SAYING_EVERY = 10.0  # seconds


class StoppedError(Exception):
    """A limit was reached, or another question has failed for good: what is not under way is not asked any more."""


class RowFailedError(Exception):
    """One answer cannot be had, though the server may be well: retries are used up."""


class RemoteGuide:
    """Any number of questions to a `Server`, through the cache, under the limits of the config.

    `run` tells this run from others that share the cache. `sleep` stands in for the pauses between retries, which otherwise end
    early when there is nothing left to ask for.
    """

    def __init__(
        self, server: Server, config: GuideConfig, cache: AnswerCache, report: Callable[[str], None] = lambda line: None,
        run: str = "", sleep: Callable[[float], None] | None = None,
    ) -> None:  # fmt: skip
        self.run = run
        self.server, self.config, self.cache, self._report, self._sleep = server, config, cache, report, sleep
        self.capabilities = Capabilities(can_finish=server.can_finish, exact_budget=server.exact)
        self.spent: Counter[str] = Counter()  # over the whole run
        self._continues = False  # whether what an earlier part of the run had spent was added
        self._begun = 0  # requests over the whole run, those under way included
        self._counts: dict[str, float] = {}  # of the rows that were served since counts were last taken
        self._took: dict[str, dict[str, float]] = {}  # by question: what its answer took, until a row uses it
        self._asked = self.server.key()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(config.concurrency)  # shared by what is needed now and what is asked ahead
        self._stop_prefetching = threading.Event()
        self._next_start = 0.0  # when the rate limit lets the next request begin
        self._said = -SAYING_EVERY  # when a pause was last spoken of

    def complete(self, requests: Sequence[Request]) -> list[Text]:
        """One text for each request; `RunError` where one cannot be had."""
        self._count("rows_needed", len(requests))
        kept = [self._draw(request) for request in requests]
        asked = iter(self._side_by_side([request for request, drawn in zip(requests, kept) if not drawn]))
        return [self._use(request, drawn) if drawn else next(asked) for request, drawn in zip(requests, kept)]

    def _side_by_side(self, requests: Sequence[Request]) -> list[Text]:
        """The same for requests of which the cache does not know the answers."""
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
        finally:  # interrupted, say: what is under way comes to its end and is kept, the rest is not asked
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
        first = next((error for error in failures if not isinstance(error, StoppedError)), None)
        if first is not None:
            raise first
        return [future.result() for future in futures]

    def _row(self, request: Request, stop: threading.Event) -> Text:
        try:
            return self._use(request, self._draw(request, stop))
        except BaseException:
            stop.set()
            raise

    def prefetch(self, requests: Sequence[Request]) -> None:
        """Put the answers to requests that will come into the cache. Failures are left to whoever needs the answer."""
        if self.config.offline:
            return

        def fetch(request: Request) -> None:
            if not self._stop_prefetching.is_set():
                with suppress(Exception):
                    self._draw(request, self._stop_prefetching)

        with ThreadPoolExecutor(self.config.concurrency, thread_name_prefix="guide ahead") as pool:
            list(pool.map(fetch, requests))

    def stop_prefetching(self) -> None:
        """Begin no more requests ahead."""
        self._stop_prefetching.set()

    def take_counts(self) -> dict[str, float]:
        """What the texts since the last call took: questions, answers, tokens, money; keys as in docs/metrics.md."""
        with self._lock:
            counts, self._counts = self._counts, {}
        found = {f"guide_{name}": counts.get(name, 0) for name in COUNTS}
        found["guide_latency_mean"] = counts.get("seconds", 0.0) / max(1, counts.get("answered", 0))
        cost = self.cost(counts)
        return found if cost is None else {**found, "guide_cost": cost}

    def cost(self, counts: Mapping[str, float]) -> float | None:
        """The price of these tokens; None where no price is known."""
        if self.config.price_input is None or self.config.price_output is None:
            return None
        paid = (counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0))
        return (paid[0] * self.config.price_input + paid[1] * self.config.price_output) / 1e6

    def state(self) -> dict[str, float]:
        """What was spent over the whole run, resumed ones included."""
        with self._lock:
            found: dict[str, float] = {**self.spent, "begun": self._begun}
        cost = self.cost(self.spent)
        return found if cost is None else {**found, "cost": cost}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Add what an earlier part of the run had spent, so that limits count over all of it; a second time changes nothing."""
        with self._lock:
            if self._continues:
                return
            self._continues = True
            self._begun += int(state.get("begun", 0))
            self.spent.update({name: int(value) for name, value in state.items() if name not in ("begun", "cost")})

    def question(self, request: Request, draw: int) -> Question:
        """What the server is asked: a text of up to the horizon, its seed from trajectory, position and attempt.

        By token ids it is what is needed and no more: the budget and the least length are exact.
        """
        place = f"{request.seed}/{request.index}/{len(request.prefix_ids)}/{draw}"
        seed = int.from_bytes(hashlib.sha256(place.encode()).digest()[:4], "big") >> 1  # what servers take: 31 bits
        if self.server.mode == "token_ids":
            minimum = min(request.minimum, request.budget) if self.server.exact else 0
            return Question("", "", request.budget, seed, (*request.prompt_ids, *request.prefix_ids), minimum)
        tokens = max(1, round(request.budget * self.config.tokens_per_policy_token))
        return Question(request.prompt.text, request.prefix, tokens, seed)

    def _draw(self, request: Request, stop: threading.Event | None = None) -> list[tuple[str, dict[str, Any]]]:
        """The draws for a request up to the first that can be used, each with the key of its question.

        From the cache, or asked for; empty where there is no `stop` and something would have to be asked.
        """
        drawn: list[tuple[str, dict[str, Any]]] = []
        for draw in range(self.config.invalid_retries + 1):
            question = self.question(request, draw)
            key = key_of({**self._asked, **asdict(question), "index": request.index})
            stored = self._replayed(key, request) if self.config.offline else self.cache.get(key)
            if stored is None:
                if stop is None:
                    return []
                stored = self._asked_for(key, question, stop)
            drawn.append((key, stored))
            if "invalid" not in stored:
                break
        return drawn

    def _replayed(self, key: str, request: Request) -> dict[str, Any]:
        """The answer, with what it took if this is the run that asked; or that this run gave it up. Otherwise an error."""
        record = self.cache.get(self._record(key))
        if record is not None and "given_up" in record:
            return record
        stored = self.cache.get(key)
        if stored is None:
            raise RunError(
                f"the guide is offline and the answer for trajectory {request.index} is not in {self.cache.path}: "
                "run once with the server, or leave out --offline."
            )
        return {**stored, **(record or {})}

    def _asked_for(self, key: str, question: Question, stop: threading.Event) -> dict[str, Any]:
        """What the server answers, kept for all runs, and what it took, for this one; or that it was given up."""
        try:
            stored = self._ask(key, question, stop)
        except RowFailedError as error:  # asked again by the next run, but a replay of this one goes the same way
            stored = {"given_up": str(error), "took": self._taken(key)}
            self.cache.put(self._record(key), stored, replace=True)
            return stored
        self.cache.put(self._record(key), {"took": self._taken(key)}, replace=True)
        if not self.cache.put(key, stored):  # another process was faster: both go on with the same text
            return self.cache.get(key) or stored
        return stored

    def _record(self, key: str) -> str:
        """Under what the cache keeps what this run knows of a question."""
        return f"{key}/{self.run}"

    def _use(self, request: Request, drawn: Sequence[tuple[str, dict[str, Any]]]) -> Text:
        """The text of a row, its draws counted."""
        fresh = [self._settle(key, stored) for key, stored in drawn]
        last = drawn[-1][1]
        text: Text | None = None
        if "text" in last:
            ids = last.get("ids")
            text = Text(last["text"], last["finished"], ids if ids is None else tuple(ids))
        elif request.prefix and all(stored.get("silent") for _, stored in drawn):
            text = Text("", finished=True)  # asked several times, it has nothing to add to this prefix
        if text is not None:
            self._count("rows_answered" if fresh[-1] else "rows_cached")
            return text
        self._count("rows_given_up")
        if self.config.on_failure == "policy":
            return Text("", finished=True, given_up=True)
        raise RunError(
            last.get("given_up")
            or f"the guide gave no usable text for the prompt {request.prompt.text[:60]!r} in {len(drawn)} draws "
            f"({last['invalid']}): raise guide.invalid_retries, or choose another guide."
        )

    def _settle(self, key: str, stored: Mapping[str, Any]) -> bool:
        """Count what an answer took, where this run took it or replays the run that did; whether that is so."""
        with self._lock:
            took = self._took.pop(key, None)
            if took is None and self.config.offline:
                took = stored.get("took")
            for name, amount in (took or {}).items():
                self._counts[name] = self._counts.get(name, 0) + amount
        return took is not None

    def _ask(self, key: str, question: Question, stop: threading.Event) -> dict[str, Any]:
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

        def before(state: Any) -> None:
            self._ended(key, "retried")
            self._say(f"guide: {state.outcome.exception()}; asked again in", state.upcoming_sleep)

        retrying = Retrying(
            stop=stop_never if self.config.on_failure == "wait" else stop_after_attempt(self.config.retries + 1),
            wait=wait,
            retry=retry_if_exception_type(TransientError),
            before_sleep=before,
            sleep=lambda seconds: self._pause(seconds, stop),
        )
        try:
            return retrying(self._once, key, question, stop)
        except RetryError as error:
            self._ended(key, "given_up")
            cause = error.last_attempt.exception()
            raise RowFailedError(
                f"the guide at {self.server.url} failed {self.config.retries + 1} times ({cause}): run the same command again "
                "when it is back, raise guide.retries, or set guide.on_failure=wait."
            ) from None
        except PermanentError as error:
            self._ended(key, "given_up")
            raise RunError(
                f"the guide at {self.server.url} refuses ({error}): mend guide.spec, its key or its options."
            ) from None

    def _once(self, key: str, question: Question, stop: threading.Event) -> dict[str, Any]:
        if stop.is_set():
            raise StoppedError
        self._begin(stop)
        began = 0.0

        def again() -> None:
            self._ended(key, "retried")
            self._begin(stop)

        with self._slots:
            began = time.monotonic()
            try:
                answer = self.server.ask(question, again)
                stored: dict[str, Any] = {"text": answer.text, "finished": answer.finished}
                if answer.ids is not None:
                    stored["ids"] = answer.ids
            except InvalidError as error:
                answer = Answer("", False, error.bill)
                stored = {"invalid": str(error), "silent": error.silent}
        self._ended(key, "answered")
        bill = answer.bill
        for name, amount in (
            ("answers_invalid", int("invalid" in stored)), ("answers_stripped", int(answer.stripped)),
            ("prompt_tokens", bill.prompt_tokens), ("completion_tokens", bill.completion_tokens),
            ("thinking_tokens", bill.thinking_tokens), ("seconds", time.monotonic() - began),
        ):  # fmt: skip
            self._note(key, name, amount)
        if not bill.known and (self.config.max_tokens is not None or self.config.max_cost is not None):
            raise RunError(
                f"the guide at {self.server.url} does not say what an answer costs, so guide.max_tokens and guide.max_cost "
                "cannot be kept: leave them out and set guide.max_requests."
            )
        return stored

    def _begin(self, stop: threading.Event) -> None:
        """Wait for the turn of one more request and count it; refused where a limit is reached."""
        self._take_turn(stop)
        with self._lock:  # together, or requests side by side would pass a limit
            self._within_limits()
            self._begun += 1

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

    def _take_turn(self, stop: threading.Event) -> None:
        """Wait until the rate limit lets one more request begin."""
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

    def _say(self, what: str, seconds: float) -> None:
        """Tell of a long pause, now and then."""
        with self._lock:
            silent = seconds < WORTH_SAYING or time.monotonic() - self._said < SAYING_EVERY
            self._said = self._said if silent else time.monotonic()
        if not silent:
            self._report(f"{what} {seconds:.0f} s")

    def _ended(self, key: str, outcome: str) -> None:
        """One request more, and how it ended: at once, so that the sums hold whenever the counts are taken."""
        self._note(key, "attempts", 1)
        self._note(key, outcome, 1)

    def _note(self, key: str, name: str, amount: float) -> None:
        """Something that a question took: spent now, counted when its answer is used."""
        with self._lock:
            took = self._took.setdefault(key, {})
            took[name] = took.get(name, 0) + amount
            if name != "seconds":
                self.spent[name] += int(amount)

    def _taken(self, key: str) -> dict[str, float]:
        """What a question took so far, for a replay: all but the time."""
        with self._lock:
            return {name: amount for name, amount in self._took.get(key, {}).items() if name != "seconds"}

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount
