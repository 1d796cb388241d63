"""A text server that speaks OpenAI's dialect and fails on request, in every way in which servers fail.

Good answers are a pure function of what was asked, and faults of what was asked and how often: neither the order in which
requests arrive nor the number of clients changes either, so that a run through faults can be compared with one without.
"""

import contextlib
import hashlib
import json
import socket
import socketserver
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Plan = Callable[[str, int], str | None]
Writer = Callable[[dict[str, Any], str], tuple[str, str]]

TRANSIENT = (
    "429", "429_retry_after", "500", "503", "closed", "hang", "trickle", "half_json", "nested_json", "error_in_200",
    "wrong_types", "too_few", "too_many",
)  # fmt: skip
INVALID = ("empty", "ignores", "refusal", "nul", "surrogate", "too_long")
PERMANENT = ("400", "401", "403", "404")
KINDS = TRANSIENT + INVALID + PERMANENT

VOCABULARY = (
    "the a old young small river house garden film actor story summer winter dog child walked laughed said found lost "
    "never always quietly brightly and but because under over with without warm cold lovely dull clever strange home again"
)
WORDS = VOCABULARY.split()
COMPLETIONS, CHAT, MODELS, TOKENIZE = "/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize"
RETRY_AFTER = "0"
STARTS_OVER = "Sure! Here is a new text:\n\nTaxes in the Grand Duchy are due on the first of May."
REFUSES = "I'm sorry, but I can't help with that."
ERRORS = {  # status: message, type, code
    400: ("Invalid value for a parameter.", "invalid_request_error", "invalid_value"),
    401: ("The API key has expired.", "invalid_request_error", "invalid_api_key"),
    403: ("This project may not use this model.", "request_forbidden", "model_not_allowed"),
    404: ("The model does not exist or you do not have access to it.", "invalid_request_error", "model_not_found"),
    429: ("Rate limit reached for requests.", "requests", "rate_limit_exceeded"),
    500: ("The server had an error while processing your request.", "server_error", None),
    503: ("The engine is currently overloaded.", "server_error", "overloaded"),
}


@dataclass(frozen=True)
class Tokens:
    """The vLLM part of the server: token ids in and out, with the field names of vLLM 0.32."""

    encode: Callable[[str], list[int]]
    size: int  # of the vocabulary
    context: int = 256
    obeys: bool = True  # whether it keeps to `min_tokens`


# --- plans ------------------------------------------------------------------------------------------------------------


def a_third(kinds: Sequence[str], seed: int = 0, most: int = 2) -> Plan:
    """About a third of attempts fail, each with a kind drawn from `kinds`, and no request more than `most` times."""
    kinds = tuple(map(_known, kinds))

    def fails(key: str, attempt: int) -> bool:
        return _draw("fails", seed, key, attempt) % 3 == 0

    def plan(key: str, attempt: int) -> str | None:
        if not fails(key, attempt) or sum(fails(key, earlier) for earlier in range(attempt)) >= most:
            return None
        return kinds[_draw("kind", seed, key, attempt) % len(kinds)]

    return plan


def always(kind: str) -> Plan:
    """Every attempt fails."""
    kind = _known(kind)
    return lambda key, attempt: kind


def first(count: int, kind: str) -> Plan:
    """The first `count` attempts of each request fail."""
    kind = _known(kind)
    return lambda key, attempt: kind if attempt < count else None


# --- answers ----------------------------------------------------------------------------------------------------------


def request_key(path: str, body: dict[str, Any]) -> str:
    """The name of a request: the same for the same path and body, whatever the order of the body's fields."""
    return hashlib.sha256(f"{path}\n{json.dumps(body, sort_keys=True, separators=(',', ':'))}".encode()).hexdigest()


def words_for(prompt: Any, seed: Any, index: int) -> list[str]:
    """The 3 to 12 words that answer `prompt` (a text, token ids or messages) under this seed, as choice `index`."""
    count = 3 + _draw("count", prompt, seed, index) % 10
    return [" " + WORDS[_draw("word", prompt, seed, index, place) % len(WORDS)] for place in range(count)]


def good_texts(path: str, body: dict[str, Any]) -> list[tuple[str, str]]:
    """The text and finish reason of every choice, cut to as many words as the body allows."""
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    texts = [words_for(prompt, body.get("seed"), index) for prompt in _prompts(path, body) for index in range(_choices(body))]
    cut = [len(words) if limit is None else min(len(words), limit) for words in texts]
    return [("".join(words[:kept]), "stop" if kept == len(words) else "length") for words, kept in zip(texts, cut)]


def ids_for(body: dict[str, Any], tokens: Tokens) -> tuple[list[int], str]:
    """The token ids that answer `body`, and their finish reason: 3 to 12 and an end token, within what it allows.

    As vLLM does, it shortens what its context does not hold, and lets a text end at once whose end token is pushed.
    """
    prompt, seed, ends = body["prompt"], body.get("seed"), body.get("stop_token_ids") or [0]
    pushed = any(str(end) in (body.get("logit_bias") or {}) for end in ends)
    length = max(0 if pushed else 3 + _draw("count", prompt, seed) % 10, body.get("min_tokens") or 0 if tokens.obeys else 0)
    most = min(body["max_tokens"], tokens.context - len(prompt))
    others = [token for token in range(tokens.size) if token not in ends]
    ids = [others[_draw("token", prompt, seed, place) % len(others)] for place in range(min(length, most))]
    return ([*ids, ends[0]], "stop") if length < most else (ids, "length")


def answer_of(path: str, body: dict[str, Any], texts: Sequence[tuple[str | None, str]]) -> dict[str, Any]:
    """The JSON document that carries these texts and finish reasons; None is a refusal."""
    prompt_tokens = sum(len(prompt if _is_ids(prompt) else _plain(prompt).split()) for prompt in _prompts(path, body))
    completion_tokens = sum(len((text or "").split()) for text, _ in texts)
    chat = path == CHAT
    choices: list[dict[str, Any]] = []
    for index, (text, reason) in enumerate(texts):
        message = {"role": "assistant", "content": text, "refusal": REFUSES if text is None else None}
        said = {"message": message} if chat else {"text": text}
        choices.append({"index": index, **said, "logprobs": None, "finish_reason": reason})
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_key(path, body)[:24]}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1_700_000_000,
        "model": body["model"],
        "choices": choices,
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def spoilt(kind: str, path: str, body: dict[str, Any], texts: list[tuple[str, str]]) -> dict[str, Any]:
    """An answer that arrives whole and cannot be used."""
    chat = path == CHAT

    def each(text: Callable[[str], str | None], reason: str = "stop") -> dict[str, Any]:
        return answer_of(path, body, [(text(old), reason) for old, _ in texts])

    match kind:
        case "wrong_types":
            answer = answer_of(path, body, texts)
            if int(request_key(path, body)[0], 16) % 2:
                answer["choices"] = "none today"
            else:
                for choice in answer["choices"]:
                    (choice["message"] if chat else choice)["content" if chat else "text"] = 42
            return answer
        case "too_few":
            return answer_of(path, body, [])
        case "too_many":
            return answer_of(path, body, texts + texts[:1] * 2)
        case "empty":
            return each(lambda old: "")
        case "ignores":
            return each(lambda old: STARTS_OVER)
        case "refusal":
            return each(lambda old: None) if chat else each(lambda old: "", "content_filter")
        case "nul":
            return each(lambda old: old + "\x00 end")
        case "surrogate":
            return each(lambda old: old + "\ud800 end")
        case "too_long":
            return each(lambda old: "".join(" " + WORDS[place % len(WORDS)] for place in range(5000)))
        case _:
            raise ValueError(f"no such fault: {kind!r}")


# --- the server -------------------------------------------------------------------------------------------------------


class FaultServer:
    """Serves `/v1/models`, `/v1/completions` and `/v1/chat/completions` on this machine, from its own threads.

    `plan` names the fault of each attempt, `delay` is slept before every text's answer, `writer` replaces the words, `tokens`
    make it answer token ids with token ids and serve `/tokenize`, `paths` are what it serves, after `prefix` or without it,
    `complaint` says what is wrong with a body. For texts asked for,
    `asked == answered + faults.total()` once all is still; what could not be delivered,
    because the client or the server had gone, counts as the fault "lost". All counts outlive `stop`, and so do the attempts
    that plans see.
    """

    def __init__(
        self,
        plan: Plan | None = None,
        delay: float = 0.0,
        writer: Writer | None = None,
        api_key: str | None = None,
        *,
        hang_seconds: float = 1.5,
        trickle_seconds: float = 0.3,
        model: str = "fault-model",
        tokens: Tokens | None = None,
        paths: Sequence[str] = (COMPLETIONS, CHAT),
        complaint: Callable[[dict[str, Any]], str | None] = lambda body: None,
        prefix: str = "",
    ) -> None:
        self.paths, self.complaint, self.prefix = paths, complaint, prefix
        self.schedule, self.delay, self.writer, self.api_key, self.tokens = plan, delay, writer, api_key, tokens
        self.hang_seconds, self.trickle_seconds, self.model = hang_seconds, trickle_seconds, model
        self.port = 0
        self.requests: list[dict[str, Any]] = []
        self.answered = 0
        self.faults: Counter[str] = Counter()
        self.lock = threading.Lock()
        self._attempts: Counter[str] = Counter()
        self._listener: _Listener | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Return the base URL for a client; it stays the same when the server is restarted."""
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def asked(self) -> int:
        """Return the number of requests for completions, valid or not: every POST but those for tokens."""
        with self.lock:
            return sum(request["method"] == "POST" and request["path"] != TOKENIZE for request in self.requests)

    def start(self, port: int | None = None) -> Self:
        """Listens on `port`; by default where it listened before, at first where there is room."""
        if self._listener is not None:
            raise RuntimeError(f"already listening at {self.url}")
        self._listener = _Listener(self, self.port if port is None else port)
        self.port = self._listener.server_port
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stops as if killed: open connections are cut, whatever they wait for."""
        if self._listener is None or self._thread is None:
            return
        listener, self._listener = self._listener, None
        listener.stopping.set()
        listener.shutdown()
        listener.server_close()
        listener.cut()
        self._thread.join(5)

    def __enter__(self) -> Self:
        return self if self._listener is not None else self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def attempt(self, key: str) -> int:
        """Return how often this request was sent before, and count it."""
        with self.lock:
            self._attempts[key] += 1
            return self._attempts[key] - 1


class _Listener(ThreadingHTTPServer):
    """Remembers its connections: those kept alive must die with it, or a stopped server would go on answering."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, owner: FaultServer, port: int) -> None:
        self.owner = owner
        self.stopping = threading.Event()
        self.connections: dict[Any, threading.Thread | None] = {}
        self.guard = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def server_bind(self) -> None:
        """Binds without the look-up of its own name, which can take seconds where there is no network."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """Registers the connection before its thread begins, so that `cut` misses none."""
        with self.guard:
            self.connections[request] = None
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self.guard:
            self.connections[request] = threading.current_thread()
        super().process_request_thread(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self.guard:
            self.connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of ours."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def cut(self) -> None:
        """Closes every connection and waits for their threads, so that the counts are final."""
        with self.guard:
            connections = dict(self.connections)
            for connection in connections:
                _hang_up(connection)
        for thread in connections.values():
            if thread is not None and thread is not threading.current_thread():
                thread.join(5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two writes; the second shall not wait for the first one's receipt
    server: _Listener  # pyright: ignore[reportIncompatibleVariableOverride]
    ids: tuple[list[int], str] | None = None  # what the request in hand is answered with, where it asks for token ids

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: tests print their own findings."""

    def do_GET(self) -> None:
        owner = self.server.owner
        self._record(None)
        if not self._authorised():
            return self._error(401)
        if self.path != MODELS:
            return self._error(404, f"No such path: {self.path}")
        card = {"id": owner.model, "object": "model", "created": 1_700_000_000, "owned_by": "tests"}
        return self._send(200, _encoded({"object": "list", "data": [card]}))

    def do_POST(self) -> None:
        owner, path = self.server.owner, self.path.removeprefix(self.server.owner.prefix)
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body: Any = json.loads(content)
        except ValueError:
            body = {}
        self._record(body)
        if not self._authorised():
            return self._fail("401", 401, "Incorrect API key provided.")
        if path == TOKENIZE and owner.tokens is not None:
            ids = owner.tokens.encode(body["prompt"])
            return self._send(200, _encoded({"count": len(ids), "max_model_len": owner.tokens.context, "tokens": ids}))
        if path not in owner.paths:
            return self._fail("404", 404, f"No such path: {path}")
        if complaint := _complaint(path, body, owner.tokens) or owner.complaint(body):
            return self._fail("400", 400, complaint)
        try:
            key = request_key(path, body)
            attempt = owner.attempt(key)
            kind = _known(fault) if (fault := owner.schedule and owner.schedule(key, attempt)) else None
            if owner.writer is None:
                texts = good_texts(path, body)
            else:
                count = len(_prompts(path, body)) * _choices(body)
                texts = [owner.writer(body, path) for _ in range(count)]
        except Exception as error:  # an error of the test's own is not to be retried, and to be seen
            return self._fail("error", 400, f"The test's plan or writer failed: {error!r}")
        self.ids = ids_for(body, owner.tokens) if owner.tokens and body.get("return_token_ids") else None
        if owner.delay and self.server.stopping.wait(owner.delay):
            return self._lost()
        if kind is not None:
            return self._fault(kind, path, body, texts)
        with owner.lock:  # before sending, so that a client that has its answer finds it counted
            owner.answered += 1
        try:
            return self._send(200, _encoded(self._with_ids(answer_of(path, body, texts), body)))
        except OSError:
            with owner.lock:
                owner.answered -= 1
            return self._lost()

    def _fault(self, kind: str, path: str, body: dict[str, Any], texts: list[tuple[str, str]]) -> None:
        stopping, owner = self.server.stopping, self.server.owner
        if kind[0].isdigit():
            return self._fail(kind, int(kind[:3]), headers={"Retry-After": RETRY_AFTER} if kind == "429_retry_after" else {})
        self._count(kind)
        if kind in ("closed", "hang"):
            if kind == "hang":
                stopping.wait(owner.hang_seconds)
            return self._close()
        good = _encoded(self._with_ids(answer_of(path, body, texts), body))
        if kind == "nested_json":
            return self._send(200, b"[" * 200_000)
        if kind == "error_in_200":
            return self._send(200, _encoded({"error": {"message": "Provider returned error", "code": 502}}))
        if kind == "half_json":
            return self._send(200, good[: len(good) // 2])
        if kind == "trickle":
            self._head(200, len(good))
            for place in range(len(good)):
                if stopping.wait(owner.trickle_seconds):
                    return self._close()
                self.wfile.write(good[place : place + 1])
            return None
        return self._send(200, _encoded(self._with_ids(spoilt(kind, path, body, texts), body, kind)))

    def _with_ids(self, answer: dict[str, Any], body: dict[str, Any], kind: str | None = None) -> dict[str, Any]:
        """The document with what vLLM adds for `return_token_ids`; `wrong_types` spoils that too."""
        if self.ids is not None and isinstance(answer["choices"], list):
            ids, reason = self.ids
            told: Any = ["7"] if kind == "wrong_types" else ids
            for choice in answer["choices"]:
                choice |= {"token_ids": told, "prompt_token_ids": body["prompt"], "stop_reason": None, "finish_reason": reason}
            answer["usage"]["completion_tokens"] = len(ids)
        return answer

    def _record(self, body: Any) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.server.owner.lock:
            self.server.owner.requests.append({"method": self.command, "path": self.path, "body": body, "headers": headers})

    def _authorised(self) -> bool:
        key = self.server.owner.api_key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def _count(self, kind: str) -> None:
        with self.server.owner.lock:
            self.server.owner.faults[kind] += 1

    def _lost(self) -> None:
        self._count("lost")
        self._close()

    def _close(self) -> None:
        self.close_connection = True
        _hang_up(self.connection)

    def _fail(self, kind: str, status: int, message: str | None = None, headers: dict[str, str] | None = None) -> None:
        self._count(kind)
        self._error(status, message, headers)

    def _error(self, status: int, message: str | None = None, headers: dict[str, str] | None = None) -> None:
        usual, name, code = ERRORS[status]
        error = {"message": message or usual, "type": name, "param": None, "code": code}
        self._send(status, _encoded({"error": error}), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(status, len(content), headers)
        self.wfile.write(content)

    def _head(self, status: int, length: int, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()


# --- small things -----------------------------------------------------------------------------------------------------


def _draw(*parts: Any) -> int:
    """A number that is a function of these values, the same on every machine."""
    return int.from_bytes(hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()[:8])


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise ValueError(f"no such fault: {kind!r}; there are {', '.join(KINDS)}")
    return kind


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the other side was faster
        connection.shutdown(socket.SHUT_RDWR)


def _encoded(document: Any) -> bytes:
    return json.dumps(document).encode()  # ASCII only: a lone surrogate travels as an escape


def _choices(body: dict[str, Any]) -> int:
    count = body.get("n")
    return 1 if count is None else count


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(item, int) for item in prompt)


def _prompts(path: str, body: dict[str, Any]) -> list[Any]:
    """Return what to complete: the messages, a text, token ids, or each of a list of them."""
    asked = body["messages"] if path == CHAT else body["prompt"]
    return asked if path == COMPLETIONS and isinstance(asked, list) and not _is_ids(asked) else [asked]


def _plain(content: Any) -> str:
    """The text within a text, a message, a part of one, or a list of these."""
    if isinstance(content, list):
        return " ".join(map(_plain, content))
    if isinstance(content, dict):
        return _plain(content.get("content", content.get("text")))
    return content if isinstance(content, str) else ""


def _complaint(path: str, body: Any, tokens: Tokens | None = None) -> str | None:
    """Return the error in a request, of those that this server checks, or None."""
    if not isinstance(body, dict):
        return "The body is not a JSON object."
    for name in ("model", "messages" if path == CHAT else "prompt"):
        if name not in body:
            return f"Missing required parameter: '{name}'."
    if path == CHAT and not (isinstance(body["messages"], list) and body["messages"]):
        return "'messages' must be a list that is not empty."
    if body.get("stream"):
        return "This server does not stream."
    if tokens and _is_ids(body.get("prompt")) and len(body["prompt"]) >= tokens.context:
        return f"This model's maximum context length is {tokens.context} tokens."
    for name in ("n", "max_tokens", "max_completion_tokens"):
        if body.get(name) is not None and (not isinstance(body[name], int) or body[name] < 1):
            return f"'{name}' must be a whole number of at least 1."
    return None
