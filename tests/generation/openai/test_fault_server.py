"""The fault server: the configured failures, and otherwise deterministic completions."""

import http.client
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest

from fault_server import INVALID, KINDS, PERMANENT, TRANSIENT, FaultServer, a_third, always, first, request_key, words_for

pytestmark = pytest.mark.server

TEXT = {"model": "m", "prompt": "The film was", "seed": 3}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "The film was"}], "seed": 3}
BODIES = {"/v1/completions": TEXT, "/v1/chat/completions": CHAT}


def connect(server: FaultServer, timeout: float = 5.0) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=timeout)


def exchange(
    connection: http.client.HTTPConnection, path: str, body: Any = None, **headers: str
) -> tuple[int, Any, dict[str, str]]:
    content = None if body is None else json.dumps(body).encode()
    connection.request("GET" if body is None else "POST", path, content, headers)
    with connection.getresponse() as response:
        return response.status, json.loads(response.read()), {name.lower(): value for name, value in response.getheaders()}


def ask(server: FaultServer, path: str = "/v1/completions", body: Any = TEXT, timeout: float = 5.0, **headers: str) -> Any:
    with closing(connect(server, timeout)) as connection:
        return exchange(connection, path, body, **headers)[:2]


def text_of(answer: Any, index: int = 0) -> Any:
    choice = answer["choices"][index]
    return choice["message"]["content"] if "message" in choice else choice["text"]


@pytest.fixture(scope="module")
def good():
    with FaultServer() as server:
        yield server


# --- good answers -----------------------------------------------------------------------------------------------------


def test_a_completion_looks_like_one(good: FaultServer):
    status, answer = ask(good)
    text = "".join(words_for("The film was", 3, 0))
    assert status == 200
    assert answer["object"] == "text_completion"
    assert answer["model"] == "m"
    assert answer["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}]
    words = len(text.split())
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": words, "total_tokens": 3 + words}
    assert text.startswith(" ")
    assert 3 <= words <= 12
    assert answer["id"].startswith("cmpl-")


def test_a_chat_answer_looks_like_one(good: FaultServer):
    status, answer = ask(good, "/v1/chat/completions", CHAT)
    assert status == 200
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["prompt_tokens"] == 3
    assert text_of(answer)


def test_models_are_listed(good: FaultServer):
    asked = good.asked
    status, answer = ask(good, "/v1/models", None)
    assert (status, answer["data"][0]["id"], good.asked) == (200, "fault-model", asked)


def test_the_same_question_has_the_same_answer_and_another_seed_another(good: FaultServer):
    assert ask(good) == ask(good, body=dict(reversed(TEXT.items())))
    answers = {text_of(ask(good, body={**TEXT, "seed": seed})[1]) for seed in range(8)}
    assert len(answers) == 8


def test_several_choices_differ_and_the_first_is_the_only_one_of_one(good: FaultServer):
    several, one = ask(good, body={**TEXT, "n": 3})[1], ask(good)[1]
    assert len({text_of(several, index) for index in range(3)}) == 3
    assert text_of(several) == text_of(one)


def test_prompts_may_be_lists_of_texts_or_token_ids(good: FaultServer):
    both = ask(good, body={**TEXT, "prompt": ["The film was", "A dog"]})[1]
    assert [text_of(both, index) for index in range(2)] == ["".join(words_for(p, 3, 0)) for p in ("The film was", "A dog")]
    ids = ask(good, body={**TEXT, "prompt": [5, 6, 7, 8]})[1]
    assert (len(ids["choices"]), ids["usage"]["prompt_tokens"]) == (1, 4)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_is_cut_to_the_words_that_are_allowed(good: FaultServer, name: str):
    whole = text_of(ask(good)[1])
    choice = ask(good, body={**TEXT, name: 2})[1]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (" " + " ".join(whole.split()[:2]), "length")
    exact = ask(good, body={**TEXT, name: len(whole.split())})[1]["choices"][0]
    assert (exact["text"], exact["finish_reason"]) == (whole, "stop")


def test_a_connection_is_kept_and_answers_at_once(good: FaultServer):
    with closing(connect(good)) as connection:
        exchange(connection, "/v1/completions", TEXT)
        kept, began = connection.sock, time.monotonic()
        for _ in range(40):
            assert exchange(connection, "/v1/completions", TEXT)[0] == 200
        assert connection.sock is kept
        assert time.monotonic() - began < 1.5  # delayed acknowledgements would take 40 x 40 ms


@pytest.mark.parametrize(
    "body", [{"prompt": "x"}, {"model": "m"}, ["x"], {**TEXT, "n": 0}, {**TEXT, "stream": True}, {**TEXT, "max_tokens": "9"}]
)
def test_a_bad_request_is_refused(good: FaultServer, body: Any):
    status, answer = ask(good, body=body)
    assert status == 400
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_a_writer_writes_instead_and_its_errors_are_not_retried():
    def writer(body: dict[str, Any], path: str) -> tuple[str, str]:
        return f" {path} {body['prompt'].upper()}", "length"

    with FaultServer(writer=writer) as server:
        choice = ask(server)[1]["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (" /v1/completions THE FILM WAS", "length")
        status, answer = ask(server, body={**TEXT, "prompt": [1, 2]})
        assert status == 400
        assert "AttributeError" in answer["error"]["message"]
        assert server.faults == {"error": 1}


def test_requests_are_remembered_and_the_key_is_checked():
    with FaultServer(api_key="sesame") as server:
        assert ask(server, Authorization="Bearer other")[0] == 401
        status, answer = ask(server, "/v1/models", None)
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert ask(server, Authorization="Bearer sesame")[0] == 200
        assert [request["path"] for request in server.requests] == ["/v1/completions", "/v1/models", "/v1/completions"]
        assert server.requests[2]["body"] == TEXT
        assert server.requests[2]["headers"]["authorization"] == "Bearer sesame"
        assert (server.asked, server.answered, server.faults) == (2, 1, {"401": 1})


def test_answers_are_delayed_side_by_side():
    with FaultServer(delay=0.2) as server, ThreadPoolExecutor(8) as pool:
        began = time.monotonic()
        list(pool.map(lambda seed: ask(server, body={**TEXT, "seed": seed}), range(8)))
        assert 0.2 <= time.monotonic() - began < 1.5


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [*PERMANENT, *(kind for kind in TRANSIENT if kind[0].isdigit())]
)  # the kinds whose name is their status
def test_a_status_comes_with_an_error_in_json(kind: str):
    with FaultServer(always(kind)) as server, closing(connect(server)) as connection:
        status, answer, headers = exchange(connection, "/v1/completions", TEXT)
        assert status == int(kind[:3])
        assert answer["error"]["message"]
        assert headers.get("retry-after") == ("0" if kind == "429_retry_after" else None)
        assert (server.answered, server.faults) == (0, {kind: 1})


def test_a_closed_connection_says_nothing():
    with FaultServer(first(1, "closed")) as server:
        with pytest.raises(http.client.RemoteDisconnected):
            ask(server)
        assert ask(server)[0] == 200


def test_a_hang_ends_in_silence_or_in_a_time_out():
    with FaultServer(always("hang"), hang_seconds=0.3) as server:
        with pytest.raises(TimeoutError):
            ask(server, timeout=0.1)
        began = time.monotonic()
        with pytest.raises(http.client.RemoteDisconnected):
            ask(server)
        assert time.monotonic() - began >= 0.3


def test_a_trickle_is_a_good_answer_that_takes_for_ever():
    with FaultServer(first(1, "trickle"), trickle_seconds=0.05) as server, closing(connect(server)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(TEXT))
        with connection.getresponse() as response:
            began = time.monotonic()
            head = response.read(5)
            assert time.monotonic() - began >= 0.2
            server.stop()
            with pytest.raises(http.client.IncompleteRead):
                response.read()
        server.start()
        assert json.dumps(ask(server)[1]).encode().startswith(head)


def test_a_document_can_be_nested_without_end_or_be_an_error():
    with FaultServer(always("nested_json")) as server, pytest.raises((RecursionError, json.JSONDecodeError)):
        ask(server)
    with FaultServer(always("error_in_200")) as server:
        assert ask(server) == (200, {"error": {"message": "Provider returned error", "code": 502}})


def test_half_a_document_arrives_whole():
    with FaultServer(first(1, "half_json")) as server, closing(connect(server)) as connection:
        with pytest.raises(json.JSONDecodeError):
            exchange(connection, "/v1/completions", TEXT)
        assert exchange(connection, "/v1/completions", TEXT)[0] == 200  # on the same connection: its length was right


@pytest.mark.parametrize("path", BODIES)
def test_types_are_wrong_in_two_ways(path: str):
    with FaultServer(always("wrong_types")) as server:
        choices = [ask(server, path, {**BODIES[path], "seed": seed})[1]["choices"] for seed in range(8)]
    texts = [text_of({"choices": found}) for found in choices if not isinstance(found, str)]
    assert 0 < len(texts) < 8
    assert set(texts) == {42}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(("kind", "count"), [("too_few", 0), ("too_many", 3)])
def test_counts_are_wrong(path: str, kind: str, count: int):
    with FaultServer(always(kind)) as server:
        assert len(ask(server, path, BODIES[path])[1]["choices"]) == count


@pytest.mark.parametrize("path", BODIES)
def test_texts_are_invalid_each_in_its_way(path: str):
    found: dict[str, Any] = {}
    with FaultServer() as server:
        for kind in INVALID:
            server.schedule = always(kind)
            status, answer = ask(server, path, BODIES[path])
            assert status == 200
            found[kind] = answer["choices"][0]
        assert server.faults == dict.fromkeys(INVALID, 1)
    texts = {kind: text_of({"choices": [choice]}) for kind, choice in found.items()}
    assert texts["empty"] == ""
    assert texts["ignores"][0].isupper()
    assert "\x00" in texts["nul"]
    assert "\ud800" in texts["surrogate"]
    assert (len(texts["too_long"].split()), found["too_long"]["finish_reason"]) == (5000, "stop")
    if path == "/v1/completions":
        assert (texts["refusal"], found["refusal"]["finish_reason"]) == ("", "content_filter")
    else:
        assert texts["refusal"] is None
        assert found["refusal"]["message"]["refusal"]
        assert found["refusal"]["finish_reason"] == "stop"


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_third_of_attempts_fail_and_none_for_ever():
    plan = a_third(TRANSIENT, seed=1, most=2)
    keys = [request_key("/v1/completions", {**TEXT, "seed": seed}) for seed in range(3000)]
    kinds = Counter(plan(key, 0) for key in keys)
    assert 0.30 < 1 - kinds[None] / len(keys) < 0.37
    assert set(kinds) == {None, *TRANSIENT}
    assert max(sum(plan(key, attempt) is not None for attempt in range(15)) for key in keys[:100]) == 2
    assert [plan(key, 0) for key in keys] == [a_third(TRANSIENT, seed=1, most=2)(key, 0) for key in keys]
    assert [plan(key, 0) for key in keys] != [a_third(TRANSIENT, seed=2, most=2)(key, 0) for key in keys]


def test_an_unknown_kind_is_refused():
    for make in (lambda: always("418"), lambda: first(1, "418"), lambda: a_third(["500", "418"])):
        with pytest.raises(ValueError, match="418"):
            make()


def test_faults_do_not_depend_on_the_order_of_requests():
    kinds = [kind for kind in KINDS if kind not in ("hang", "trickle")]

    def run(seeds: list[int], workers: int) -> tuple[dict[int, str], Counter[str]]:
        def until_answered(seed: int) -> tuple[int, str]:
            for _ in range(3):
                try:
                    status, answer = ask(server, body={**TEXT, "seed": seed})
                    text = text_of(answer) if status == 200 else None
                except (OSError, ValueError, http.client.HTTPException, TypeError, LookupError, RecursionError):
                    continue
                if text == "".join(words_for(TEXT["prompt"], seed, 0)) and len(answer["choices"]) == 1:
                    return seed, text
            raise AssertionError("more than two faults")

        with FaultServer(a_third(kinds)) as server, ThreadPoolExecutor(workers) as pool:
            texts = dict(pool.map(until_answered, seeds))
            assert server.answered == len(seeds)
            assert server.asked == server.answered + server.faults.total()
            return texts, server.faults

    seeds = list(range(60))
    assert run(seeds, 1) == run(seeds[::-1], 6)


# --- stopping and starting --------------------------------------------------------------------------------------------


def test_it_stops_with_its_connections_and_starts_where_it_was():
    with FaultServer(first(2, "500")) as server, closing(connect(server)) as connection:
        url = server.url
        assert exchange(connection, "/v1/completions", TEXT)[0] == 500
        server.stop()
        server.stop()
        with pytest.raises((ConnectionError, http.client.HTTPException)):
            exchange(connection, "/v1/completions", TEXT)
        with pytest.raises(ConnectionRefusedError):
            ask(server)
        server.start()
        assert server.url == url
        assert [ask(server)[0], ask(server)[0]] == [500, 200]  # attempts are remembered
        with pytest.raises(RuntimeError, match="already"):
            server.start()


def test_a_stop_interrupts_an_answer_on_its_way():
    with FaultServer(delay=30.0) as server:
        failures: list[BaseException] = []

        def client() -> None:
            try:
                ask(server)
            except (OSError, http.client.HTTPException) as error:
                failures.append(error)

        thread = threading.Thread(target=client)
        thread.start()
        while not server.requests:
            time.sleep(0.01)
        began = time.monotonic()
        server.stop()
        thread.join(5)
        assert time.monotonic() - began < 2
        assert len(failures) == 1
        assert (server.answered, server.faults) == (0, {"lost": 1})
