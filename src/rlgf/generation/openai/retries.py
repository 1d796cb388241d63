"""Retries of a request to a server: when, how often, and with which pauses."""

from collections.abc import Callable
from typing import Any, TypeVar

from rlgf.config.sections import EndpointConfig
from rlgf.generation.openai.responses import TransientError

T = TypeVar("T")
LONGEST_PAUSE = 60.0  # seconds, unless the server asks for a longer one


def call_with_retries(
    call: Callable[[], T],
    endpoint: EndpointConfig,
    forever: bool,
    sleep: Callable[[float], None],
    on_retry: Callable[[Exception, float], None],
) -> T:
    """Call a function again after each `TransientError`, and return its result.

    Pauses grow exponentially from `endpoint.retry_seconds`, with jitter; a longer pause that the
    server asks for is kept.

    Args:
        call: sends the request once.
        endpoint: the number of retries and the first pause.
        forever: whether to retry without limit.
        sleep: pauses for a number of seconds.
        on_retry: called with the error and the seconds of the pause before each retry.

    Raises:
        TransientError: the last one, when the retries are used up.
    """
    from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_never, wait_exponential_jitter

    backoff = wait_exponential_jitter(multiplier=endpoint.retry_seconds, max=LONGEST_PAUSE, jitter=endpoint.retry_seconds)

    def wait(state: Any) -> float:
        return max(backoff(state), state.outcome.exception().retry_after)

    def before_sleep(state: Any) -> None:
        on_retry(state.outcome.exception(), state.upcoming_sleep)

    retrying = Retrying(
        stop=stop_never if forever else stop_after_attempt(endpoint.retries + 1),
        wait=wait,
        retry=retry_if_exception_type(TransientError),
        before_sleep=before_sleep,
        sleep=sleep,
        reraise=True,
    )
    return retrying(call)
