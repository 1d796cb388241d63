"""The usage of an endpoint: requests, tokens and cost, and the limits on them."""

import threading
from collections import Counter
from collections.abc import Mapping

from rlgf.config.sections import EndpointConfig


class UsageCounter:
    """Counts of the requests to an endpoint, safe for several threads.

    The usage of the whole run includes a request from its start. The counts since the last
    `pop_counts` include it once its response is used, so that prefetching does not change them.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        self._total: Counter[str] = Counter()  # over the whole run
        self._num_started = 0  # requests of the whole run, including those in flight
        self._continues = False  # true once the usage of an earlier part of the run was added
        self._counts: dict[str, float] = {}  # since the last pop_counts
        # by cache key, the usage of responses that no row has used yet
        self._pending: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()

    def start_request(self) -> tuple[str, float, float] | None:
        """Count one more request, or return the limit that forbids it.

        A limit is its name (requests, tokens or cost), the amount used and the amount allowed.
        """
        with self._lock:  # atomic, or concurrent requests could exceed a limit
            config, total = self.config, self._total
            for name, used, limit in (
                ("requests", self._num_started, config.max_requests),
                ("tokens", total["prompt_tokens"] + total["completion_tokens"], config.max_tokens),
                ("cost", self.cost(total), config.max_cost),
            ):
                if limit is not None and used is not None and used >= limit:
                    return name, used, limit
            self._num_started += 1
            return None

    def add(self, key: str, amounts: Mapping[str, float]) -> None:
        """Add to the usage of the request with a cache key."""
        with self._lock:  # all amounts at once, so that sums are consistent at any time
            pending = self._pending.setdefault(key, {})
            for name, amount in amounts.items():
                pending[name] = pending.get(name, 0) + amount
                if name != "seconds":
                    self._total[name] += int(amount)

    def pending(self, key: str) -> dict[str, float]:
        """Return the usage of a request so far, except the time, for a replay."""
        with self._lock:
            return {name: amount for name, amount in self._pending.get(key, {}).items() if name != "seconds"}

    def use(self, key: str, recorded: Mapping[str, float] | None) -> bool:
        """Count the usage of a response that a row uses; return whether there was any.

        `recorded` is the usage in the record of a replayed run, or None.
        """
        with self._lock:
            usage = self._pending.pop(key, None)
            usage = recorded if usage is None else usage
            for name, amount in (usage or {}).items():
                self._counts[name] = self._counts.get(name, 0) + amount
        return usage is not None

    def count(self, name: str, amount: int = 1) -> None:
        """Add to a count of the caller's own."""
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + amount

    def pop_counts(self) -> dict[str, float]:
        """Return the counts since the last call: attempts and their outcomes, tokens, seconds."""
        with self._lock:
            counts, self._counts = self._counts, {}
        return counts

    def cost(self, counts: Mapping[str, float]) -> float | None:
        """Return the cost of the counted tokens, or None if no price is configured."""
        if self.config.price_input is None or self.config.price_output is None:
            return None
        paid = (counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0))
        return (paid[0] * self.config.price_input + paid[1] * self.config.price_output) / 1e6

    def state(self) -> dict[str, float]:
        """Return the usage of the whole run, including its parts before a resume."""
        with self._lock:
            found: dict[str, float] = {**self._total, "begun": self._num_started}
            cost = self.cost(self._total)
        return found if cost is None else {**found, "cost": cost}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Add the usage of an earlier part of the run, once: later calls are ignored.

        Limits then apply to the whole run.
        """
        with self._lock:
            if self._continues:
                return
            self._continues = True
            self._num_started += int(state.get("begun", 0))
            self._total.update({name: int(value) for name, value in state.items() if name not in ("begun", "cost")})
