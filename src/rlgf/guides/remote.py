"""A guide on a server: requests, repeated samples and the handling of failures.

Concurrency, retries, limits and cached responses are in `generation/openai/pool.py`.
"""

from collections.abc import Callable, Mapping, Sequence

from rlgf.config.sections import GuideConfig
from rlgf.errors import GuideError
from rlgf.generation.openai.cache import ResponseCache
from rlgf.generation.openai.client import Server
from rlgf.generation.openai.pool import EndpointPool, PoolRequest, PoolResponse, request_seed
from rlgf.generation.openai.responses import ServerRequest
from rlgf.guides.base import Capabilities, Completion, CompletionRequest, open_reply
from rlgf.types import Prompt

COUNTS = (
    "attempts", "succeeded", "retried", "given_up", "rows_needed", "rows_generated", "rows_cached", "rows_given_up",
    "refused", "responses_invalid", "responses_stripped", "prompt_tokens", "completion_tokens", "thinking_tokens",
)  # fmt: skip
FEW_ROWS = 16  # questions before the share of refused ones is measured


def text_request(prompt: Prompt, prefix: str, max_tokens: int, seed: int) -> ServerRequest:
    """Return the request to continue a prompt and a prefix; a conversation goes as messages."""
    if prompt.messages is None:
        return ServerRequest(prompt.text, prefix, max_tokens, seed)
    messages, begun = prompt.messages, prompt.strip_reply_prefix(prefix)
    if messages[-1]["role"] == "assistant":  # the reply continues a message of the data
        messages, begun = messages[:-1], str(messages[-1]["content"]) + begun
    return ServerRequest(prompt.text, prefix, max_tokens, seed, messages=messages, begun=begun, tools=prompt.tools)


class RemoteGuide:
    """A guide on a `Server`, with the cache and the limits of the config.

    `run` identifies this run among those that share the cache. `sleep` replaces the pauses between
    retries; by default they end early when no more requests are sent.
    """

    def __init__(
        self, server: Server, config: GuideConfig, cache: ResponseCache, report: Callable[[str], None] = lambda line: None,
        run: str = "", sleep: Callable[[float], None] | None = None,
    ) -> None:  # fmt: skip
        self.server, self.config = server, config
        self.pool = EndpointPool(server, cache, report, run, sleep, GuideError, retry_forever=config.on_failure == "wait")
        self._num_rows = self._num_refused = 0  # of the whole run
        self._reason, self._continues = "", False  # of the last refusal; true after load_state
        self.capabilities = Capabilities(server.can_continue, server.exact, takes_token_ids=server.mode == "token_ids")

    def complete(self, requests: Sequence[CompletionRequest]) -> list[Completion]:
        """Return one completion for each request; raise `GuideError` if one fails.

        A question that the server refuses fails alone, up to guide.max_refused_share of the run's.
        """
        self.pool.usage.count("rows_needed", len(requests))
        completions = self.pool.complete(
            self._pool_requests(requests), lambda row, response: self._completion(requests[row], response)
        )
        self._num_rows += len(requests)
        self._num_refused += sum(completion.failed and completion.refused for completion in completions)
        limit = self.config.max_refused_share
        if self._num_refused > limit * max(self._num_rows, FEW_ROWS):
            raise GuideError(
                f"the guide refused {self._num_refused:,} of {self._num_rows:,} questions ({self._reason}), more than "
                f"guide.max_refused_share={limit:g}: change the data or the guide, or raise it."
            )
        return completions

    def prefetch(self, requests: Sequence[CompletionRequest]) -> None:
        """Send future requests, so that their responses are cached; failures are ignored."""
        self.pool.prefetch(self._pool_requests(requests))

    def stop_prefetching(self) -> None:
        """Start no more prefetching requests."""
        self.pool.stop_prefetching()

    def pop_metrics(self) -> dict[str, float]:
        """Return the usage since the last call: requests, responses, tokens, cost.

        The keys are those of docs/metrics.md.
        """
        counts = self.pool.usage.pop_counts()
        found = {f"guide_{name}": counts.get(name, 0) for name in COUNTS}
        found["guide_latency_mean"] = counts.get("seconds", 0.0) / max(1, counts.get("succeeded", 0))
        cost = self.pool.usage.cost(counts)
        return found if cost is None else {**found, "guide_cost": cost}

    def state(self) -> dict[str, float]:
        """Return the usage of the whole run, including its parts before a resume.

        After an interrupt it waits for the requests in flight, which count.
        """
        self.pool.wait()
        asked = {"rows": self._num_rows, "refused": self._num_refused} if self._num_refused else {}
        return {**self.pool.usage.state(), **asked}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Add the usage of an earlier part of the run, once: later calls are ignored."""
        if not self._continues:
            self._continues = True
            self._num_rows += int(state.get("rows", 0))
            self._num_refused += int(state.get("refused", 0))
        self.pool.usage.load_state({name: value for name, value in state.items() if name not in ("rows", "refused")})

    def server_request(self, request: CompletionRequest, sample: int) -> ServerRequest:
        """Return the server request of a completion request.

        Its seed is made from seed, trajectory index, position and sample. With text, max_tokens is
        max_new_tokens times guide.tokens_per_policy_token; with token ids, max_new_tokens and
        min_new_tokens are exact.
        """
        seed = request_seed(request.seed, request.index, len(request.prefix_ids), sample)
        if self.server.mode == "token_ids":
            minimum = min(request.min_new_tokens, request.max_new_tokens) if self.server.exact else 0
            return ServerRequest("", "", request.max_new_tokens, seed, (*request.prompt_ids, *request.prefix_ids), minimum)
        tokens = max(1, round(request.max_new_tokens * self.config.tokens_per_policy_token))
        return text_request(request.prompt, request.prefix, tokens, seed)

    def _pool_requests(self, requests: Sequence[CompletionRequest]) -> list[PoolRequest]:
        samples = range(self.config.invalid_retries + 1)
        return [
            PoolRequest(request.index, [self.server_request(request, sample) for sample in samples]) for request in requests
        ]

    def _completion(self, request: CompletionRequest, response: PoolResponse) -> Completion:
        """Return the completion in a response and count its row.

        Raises `GuideError` if there is none, unless guide.on_failure is 'policy'.
        """
        last = response.last
        text: Completion | None = None
        if "text" in last:
            ids = last.get("ids")
            chats = self.server.mode_of(self.server_request(request, 0)) not in ("completion", "token_ids")
            written = open_reply(request.prompt, request.prefix, last["text"]) if chats else last["text"]
            text = Completion(written, last["finished"], ids if ids is None else tuple(ids))
        elif request.prefix and all(stored.get("silent") for stored in response.samples):
            text = Completion("", finished=True)  # every sample was empty: the prefix is complete
        if text is not None:
            self.pool.usage.count("rows_generated" if response.is_new else "rows_cached")
            return text
        self.pool.usage.count("rows_given_up")
        if last.get("refused"):
            self.pool.usage.count("refused")
            self._reason = str(last["invalid"])
            drop = self.config.on_refusal == "drop"
            return Completion("", finished=True, failed=True, dropped=drop, refused=True)
        if self.config.on_failure == "policy":
            return Completion("", finished=True, failed=True)
        if "given_up" in last:
            raise GuideError(
                f"{last['given_up']}: run the same command again when it is back, raise guide.endpoint.retries, or set "
                "guide.on_failure=wait."
            )
        raise GuideError(
            f"the guide returned no usable completion for the prompt {request.prompt.text[:60]!r} in "
            f"{len(response.samples)} samples "
            f"({last['invalid']}): raise guide.invalid_retries, or choose another guide."
        )
