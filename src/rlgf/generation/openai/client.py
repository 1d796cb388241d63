"""Client of one OpenAI-compatible server: request bodies and the classification of failures.

Responses are parsed in `responses.py`. Retries, limits and usage are in `pool.py`.
"""

import json
import math
import re
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from rlgf.config.sections import EndpointConfig, GuideConfig
from rlgf.errors import ConfigError
from rlgf.generation.openai.cache import ResponseCache, cache_key
from rlgf.generation.openai.dialects import describe_body, error_in, raise_refusal
from rlgf.generation.openai.environment import Environment
from rlgf.generation.openai.messages import INSTRUCTION, chat_fields
from rlgf.generation.openai.refusals import RequestRefusedError, refusal_of
from rlgf.generation.openai.responses import (
    InvalidError,
    PermanentError,
    ServerRequest,
    ServerResponse,
    TransientError,
    read_chat,
    read_completion,
    read_ids,
)
from rlgf.untrusted_text import shorten

# modes that send text, not token ids
CONTINUATIONS = ("completion", "assistant", "continue_final_message", "prefix", "instruction", "none")
# parameters that are omitted once a server refuses them
OPTIONAL_PARAMETERS = ("top_p", "temperature", "seed", "response_format", "tool_choice", "tools", "n")
MAX_PAUSE = 3600.0  # seconds; bounds the pause that a server requests
MAX_RESPONSE_BYTES = 2**26  # of one response
# error codes sent with status 429 that a retry cannot resolve
QUOTA_ERRORS = ("insufficient_quota", "billing_hard_limit_reached")


class RefusedError(PermanentError):
    """A refusal of a kind of request or of a parameter, named if known."""


class Server:
    """An OpenAI-compatible server with `model` at `url`, queried in one mode.

    `mode` is one of CONTINUATIONS or 'token_ids'. With token ids the server must share the policy's
    tokenizer (checked in `token_ids.py`): `end_ids` are the policy's EOS tokens, and `exact` is
    true if the server respects `min_tokens`. `role` names the server in errors and reports, 'guide'
    or 'judge'. `response_format` is the form of chat responses, a JSON schema.
    """

    def __init__(
        self, spec: str, config: GuideConfig, mode: str, report: Callable[[str], None] = lambda line: None,
        end_ids: Sequence[int] = (), exact: bool = False, role: str = "guide",
        response_format: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.url = parse_spec(spec, role)  # with $NAME, as errors and reports show it
        self.config, self.mode, self.eos_token_ids, self.exact, self.role = config, mode, tuple(end_ids), exact, role
        endpoint, self.response_format = config.endpoint, response_format
        # _drop_refused_parameter changes the last two when the server refuses a parameter
        self._report, self._omitted_parameters, self._token_limit = report, set[str](), "max_tokens"
        self._environment = environment = Environment(role)
        key = environment.read(endpoint.api_key_env)
        headers = environment.fill(endpoint.extra_headers, "endpoint.extra_headers")
        self._extra_body: dict[str, Any] = environment.fill(endpoint.extra_body, "endpoint.extra_body")
        self._address = environment.fill(self.url, "spec")
        try:
            import openai
        except ImportError:
            raise ConfigError(f"a {role} on a server needs the extra 'server': pip install 'rlgf[server]'.") from None
        self._openai = openai
        try:
            self._client = openai.OpenAI(
                base_url=self._address, api_key=key or "none", max_retries=0, timeout=endpoint.timeout_seconds,
                default_headers=headers,
            )  # fmt: skip
        except Exception as error:  # of the transport, for an address that is no URL
            raise ConfigError(f"the {role}'s address {self.url} is no URL ({type(error).__name__}): fix {role}.spec.") from None
        weakref.finalize(self, self._client.close)

    def key(self) -> dict[str, Any]:
        """Return the settings that a response depends on: model, mode, template, decoding.

        The request itself, the address and secrets are not part of it.
        """
        config, sampling = self.config, self.config.sampling
        found = {
            "model": self.model, "mode": self.mode, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": sampling.top_k, "greedy": sampling.greedy, "stop": list(config.stop),
            "extra_body": config.endpoint.extra_body, "thinking_tokens": config.endpoint.thinking_tokens,
        }  # fmt: skip
        if self.mode == "token_ids":
            return {**found, "end_ids": list(self.eos_token_ids)}
        if self.mode == "completion":
            return found
        system = {"system": config.system} if config.system else {}
        form = {"response_format": self.response_format} if self.response_format else {}
        return {**found, "instruction": self.instruction, **system, **form}

    @property
    def instruction(self) -> str:
        """Return the template of the user message of a chat request."""
        return self.config.instruction or INSTRUCTION

    @property
    def can_continue(self) -> bool:
        """Return whether the server can continue a prefix."""
        return self.mode != "none"

    def mode_of(self, request: ServerRequest) -> str:
        """Return the mode of a request.

        The mode 'auto' sends conversations as messages, also to a server that completes texts: the
        policy's control tokens mean nothing to another model.
        """
        as_text = self.mode == "completion" and self.config.continuation == "auto" and request.messages is not None
        return "instruction" if as_text else self.mode

    def send(self, request: ServerRequest, again: Callable[[], None] = lambda: None) -> ServerResponse:
        """Send a request and return the response.

        Raises `TransientError`, `InvalidError`, `RequestRefusedError` or `PermanentError`. A
        parameter that the server refuses by name is omitted from then on; `again` is called before
        each such repetition.
        """
        while True:
            body = self._body(request)
            try:
                return self._read(self._exchange(body), request)
            except RefusedError as error:
                if not self._drop_refused_parameter(str(error), body):
                    raise
            again()

    def tokenize(self, text: str) -> tuple[list[int], int]:
        """Return the server's tokens of a text without special tokens, and its context length.

        Uses vLLM's `/tokenize`, which is next to `/v1`. Raises `TransientError` or
        `PermanentError`.
        """
        place = re.sub(r"/v1/?$", "", self._address) + "/tokenize"
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        with self._failures():
            response: Any = self._client.post(place, cast_to=object, body=body)
        tokens, context = (
            (response.get("tokens"), response.get("max_model_len")) if isinstance(response, dict) else (None, None)
        )
        if not isinstance(tokens, list) or not isinstance(context, int):
            raise PermanentError("its /tokenize does not respond as vLLM's does")
        return tokens, context

    def _body(self, request: ServerRequest) -> dict[str, Any]:
        config, sampling, mode = self.config, self.config.sampling, self.mode_of(request)
        body: dict[str, Any] = {"model": self.model, "seed": request.seed, "n": 1}
        body[self._token_limit] = request.max_tokens + config.endpoint.thinking_tokens
        body["temperature"] = 0.0 if sampling.greedy else sampling.temperature
        if sampling.top_p < 1.0:
            body["top_p"] = sampling.top_p
        if config.stop:
            body["stop"] = list(config.stop)
        if mode == "token_ids":
            body |= {
                "prompt": list(request.ids), "min_tokens": request.min_tokens, "top_p": sampling.top_p,
                "top_k": sampling.top_k, "stop_token_ids": list(self.eos_token_ids), "return_token_ids": True,
            }  # fmt: skip
        elif mode == "completion":
            body["prompt"] = request.prompt + request.prefix
        else:
            body |= chat_fields(mode, request, config.instruction, config.system)
            body |= {"response_format": dict(self.response_format)} if self.response_format else {}
        kept = {name: value for name, value in body.items() if name not in self._omitted_parameters}
        return kept | self._extra_body

    def _exchange(self, body: Mapping[str, Any]) -> Any:
        """Send a request body and return the parsed JSON of a complete response."""
        first = "prompt" if "prompt" in body else "messages"
        resource: Any = self._client.completions if first == "prompt" else self._client.chat.completions
        # the rest is sent unchanged, including parameters that the client does not support
        arguments = {"model": body["model"], first: body[first]}
        rest = {name: value for name, value in body.items() if name not in arguments}
        timeout = self.config.endpoint.timeout_seconds
        end = time.monotonic() + timeout
        content = bytearray()
        with self._failures(), resource.with_streaming_response.create(**arguments, extra_body=rest) as response:
            for part in response.iter_bytes():
                content += part
                if time.monotonic() > end:  # the client's timeout restarts at every byte
                    raise TransientError(f"it took longer than {timeout:g} s")
                if len(content) > MAX_RESPONSE_BYTES:
                    raise TransientError(f"its response is longer than {MAX_RESPONSE_BYTES >> 20} MiB")
        try:
            data: Any = json.loads(content)
        except (ValueError, RecursionError):
            raise TransientError(describe_body(bytes(content))) from None
        error = error_in(data)  # some servers report errors with status 200
        if error is not None:
            shown = self._environment.hide(error[2])
            raise_refusal(*error, shown)
            raise TransientError(f"it reports an error: {shown}")
        return data

    @contextmanager
    def _failures(self) -> Generator[None]:
        """Convert exceptions of the client to `TransientError` or `PermanentError`."""
        openai = self._openai
        try:
            yield
        except openai.APIStatusError as error:
            raise self._status_failure(error) from None
        except openai.APIConnectionError as error:
            raise TransientError(f"no connection ({type(error.__cause__ or error).__name__})") from None
        except openai.OpenAIError as error:
            raise PermanentError(self._environment.hide(str(error))) from None
        except (TransientError, PermanentError, RequestRefusedError):
            raise
        except Exception as error:  # any exception of the transport during the body
            raise TransientError(f"interrupted ({type(error).__name__})") from None

    def _status_failure(self, error: Any) -> Exception:
        status, detail = int(error.status_code), error.body.get("detail") if isinstance(error.body, dict) else None
        # FastAPI servers put the reason into `detail`, which the client ignores
        reason = self._environment.hide(f"{error} - {detail}" if isinstance(detail, str) else str(error))
        if status == 404 and not re.search(r"/v\d", self.url):
            reason += "; most servers' URLs end in /v1"
        refusal = refusal_of(status, getattr(error, "code", None), f"{error} {detail or ''}")
        if refusal is not None:
            return RequestRefusedError(f"it refused the question as {refusal}: {reason}")
        if status in (408, 409, 425, 429) or status >= 500:
            if error.code in QUOTA_ERRORS:
                return PermanentError(reason)
            return TransientError(f"HTTP {status}", retry_after(error.response.headers))
        return RefusedError(reason) if status in (400, 404, 405, 422) else PermanentError(reason)

    def _drop_refused_parameter(self, reason: str, body: Mapping[str, Any]) -> bool:
        """Rename or omit the parameter that a refusal names, in all later requests.

        Returns whether there was one.
        """
        sent = [name for name in OPTIONAL_PARAMETERS if name in body and name not in self.config.endpoint.extra_body]
        named = [name for name in sent if re.search(rf"\b{name}\b" if len(name) > 1 else rf"['\"`]{name}['\"`]", reason)]
        if "max_completion_tokens" in reason and "max_tokens" in body and "messages" in body:
            self._token_limit = "max_completion_tokens"
        elif named:
            if named[0] not in self._omitted_parameters:
                self._report(f"{self.role}: {named[0]} is omitted from now on, as the server rejects it")
            self._omitted_parameters.add(named[0])
        else:
            return False
        return True

    def _read(self, data: Any, request: ServerRequest) -> ServerResponse:
        mode = self.mode_of(request)
        if mode == "token_ids":
            return read_ids(data, request, self.eos_token_ids, self.exact)
        if mode == "completion":
            return read_completion(data, request, self.config.stop)
        return read_chat(data, request, self.config.stop, instructed=mode == "instruction")


def retry_after(headers: Mapping[str, str]) -> float:
    """Return the seconds to wait before a retry, from the response headers; 0 by default.

    They are `Retry-After` (seconds or a date) and `retry-after-ms`.
    """
    milliseconds, after = headers.get("retry-after-ms"), headers.get("retry-after")
    try:
        seconds = float(milliseconds) / 1000 if milliseconds else float(after or 0.0)
    except ValueError:
        try:
            when = parsedate_to_datetime(after or "")
        except ValueError:
            return 0.0
        when = when if when.tzinfo else when.replace(tzinfo=UTC)
        seconds = (when - datetime.now(UTC)).total_seconds()
    return 0.0 if math.isnan(seconds) else min(max(0.0, seconds), MAX_PAUSE)


def parse_spec(spec: str, role: str = "guide") -> tuple[str, str]:
    """Return the model and the address of `server:MODEL@URL`.

    Errors name the server by its role, 'guide' or 'judge'.
    """
    model, _, url = spec.removeprefix("server:").partition("@http")
    try:
        parts = urlsplit("http" + url)
    except ValueError:  # such as an open bracket
        parts = urlsplit("")
    if not model or parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"{role} '{shorten(spec.split('@')[0], 80)}…' is not of the form server:MODEL@URL with an http:// or https:// "
            "address."
        )
    if parts.username or parts.password:
        raise ConfigError(
            f"the {role}'s URL contains a password: put the key into the variable that {role}.endpoint.api_key_env names."
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"the {role}'s URL has a part after '?' or '#': remove that part; keys come from the environment.")
    return model, "http" + url


def require_environment(spec: str, endpoint: EndpointConfig, role: str = "guide") -> None:
    """Raise `ConfigError` if an environment variable that a server's settings name is not set."""
    environment = Environment(role)
    environment.fill(parse_spec(spec, role)[1], "spec")
    environment.fill(endpoint.extra_headers, "endpoint.extra_headers")
    environment.fill(endpoint.extra_body, "endpoint.extra_body")


def without_address(spec: str, role: str = "guide") -> str:
    """Return a guide's spec without the address, which does not affect its completions."""
    return f"server:{parse_spec(spec, role)[0]}" if spec.startswith("server:") else spec


def connect(spec: str, config: GuideConfig, cache: ResponseCache, report: Callable[[str], None]) -> Server:
    """Return the server of `spec`, queried with text in the mode of `guide.continuation`.

    'auto' selects text completion if the server supports it, otherwise an instruction to continue,
    which works with any chat model. The selected mode is stored in the cache, so that a replay uses
    the same one.
    """
    if config.continuation != "auto":
        return Server(spec, config, config.continuation, report)
    key = cache_key({"continuation of": parse_spec(spec)[0]})
    found = cache.get(key)
    mode = str(found["mode"]) if found else "completion"
    if found is None and not config.endpoint.offline:
        try:
            mode = _probe_mode(spec, config, report)
            cache.put(key, {"mode": mode})
        except TransientError:
            pass  # undecided: use completion now, probe again in the next run
        except PermanentError as error:
            raise ConfigError(
                f"the guide at {parse_spec(spec)[1]} rejects requests ({error}): fix guide.spec or its key."
            ) from None
    return Server(spec, config, mode, report)


def _probe_mode(spec: str, config: GuideConfig, report: Callable[[str], None]) -> str:
    """Return 'completion' if the server accepts it, otherwise 'instruction'."""
    request = ServerRequest("Once upon a time", " there was", 8, 0)
    try:
        with suppress(InvalidError, RequestRefusedError):
            Server(spec, config, "completion").send(request)
        return "completion"
    except RefusedError as error:
        with suppress(InvalidError, RequestRefusedError):
            Server(spec, config, "instruction").send(request)
        report(f"guide: no text completion endpoint ({error}); completions are requested by a chat instruction instead")
        return "instruction"
