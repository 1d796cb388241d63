"""One question to one OpenAI-compatible server: how it is put, and which kind of failure a failure is.

What an answer means is in `answers.py`. Nothing here retries, counts or stores; `remote.py` does, around it.
"""

import json
import math
import os
import re
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from rlgf.config import GuideConfig
from rlgf.errors import UserError
from rlgf.guides.answers import (
    Answer,
    InvalidError,
    PermanentError,
    Question,
    TransientError,
    read_chat,
    read_completion,
    read_ids,
)
from rlgf.guides.cache import AnswerCache, key_of

CONTINUATIONS = ("completion", "assistant", "continue_final_message", "prefix", "instruction", "none")  # those by text
INSTRUCTION = (
    "Continue the text below. Write only what comes next, beginning exactly where it breaks off: no introduction, no quotation "
    "marks, and repeat nothing of it.\n\n{text}"
)
OPTIONAL = ("top_p", "temperature", "seed", "n")  # what a server may refuse, and is then asked without
LONGEST_PAUSE = 3600.0  # seconds: a server that asks for a longer one is asked again after this
MOST_BYTES = 2**26  # of an answer
SPENT = ("insufficient_quota", "billing_hard_limit_reached")  # error codes that come with 429, but do not pass


class RefusedError(PermanentError):
    """The server does not serve this kind of request, or takes a part of it for wrong, and may say which."""


class Server:
    """An OpenAI-compatible server as `model` at `url`, asked in one way (`mode`: of CONTINUATIONS, or 'token_ids').

    By token ids it must share the policy's tokenizer (`tokenizing.py` sees to that): `end_ids` are the policy's end tokens,
    and `exact` says that it keeps to `min_tokens`.
    """

    def __init__(
        self, spec: str, config: GuideConfig, mode: str, report: Callable[[str], None] = lambda line: None,
        end_ids: Sequence[int] = (), exact: bool = False,
    ) -> None:  # fmt: skip
        self.model, self.url = parse_spec(spec)
        self.config, self.mode, self.end_ids, self.exact = config, mode, tuple(end_ids), exact
        self._report, self._left_out, self._token_limit = report, set[str](), "max_tokens"  # until the server says otherwise
        key = secret_of(config.api_key_env)
        headers = {name: from_environment(value) for name, value in config.extra_headers.items()}
        try:
            import openai
        except ImportError:
            raise UserError("a guide on a server needs the extra 'server': pip install 'rlgf[server]'.") from None
        self._openai = openai
        self._client = openai.OpenAI(
            base_url=self.url, api_key=key or "none", max_retries=0, timeout=config.timeout_seconds,
            default_headers=headers,
        )  # fmt: skip
        weakref.finalize(self, self._client.close)
        # a header may say what it is before its secret ('Bearer …'), and a server repeat the secret alone
        written = [value for name, value in headers.items() if config.extra_headers[name].startswith("$")]
        self._secrets = [part for secret in (key or "", *written) for part in (secret, *secret.split()) if len(part) > 3]

    def key(self) -> dict[str, Any]:
        """What an answer depends on besides the question: model, mode, template, decoding. No address, no secret."""
        config, decoding = self.config, self.config.decoding
        found = {
            "model": self.model, "mode": self.mode, "temperature": decoding.temperature, "top_p": decoding.top_p,
            "top_k": decoding.top_k, "greedy": decoding.greedy, "stop": list(config.stop), "extra_body": config.extra_body,
            "thinking_tokens": config.thinking_tokens,
        }  # fmt: skip
        if self.mode == "token_ids":
            return {**found, "end_ids": list(self.end_ids)}
        if self.mode == "completion":
            return found
        told = {"system": config.system} if config.system else {}
        return {**found, "instruction": self.instruction, **told}

    @property
    def instruction(self) -> str:
        """The template by which a chat model is told what to do."""
        return self.config.instruction or INSTRUCTION

    @property
    def can_finish(self) -> bool:
        """Whether it finishes what another began."""
        return self.mode != "none"

    def ask(self, question: Question, again: Callable[[], None] = lambda: None) -> Answer:
        """One answer. Raises `TransientError`, `InvalidError` or `PermanentError`.

        A server that refuses a parameter by name is asked without it from now on; `again` is called before each such request.
        """
        while True:
            body = self._body(question)
            try:
                return self._read(self._exchange(body), question)
            except RefusedError as error:
                if not self._adapts(str(error), body):
                    raise
            again()

    def tokenize(self, text: str) -> tuple[list[int], int]:
        """A text in the server's tokens, without those that open or close it, and the tokens that its context holds.

        vLLM's `/tokenize`, which lies beside `/v1`. Raises as `ask` does.
        """
        place = re.sub(r"/v1/?$", "", self.url) + "/tokenize"
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        with self._failures():
            told: Any = self._client.post(place, cast_to=object, body=body)
        tokens, context = (told.get("tokens"), told.get("max_model_len")) if isinstance(told, dict) else (None, None)
        if not isinstance(tokens, list) or not isinstance(context, int):
            raise PermanentError("its /tokenize does not answer as vLLM's does")
        return tokens, context

    def _body(self, question: Question) -> dict[str, Any]:
        config, decoding = self.config, self.config.decoding
        body: dict[str, Any] = {"model": self.model, "seed": question.seed, "n": 1}
        body[self._token_limit] = question.max_tokens + config.thinking_tokens
        body["temperature"] = 0.0 if decoding.greedy else decoding.temperature
        if decoding.top_p < 1.0:
            body["top_p"] = decoding.top_p
        if config.stop:
            body["stop"] = list(config.stop)
        if self.mode == "token_ids":
            body |= {
                "prompt": list(question.ids), "min_tokens": question.min_tokens, "top_p": decoding.top_p,
                "top_k": decoding.top_k, "stop_token_ids": list(self.end_ids), "return_token_ids": True,
            }  # fmt: skip
        elif self.mode == "completion":
            body["prompt"] = question.prompt + question.prefix
        else:
            body |= self._messages(question)
        return {name: value for name, value in body.items() if name not in self._left_out} | config.extra_body

    def _messages(self, question: Question) -> dict[str, Any]:
        """The fields by which a chat model is asked to begin, or to finish, a text."""
        messages: list[dict[str, Any]] = []
        if self.config.system:
            messages.append({"role": "system", "content": self.config.system})
        if self.mode == "instruction":
            asked = self.instruction.replace("{text}", question.prompt + question.prefix)
            return {"messages": [*messages, {"role": "user", "content": asked}]}
        messages.append({"role": "user", "content": self.instruction.replace("{text}", question.prompt)})
        if not question.prefix:
            return {"messages": messages}
        last: dict[str, Any] = {"role": "assistant", "content": question.prefix}
        if self.mode == "prefix":
            last["prefix"] = True
        fields: dict[str, Any] = {"messages": [*messages, last]}
        if self.mode == "continue_final_message":
            fields |= {"continue_final_message": True, "add_generation_prompt": False}
        return fields

    def _exchange(self, body: Mapping[str, Any]) -> Any:
        """The parsed JSON of a response that came whole and in time."""
        first = "prompt" if "prompt" in body else "messages"
        resource: Any = self._client.completions if first == "prompt" else self._client.chat.completions
        arguments = {"model": body["model"], first: body[first]}  # the rest goes as it is, whatever the client knows
        rest = {name: value for name, value in body.items() if name not in arguments}
        end = time.monotonic() + self.config.timeout_seconds
        content = bytearray()
        with self._failures(), resource.with_streaming_response.create(**arguments, extra_body=rest) as response:
            for part in response.iter_bytes():
                content += part
                if time.monotonic() > end:  # the client's own time-out counts from the last byte
                    raise TransientError(f"it took longer than {self.config.timeout_seconds:g} s")
                if len(content) > MOST_BYTES:
                    raise TransientError(f"its answer is longer than {MOST_BYTES >> 20} MiB")
        try:
            data: Any = json.loads(content)
        except (ValueError, RecursionError):
            raise TransientError("its answer is no JSON") from None
        if isinstance(data, dict) and data.get("error") and not data.get("choices"):  # some say 200 and mean an error
            raise TransientError(f"it reports an error: {self._hide(str(data['error']))}")
        return data

    @contextmanager
    def _failures(self) -> Generator[None]:
        """What the client raises, as one of our kinds."""
        openai = self._openai
        try:
            yield
        except openai.APIStatusError as error:
            raise self._status_failure(error) from None
        except openai.APIConnectionError as error:
            raise TransientError(f"no connection ({type(error.__cause__ or error).__name__})") from None
        except openai.OpenAIError as error:
            raise PermanentError(self._hide(str(error))) from None
        except (TransientError, PermanentError):
            raise
        except Exception as error:  # whatever the transport raises while the body is read
            raise TransientError(f"broken off ({type(error).__name__})") from None

    def _status_failure(self, error: Any) -> Exception:
        status, detail = int(error.status_code), error.body.get("detail") if isinstance(error.body, dict) else None
        # servers made with FastAPI give their reason there, where the client does not look
        reason = self._hide(f"{error} - {detail}" if isinstance(detail, str) else str(error))
        if status == 404 and not re.search(r"/v\d", self.url):
            reason += "; most servers' addresses end in /v1"
        if status in (408, 409, 425, 429) or status >= 500:
            if error.code in SPENT:
                return PermanentError(reason)
            return TransientError(f"HTTP {status}", pause_of(error.response.headers))
        return RefusedError(reason) if status in (400, 404, 405, 422) else PermanentError(reason)

    def _hide(self, text: str) -> str:
        """Text that may be shown: without secrets, on one line."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())[:300]

    def _adapts(self, reason: str, body: Mapping[str, Any]) -> bool:
        """Whether a refusal names a parameter of this request that can be renamed or left out; then it is, from now on."""
        sent = [name for name in OPTIONAL if name in body and name not in self.config.extra_body]
        named = [name for name in sent if re.search(rf"\b{name}\b" if len(name) > 1 else rf"['\"`]{name}['\"`]", reason)]
        if "max_completion_tokens" in reason and "max_tokens" in body and "messages" in body:
            self._token_limit = "max_completion_tokens"
        elif named:
            if named[0] not in self._left_out:
                self._report(f"guide: {named[0]} is left out from now on, as the server refuses it")
            self._left_out.add(named[0])
        else:
            return False
        return True

    def _read(self, data: Any, question: Question) -> Answer:
        if self.mode == "token_ids":
            return read_ids(data, question, self.end_ids, self.exact)
        if self.mode == "completion":
            return read_completion(data, question, self.config.stop)
        return read_chat(data, question, self.config.stop, told=self.mode == "instruction")


def pause_of(headers: Mapping[str, str]) -> float:
    """Seconds that a server wants to be left alone, from `Retry-After` (seconds or a date) or `retry-after-ms`; else 0."""
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
    return 0.0 if math.isnan(seconds) else min(max(0.0, seconds), LONGEST_PAUSE)


def secret_of(variable: str) -> str | None:
    """The secret in an environment variable; None where there is none. One that no header can carry is refused."""
    secret = os.environ.get(variable, "").strip()
    if not (secret.isascii() and secret.isprintable()):
        raise UserError(f"the environment variable {variable} holds characters that no key has: set it again.")
    return secret or None


def from_environment(value: str) -> str:
    """A value as it is, or the variable that `$NAME` names."""
    if not value.startswith("$"):
        return value
    found = secret_of(value[1:])
    if not found:
        raise UserError(f"guide.extra_headers names the environment variable {value[1:]}, which is not set: export it.")
    return found


def parse_spec(spec: str) -> tuple[str, str]:
    """Model and address of `server:MODEL@URL`."""
    model, _, url = spec.removeprefix("server:").partition("@http")
    parts = urlsplit("http" + url)
    if not model or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"guide '{spec.split('@')[0]}…' is not of the form server:MODEL@URL with an http:// or https:// address."
        )
    if parts.username or parts.password:
        raise UserError("the guide's address holds a password: put the key into the variable that guide.api_key_env names.")
    if parts.query or parts.fragment:
        raise UserError("the guide's address goes on behind a '?' or '#': leave that out; keys come from the environment.")
    return model, "http" + url


def without_address(spec: str) -> str:
    """A guide's name without where a server is to be found, which decides nothing about its texts."""
    return f"server:{parse_spec(spec)[0]}" if spec.startswith("server:") else spec


def reach(spec: str, config: GuideConfig, cache: AnswerCache, report: Callable[[str], None]) -> Server:
    """The server that `spec` names, asked by text as `guide.continuation` says.

    With 'auto': by completion where the server serves that, otherwise by an instruction to continue, which any chat model
    understands. What was found is kept in the cache, so that a replay asks the same way.
    """
    if config.continuation != "auto":
        return Server(spec, config, config.continuation, report)
    key = key_of({"continuation of": parse_spec(spec)[0]})
    found = cache.get(key)
    mode = str(found["mode"]) if found else "completion"
    if found is None and not config.offline:
        try:
            mode = _tried(spec, config, report)
            cache.put(key, {"mode": mode})
        except TransientError:
            pass  # neither yes nor no: it is tried as it stands, and asked again in the next run
        except PermanentError as error:
            raise UserError(f"the guide at {parse_spec(spec)[1]} refuses ({error}): mend guide.spec or its key.") from None
    return Server(spec, config, mode, report)


def _tried(spec: str, config: GuideConfig, report: Callable[[str], None]) -> str:
    """By completion, or where that is refused by an instruction: whichever is answered at all."""
    question = Question("Once upon a time", " there was", 8, 0)
    try:
        with suppress(InvalidError):
            Server(spec, config, "completion").ask(question)
        return "completion"
    except RefusedError as error:
        with suppress(InvalidError):
            Server(spec, config, "instruction").ask(question)
        report(f"guide: no text completion ({error}); it is asked to continue by an instruction instead")
        return "instruction"
