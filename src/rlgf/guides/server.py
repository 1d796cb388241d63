"""One question to one OpenAI-compatible server: how it is put, what comes back, and in which of three ways it can fail.

Nothing here retries, counts or stores; `remote.py` does, around it.
"""

import json
import os
import re
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from rlgf.config import GuideConfig
from rlgf.errors import UserError
from rlgf.guides.cache import AnswerCache, key_of
from rlgf.tokens import spaced

CONTINUATIONS = ("completion", "assistant", "continue_final_message", "prefix", "instruction", "none")
INSTRUCTION = (
    "Continue the text below. Write only what comes next, beginning exactly where it breaks off: no introduction, no quotation "
    "marks, and repeat nothing of it.\n\n{text}"
)
PREAMBLE = re.compile(r"^\s*(sure|certainly|of course|okay|ok|here is|here's|here are)\b[^\n]{0,120}:\s*\n+", re.IGNORECASE)
THINKING = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL)


class TransientError(Exception):
    """It may work if asked again: busy, broken off, out of time, garbled."""

    def __init__(self, reason: str, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after = retry_after  # seconds


class InvalidError(Exception):
    """The server answered, but not with a text that can be used; another draw may be."""

    def __init__(self, reason: str, answer: "Answer | None" = None) -> None:
        super().__init__(reason)
        self.answer = answer  # what it is billed for


class PermanentError(Exception):
    """Asking again cannot help: wrong key, wrong model, wrong question."""


@dataclass(frozen=True)
class Answer:
    """What a server wrote, after echoes and thoughts were taken off."""

    text: str
    finished: bool  # whether it came to its end by itself
    prompt_tokens: int  # as billed
    completion_tokens: int  # as billed, thoughts included
    stripped: bool = False  # whether an echo of the prefix, quotes or a preamble were taken off


@dataclass(frozen=True)
class Question:
    """A text to be begun (no prefix) or finished."""

    prompt: str
    prefix: str
    max_tokens: int  # in the server's tokens
    seed: int


class Server:
    """An OpenAI-compatible server as `model` at `url`, asked in one way (`mode`, of CONTINUATIONS)."""

    def __init__(self, spec: str, config: GuideConfig, mode: str) -> None:
        self.model, self.url = parse_spec(spec)
        self.config, self.mode = config, mode
        self.token_limit, self.sends_temperature = "max_tokens", True  # until the server says otherwise
        key = os.environ.get(config.api_key_env) or None
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
        self._secrets = [secret for secret in (key, *headers.values()) if secret]

    def key(self) -> dict[str, Any]:
        """What an answer depends on besides the question: model, mode, template, decoding. No address, no secret."""
        config, decoding = self.config, self.config.decoding
        return {
            "model": self.model, "mode": self.mode, "instruction": self.instruction, "temperature": decoding.temperature,
            "top_p": decoding.top_p, "top_k": decoding.top_k, "greedy": decoding.greedy, "stop": list(config.stop),
            "extra_body": config.extra_body, "thinking_tokens": config.thinking_tokens,
        }  # fmt: skip

    @property
    def instruction(self) -> str:
        """The template by which a chat model is told what to do."""
        return self.config.instruction or INSTRUCTION

    @property
    def can_finish(self) -> bool:
        """Whether it finishes what another began."""
        return self.mode != "none"

    def ask(self, question: Question) -> Answer:
        """One request. Raises `TransientError`, `InvalidError` or `PermanentError`."""
        for _ in range(3):  # a server that refuses a parameter is asked again without it
            path, body = self._body(question)
            try:
                return self._read(self._send(path, body), path, question)
            except PermanentError as error:
                if not self._adapts(str(error)):
                    raise
        raise PermanentError("it refuses one parameter after another")

    def _body(self, question: Question) -> tuple[str, dict[str, Any]]:
        config, decoding = self.config, self.config.decoding
        body: dict[str, Any] = {"model": self.model, "seed": question.seed, "n": 1}
        body[self.token_limit] = question.max_tokens + config.thinking_tokens
        if self.sends_temperature:
            body["temperature"] = 0.0 if decoding.greedy else decoding.temperature
            if decoding.top_p < 1.0:
                body["top_p"] = decoding.top_p
        if config.stop:
            body["stop"] = list(config.stop)
        body |= config.extra_body
        if self.mode == "completion":
            return "/completions", {**body, "prompt": question.prompt + question.prefix}
        if self.mode == "instruction":
            asked = self.instruction.replace("{text}", question.prompt + question.prefix)
            return "/chat/completions", {**body, "messages": [{"role": "user", "content": asked}]}
        messages: list[dict[str, Any]] = [{"role": "user", "content": self.instruction.replace("{text}", question.prompt)}]
        if question.prefix:
            last: dict[str, Any] = {"role": "assistant", "content": question.prefix}
            if self.mode == "prefix":
                last["prefix"] = True
            elif self.mode == "continue_final_message":
                body |= {"continue_final_message": True, "add_generation_prompt": False}
            messages.append(last)
        return "/chat/completions", {**body, "messages": messages}

    def _send(self, path: str, body: Mapping[str, Any]) -> Any:
        """The parsed JSON of a response that came whole and in time."""
        openai = self._openai
        resource: Any = self._client.completions if path == "/completions" else self._client.chat.completions
        known = {
            "model",
            "seed",
            "n",
            "max_tokens",
            "max_completion_tokens",
            "temperature",
            "top_p",
            "stop",
            "prompt",
            "messages",
        }
        if path == "/completions":
            known.discard("max_completion_tokens")
        arguments = {key: value for key, value in body.items() if key in known}
        extra = {key: value for key, value in body.items() if key not in known}
        end = time.monotonic() + self.config.timeout_seconds
        try:
            with resource.with_streaming_response.create(**arguments, extra_body=extra) as response:
                parts: list[bytes] = []
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > end:  # the client's own time-out counts from the last byte
                        raise TransientError(f"it took longer than {self.config.timeout_seconds:g} s")
        except openai.APIStatusError as error:
            raise self._status_failure(error) from None
        except openai.APIConnectionError as error:
            raise TransientError(f"no connection ({type(error.__cause__ or error).__name__})") from None
        except openai.OpenAIError as error:
            raise PermanentError(self._hide(str(error))) from None
        except TransientError:
            raise
        except Exception as error:  # whatever the transport raises while the body is read
            raise TransientError(f"broken off ({type(error).__name__})") from None
        try:
            return json.loads(b"".join(parts))
        except ValueError:
            raise TransientError("its answer is no JSON") from None

    def _status_failure(self, error: Any) -> Exception:
        status, detail = int(error.status_code), error.body.get("detail") if isinstance(error.body, dict) else None
        # servers made with FastAPI give their reason there, where the client does not look
        reason = self._hide(f"{error} - {detail}" if isinstance(detail, str) else str(error))
        if status in (408, 409, 425, 429) or status >= 500:
            try:
                after = float(error.response.headers.get("retry-after") or 0.0)
            except ValueError:
                after = 0.0
            return TransientError(f"HTTP {status}", max(0.0, after))
        return PermanentError(reason)

    def _hide(self, text: str) -> str:
        """Text that may be shown: without secrets, on one line."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return " ".join(text.split())[:300]

    def _adapts(self, reason: str) -> bool:
        """Whether a refusal names a parameter that can be left out or renamed; then it is, from now on."""
        if "max_completion_tokens" in reason and self.token_limit == "max_tokens" and self.mode != "completion":
            self.token_limit = "max_completion_tokens"
            return True
        if "temperature" in reason and self.sends_temperature:
            self.sends_temperature = False
            return True
        return False

    def _read(self, data: Any, path: str, question: Question) -> Answer:
        choices = data.get("choices") if isinstance(data, dict) else None
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise TransientError("its answer does not hold one choice")
        choice: dict[str, Any] = choices[0]
        usage = data.get("usage") or {}
        billed = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
        counts = [value if isinstance(value, int) else 0 for value in billed]
        why = choice.get("finish_reason")
        text, refused = choice.get("text"), False
        if path != "/completions":
            message = choice.get("message")
            if not isinstance(message, dict):
                raise TransientError("its answer holds no message")
            text, refused = message.get("content"), bool(message.get("refusal"))
        paid = Answer("", False, counts[0], counts[1])
        if refused or why == "content_filter":
            raise InvalidError("it refused", paid)
        if why not in ("stop", "length") or not (text is None or isinstance(text, str)):
            raise TransientError("its answer has the wrong types")
        return self._clean(text or "", why == "stop", question, path, paid)

    def _clean(self, text: str, finished: bool, question: Question, path: str, paid: Answer) -> Answer:
        for end in self.config.stop:  # some servers leave a stop string in the text
            text = text.removesuffix(end)
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidError("its text is no valid Unicode", paid) from None
        chat = path != "/completions"
        written = text
        if chat:
            text = THINKING.sub("", text)
            if re.search(r"<think(?:ing)?>", text):
                raise InvalidError("it was still thinking when its tokens ran out: raise guide.thinking_tokens", paid)
            text = self._without_echo(PREAMBLE.sub("", text), question, paid)
        if not text.strip():
            raise InvalidError("it wrote nothing", paid)
        stripped = text != written
        if chat:
            text = spaced(question.prompt + question.prefix, text)
        return Answer(text, finished, paid.prompt_tokens, paid.completion_tokens, stripped)

    def _without_echo(self, text: str, question: Question, paid: Answer) -> str:
        """A chat answer without quotation marks around it and without what was to be continued at its head."""
        bare = text.strip()
        if len(bare) > 1 and (bare[0], bare[-1]) in (('"', '"'), ("“", "”")):
            text = bare[1:-1]
        for whole in (question.prompt + question.prefix, question.prefix, question.prompt):
            words = whole.split()
            if len(words) < 2:
                continue
            head = re.compile(r"\s*" + r"\s+".join(map(re.escape, words)))
            found = head.match(text)
            if found:
                return text[found.end() :]
        for whole in (question.prefix, question.prompt):
            opening = whole.split()[:5]
            if len(opening) == 5 and text.split()[:5] == opening:
                raise InvalidError("it began anew instead of continuing", paid)
        return text


def from_environment(value: str) -> str:
    """A value as it is, or the variable that `$NAME` names."""
    if not value.startswith("$"):
        return value
    found = os.environ.get(value[1:])
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
    return model, "http" + url


def reach(spec: str, config: GuideConfig, cache: AnswerCache, report: Callable[[str], None]) -> Server:
    """The server that `spec` names, asked as `guide.continuation` says.

    With 'auto': by completion where the server serves that, otherwise by an instruction to continue, which any chat model
    understands. What was found is kept in the cache, so that a replay asks the same way.
    """
    if config.continuation != "auto":
        return Server(spec, config, config.continuation)
    key = key_of({"continuation of": parse_spec(spec)[0]})
    found = cache.get(key)
    if found is None and not config.offline:
        found = {"mode": "completion"}
        try:
            Server(spec, config, "completion").ask(Question("Once upon a time", " there was", 8, 0))
            cache.put(key, found)
        except PermanentError as error:
            report(f"guide: no text completion ({error}); it is asked to continue by an instruction instead")
            found = {"mode": "instruction"}
            cache.put(key, found)
        except (TransientError, InvalidError):
            pass  # neither yes nor no: it is tried as it stands, and asked again in the next run
    return Server(spec, config, str(found["mode"]) if found else "completion")
