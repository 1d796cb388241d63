"""Guides on servers: requests, failures, the cache and the counts of usage."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import pytest

import fault_server
from fault_server import INVALID, TRANSIENT, FaultServer, a_third, always, first
from helpers import config_of, guide_config, tiny_trainer
from rlgf.algorithms.registry import d2lols, ppo_pp
from rlgf.cli.options import beta_changes
from rlgf.config.loading import override
from rlgf.config.schema import Config
from rlgf.config.sections import EndpointConfig, GuideConfig, JudgeConfig, TaskConfig
from rlgf.errors import ConfigError, GuideError, Interrupted, TrainingError
from rlgf.evaluation.chat_judge import chat_judge
from rlgf.evaluation.win_rate import summary, win_rate
from rlgf.generation.openai.cache import ResponseCache
from rlgf.generation.openai.client import Server, connect, parse_spec
from rlgf.generation.openai.pool import EndpointPool, PoolRequest
from rlgf.generation.openai.responses import ServerRequest
from rlgf.guides.base import Completion, CompletionRequest, query_guide
from rlgf.guides.human import HumanGuide
from rlgf.guides.remote import RemoteGuide
from rlgf.interrupts import handle_signals
from rlgf.pipeline.resolve import resolve
from rlgf.types import GUIDE, Prompt, SamplingParams

pytestmark = pytest.mark.server

FILM = "The film begins in a quiet town"
CHAT = ("assistant", "continue_final_message", "prefix", "instruction")


def remote(server: FaultServer, folder: Path, mode: str = "completion", **options: Any) -> RemoteGuide:
    quick: dict[str, Any] = {"retry_seconds": 0.0, "timeout_seconds": 1.0, "concurrency": 4}
    config = guide_config(**{**quick, **options})
    spec = f"server:fault-model@{server.url}"
    cache = ResponseCache(folder / "responses.sqlite")
    return RemoteGuide(Server(spec, config, mode), config, cache, sleep=lambda seconds: None)


def requests(count: int, prefix: str = "") -> list[CompletionRequest]:
    return [CompletionRequest(Prompt(f"{FILM} {i}"), [1], prefix, [2] if prefix else [], 12, 0, i, 0) for i in range(count)]


def sums_hold(counts: dict[str, float]) -> bool:
    asked = counts["guide_attempts"] == counts["guide_succeeded"] + counts["guide_retried"] + counts["guide_given_up"]
    served = counts["guide_rows_generated"] + counts["guide_rows_cached"] + counts["guide_rows_given_up"]
    return asked and counts["guide_rows_needed"] == served


@pytest.fixture
def healthy() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.mark.parametrize("mode", ["completion", *CHAT])
def test_every_way_of_asking_brings_texts_in_order(healthy: FaultServer, tmp_path: Path, mode: str) -> None:
    texts = query_guide(remote(healthy, tmp_path, mode), requests(6, " and then"))
    again = query_guide(remote(healthy, tmp_path / "fresh", mode), list(reversed(requests(6, " and then"))))
    assert [text.text for text in texts] == [text.text for text in reversed(again)]
    assert len({text.text for text in texts}) > 3
    assert all(text.text[0].isspace() for text in texts)  # one space at the joint


def test_chat_dialects_put_the_prefix_where_the_server_continues_it(healthy: FaultServer, tmp_path: Path) -> None:
    bodies = {}
    for mode in CHAT:
        query_guide(remote(healthy, tmp_path / mode, mode), requests(1, " and then"))
        bodies[mode] = healthy.requests[-1]["body"]
    for mode in ("assistant", "continue_final_message", "prefix"):
        assert bodies[mode]["messages"][-1]["content"] == " and then"
        assert bodies[mode]["messages"][-1]["role"] == "assistant"
    assert bodies["prefix"]["messages"][-1]["prefix"] is True
    assert bodies["continue_final_message"]["continue_final_message"] is True
    assert bodies["continue_final_message"]["add_generation_prompt"] is False
    assert bodies["instruction"]["messages"][-1]["content"].endswith("a quiet town 0 and then")


@pytest.mark.parametrize("kind", TRANSIENT)
def test_a_transient_failure_is_asked_again_and_leaves_no_trace_in_the_text(tmp_path: Path, kind: str) -> None:
    with FaultServer() as server:
        wanted = query_guide(remote(server, tmp_path / "a"), requests(2))
    with FaultServer(first(1, kind), hang_seconds=0.2) as server:
        guide = remote(server, tmp_path / "b", timeout_seconds=0.6)
        assert query_guide(guide, requests(2)) == wanted
        counts = guide.pop_metrics()
        assert counts["guide_attempts"] == server.asked  # as the other side counts
    assert counts["guide_retried"] == 2
    assert counts["guide_succeeded"] == 2
    assert sums_hold(counts)


@pytest.mark.parametrize("kind", ["empty", "surrogate"])
@pytest.mark.parametrize("mode", ["completion", "instruction"])
def test_an_unusable_answer_is_drawn_anew(tmp_path: Path, kind: str, mode: str) -> None:
    with FaultServer(first(1, kind)) as server:  # each draw is another question, and its first attempt fails
        guide = remote(server, tmp_path, mode, invalid_retries=1)
        with pytest.raises(TrainingError, match=r"no usable completion .* in 2 samples"):
            query_guide(guide, requests(1))
        counts = guide.pop_metrics()
    assert counts["guide_responses_invalid"] == 2
    assert counts["guide_rows_given_up"] == 1
    assert sums_hold(counts)
    seeds = [request["body"]["seed"] for request in server.requests]
    assert len(set(seeds)) == 2


@pytest.mark.parametrize("kind", fault_server.PERMANENT)
def test_a_permanent_failure_stops_at_once(tmp_path: Path, kind: str) -> None:
    with FaultServer(always(kind)) as server:
        guide = remote(server, tmp_path)
        with pytest.raises(TrainingError, match="rejects requests"):
            query_guide(guide, requests(1))
        assert len(server.requests) == 1


def test_an_address_without_v1_is_told_to_lack_it(healthy: FaultServer, tmp_path: Path) -> None:
    spec = f"server:fault-model@{healthy.url.removesuffix('/v1')}"
    config = GuideConfig()
    guide = RemoteGuide(Server(spec, config, "completion"), config, ResponseCache(tmp_path / "responses.sqlite"))
    with pytest.raises(TrainingError, match=r"No such path: /completions; most servers' URLs end in /v1"):
        query_guide(guide, requests(1))


def test_when_retries_are_used_up_the_run_stops(tmp_path: Path) -> None:
    with FaultServer(always("503")) as server:
        guide = remote(server, tmp_path, retries=2)
        with pytest.raises(TrainingError, match=r"failed 3 times \(HTTP 503\)"):
            query_guide(guide, requests(1))
        assert guide.pop_metrics()["guide_attempts"] == 3


def test_with_wait_it_waits_for_the_server_to_come_back(tmp_path: Path) -> None:
    with FaultServer(first(9, "503")) as server:
        guide = remote(server, tmp_path, retries=1, on_failure="wait")
        assert len(query_guide(guide, requests(1))) == 1
        assert guide.pop_metrics()["guide_retried"] == 9


def test_retry_after_is_honoured(tmp_path: Path) -> None:
    pauses: list[float] = []
    with FaultServer(first(1, "429_retry_after")) as server:
        guide = remote(server, tmp_path)
        guide.pool._sleep = pauses.append  # pyright: ignore[reportPrivateUsage]
        query_guide(guide, requests(1))
    assert len(pauses) == 1


def test_answers_are_kept_and_replayed_without_a_server(tmp_path: Path) -> None:
    with FaultServer() as server:
        wanted = query_guide(remote(server, tmp_path), requests(5))
        query_guide(remote(server, tmp_path), requests(5))
        assert len(server.requests) == 5
    gone = remote(server, tmp_path, offline=True)
    assert query_guide(gone, requests(5)) == wanted
    counts = gone.pop_metrics()  # as in the run that is replayed
    assert (counts["guide_rows_generated"], counts["guide_rows_cached"], counts["guide_attempts"]) == (5, 0, 5)
    assert gone.state() == {"begun": 0}  # but nothing is asked or paid
    with pytest.raises(TrainingError, match="offline"):
        query_guide(gone, requests(6))


def test_the_cache_asks_neither_address_nor_how_the_guide_is_reached(tmp_path: Path) -> None:
    with FaultServer() as server:
        wanted = query_guide(remote(server, tmp_path), requests(2))
    with FaultServer() as other:
        assert query_guide(remote(other, tmp_path, concurrency=1, retries=9), requests(2)) == wanted
        assert not other.requests


KEYS = [
    ("completion", "2a5b782e843f097b404ce6e6de9ce30933797c040e4f7162a09bd853485e94da"),
    ("instruction", "19cff4f574eb65e350d99405554ef8dc746cce4ac65823b2e36b83ac897511a4"),
    ("token_ids", "b69cfece09b1e3f48ecefdad0b08b8ce4a7dec2471fe89a6742bcb0ded62d4a7"),
]


@pytest.mark.parametrize(("mode", "key"), KEYS)
def test_responses_of_an_earlier_version_are_found(tmp_path: Path, mode: str, key: str) -> None:
    """The keys are those of commit b9c0d81, before guide and judge shared a pool."""
    sampling = SamplingParams(temperature=0.7, top_p=0.9)
    config = guide_config(extra_body={"top_k": 5}, thinking_tokens=3, stop=("\n",), sampling=sampling, offline=True)
    cache = ResponseCache(tmp_path / "responses.sqlite")
    cache.put(key, {"text": " found", "finished": True})
    server = Server("server:m@http://127.0.0.1:9/v1", config, mode, end_ids=(2,), exact=True)
    ids = mode == "token_ids"
    asked = CompletionRequest(Prompt("The film"), [1], "", [5, 6] if ids else [], 12, 3 if ids else 0, 7, 1)
    assert query_guide(RemoteGuide(server, config, cache), [asked]) == [Completion(" found", True)]


def pool(server: FaultServer, folder: Path, **options: Any) -> EndpointPool:
    config = guide_config(**{"retry_seconds": 0.0, "concurrency": 4, **options})
    reached = Server(f"server:fault-model@{server.url}", config, "none", role="oracle")
    return EndpointPool(reached, ResponseCache(folder / "responses.sqlite", "oracle"), sleep=lambda seconds: None)


def texts_of(pool: EndpointPool, count: int) -> list[Any]:
    asked = [PoolRequest(index, [ServerRequest(f"{FILM} {index}", "", 9, index)]) for index in range(count)]
    return pool.complete(asked, lambda row, response: response.last.get("text"))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (None, {"max_requests": 2}, r"the oracle's budget is used up \(2 of oracle\.endpoint\.max_requests=2\)"),
        (None, {"max_tokens": 1, "concurrency": 1}, r"of oracle\.endpoint\.max_tokens=1\)"),
        (None, {"offline": True}, "the oracle is offline"),
        ("401", {}, r"the oracle at .* rejects requests .*: fix oracle\.spec"),
    ],
)
def test_a_pool_names_its_role_and_no_guide(tmp_path: Path, kind: str | None, options: dict[str, Any], words: str) -> None:
    schedule = always(kind) if kind else lambda key, attempt: None
    with FaultServer(schedule) as server, pytest.raises(TrainingError, match=words) as caught:
        texts_of(pool(server, tmp_path, **options), 4)
    assert not isinstance(caught.value, GuideError)
    assert "guide" not in str(caught.value)


def test_a_pool_leaves_to_its_role_what_a_given_up_request_means(tmp_path: Path) -> None:
    with FaultServer(always("503")) as server:
        asked = pool(server, tmp_path, retries=1)
        assert texts_of(asked, 2) == [None, None]
        given_up = asked.complete([PoolRequest(0, [ServerRequest(f"{FILM} 0", "", 9, 0)])], lambda row, response: response.last)
    assert given_up[0]["given_up"] == f"the oracle at {server.url} failed 2 times (HTTP 503)"
    assert asked.usage.state()["given_up"] == 3
    assert asked.usage.pop_counts()["attempts"] == 6
    assert asked.usage.pop_counts() == {}


def test_a_signal_leaves_the_pool_at_once_and_requests_in_flight_are_stored_later(tmp_path: Path) -> None:
    """So a checkpoint is written first, and what was paid for is kept."""
    arrived, answer, lines = Event(), Event(), list[str]()

    def wait(body: dict[str, Any]) -> None:
        arrived.set()
        answer.wait(20)

    def interrupt() -> None:
        arrived.wait(20)
        os.kill(os.getpid(), signal.SIGTERM)

    with FaultServer(complaint=wait) as server:
        asked = pool(server, tmp_path, concurrency=2)
        asked._report = lines.append  # pyright: ignore[reportPrivateUsage]
        Thread(target=interrupt).start()
        with pytest.raises(Interrupted), handle_signals():
            texts_of(asked, 6)
        assert not answer.is_set()
        assert lines == []
        answer.set()
        asked.wait()
        assert lines == ["oracle: waiting for requests in flight, 60 s at most"]
        assert 1 <= len(server.requests) <= 2
        assert asked.usage.state()["succeeded"] == len(server.requests) == len(asked.cache) / 2  # each with what it took
        asked.wait()  # there is nothing more to wait for
        assert len(lines) == 1


def test_a_pool_keeps_to_its_rate_and_to_its_number_of_requests_at_once(tmp_path: Path) -> None:
    pauses: list[float] = []
    at_once, most = list[int](), list[int]()

    def watch(body: dict[str, Any]) -> None:
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.05)
        at_once.pop()

    with FaultServer(complaint=watch) as server:
        asked = pool(server, tmp_path, requests_per_minute=0.6, concurrency=2)
        asked._sleep = pauses.append  # pyright: ignore[reportPrivateUsage]
        assert len(set(texts_of(asked, 4))) == len(server.requests) == 4
    assert sorted(round(pause / 100) for pause in pauses) == [0, 1, 2, 3]
    assert max(most) == 2


WRITER = """
import sys, time
from contextlib import ExitStack
from pathlib import Path
from rlgf.evaluation.chat_judge import chat_judge
from rlgf.evaluation.win_rate import summary, win_rate
from rlgf.generation.openai.cache import ResponseCache
print("ready", flush=True)
begin = float(sys.stdin.readline())
for number in range(40):  # at the same moments
    time.sleep(max(0, begin + 0.02 * number - time.time()))
    ResponseCache(Path(sys.argv[1]) / f"{number}.sqlite")
cache = ResponseCache(Path(sys.argv[1]) / "0.sqlite")
for number in range(300):
    cache.put(f"question {number}", {"text": sys.argv[2], "finished": True})
print([cache.get(f"question {number}")["text"] for number in range(300)])
"""


def test_processes_that_ask_the_same_go_on_with_the_same_answers(tmp_path: Path) -> None:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), name], **pipes))
            for name in ("a", "b")
        ]
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        begin = time.time() + 0.1  # both open new files, and ask, at once
        with ThreadPoolExecutor(2) as pool:
            outputs = list(pool.map(lambda process: process.communicate(f"{begin}\n")[0], processes))
        assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1]
    assert len(ResponseCache(tmp_path / "0.sqlite")) == 300


def test_limits_stop_the_run_and_what_was_paid_for_is_kept(healthy: FaultServer, tmp_path: Path) -> None:
    guide = remote(healthy, tmp_path, max_requests=3)  # four at once
    with pytest.raises(TrainingError, match=r"max_requests=3"):
        query_guide(guide, requests(5))
    assert len(healthy.requests) == 3
    assert len(guide.pool.cache) == 2 * 3  # each with what it took
    resumed = remote(healthy, tmp_path, max_requests=3, concurrency=1)
    resumed.load_state(guide.state())
    with pytest.raises(TrainingError, match=r"max_requests=3"):
        query_guide(resumed, requests(5))
    assert len(healthy.requests) == 3


def test_costs_follow_from_tokens_and_prices(healthy: FaultServer, tmp_path: Path) -> None:
    guide = remote(healthy, tmp_path, price_input=1.0, price_output=10.0)
    query_guide(guide, requests(3))
    counts = guide.pop_metrics()
    assert counts["guide_cost"] == pytest.approx((counts["guide_prompt_tokens"] + 10 * counts["guide_completion_tokens"]) / 1e6)
    assert counts["guide_cost"] > 0
    with pytest.raises(ConfigError, match="max_cost needs"):
        override(Config(), [("guide.endpoint.max_cost", 1.0)])


def test_the_key_is_sent_and_shown_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123")
    with FaultServer(api_key="sk-secret-123") as server:
        query_guide(remote(server, tmp_path), requests(1))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong-456")
    with FaultServer(api_key="sk-secret-123") as server, pytest.raises(TrainingError) as caught:
        query_guide(remote(server, tmp_path / "other"), requests(1))
    assert "sk-" not in str(caught.value)
    monkeypatch.setenv("MODEL_HEADER", "Bearer sk-header-789")
    echo = FaultServer(complaint=lambda body: "the token sk-header-789 is too old")
    with echo as server, pytest.raises(TrainingError, match=r"the token \*\*\* is too old") as caught:
        query_guide(remote(server, tmp_path / "headers", extra_headers={"Authorization": "$MODEL_HEADER"}), requests(1))
    assert all(b"sk-" not in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "changes",
    [
        {"extra_headers": {"Authorization": "Bearer abc"}}, {"extra_headers": {"x-goog-api-key": "abc"}},
        {"extra_headers": {"Helicone-Auth": "abc"}}, {"extra_headers": {"X-Session-Token": "abc"}},
        {"extra_headers": {"X-Proxy": "Bearer abc"}}, {"extra_headers": {"X-Proxy": "sk-abc"}},
        {"extra_body": {"access_token": "abc"}}, {"extra_body": {"user": "sk-abc"}},
        {"extra_body": {"api_key": "abc"}}, {"extra_body": {"provider": {"apiKey": "abc"}}},
    ],
)  # fmt: skip
def test_written_out_secrets_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"environment|guide\.endpoint\.extra_headers"):
        Config(guide=guide_config(**changes))


def test_what_is_no_secret_is_not_refused() -> None:
    harmless = {"extra_headers": {"HTTP-Referer": "https://host", "X-Title": "films", "X-Author": "me"}}
    Config(guide=guide_config(**harmless, extra_body={"return_token_ids": True, "max_completion_tokens": 5}))


def test_secrets_that_cannot_be_secrets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("http://me:secret@host/v1", "http://host/v1?key=secret", "http://host/v1#secret"):
        with pytest.raises(ConfigError) as caught:
            parse_spec(f"server:m@{address}")
        assert "secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="MODEL_HEADER, which is not set"):
        Server("server:m@http://host/v1", guide_config(extra_headers={"x-api-key": "$MODEL_HEADER"}), "completion")
    for key in ("sk-ключ", "sk-a\x07b", "sk-a\nb"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ConfigError, match="OPENAI_API_KEY contains characters") as caught:
            Server("server:m@http://host/v1", GuideConfig(), "completion")
        assert "sk-" not in str(caught.value)


def test_white_space_around_a_key_is_not_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-123\n")
    with FaultServer(api_key="sk-secret-123") as server:
        query_guide(remote(server, tmp_path), requests(1))


def particular(body: dict[str, Any]) -> str | None:
    """Return the error of a reasoning model's server for the parameters that it refuses."""
    if "max_tokens" in body:
        return "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    if "temperature" in body:
        return "Unsupported value: 'temperature' does not support 0.7 with this model. Only the default (1) value is supported."
    return "Unsupported parameter: 'n'" if "n" in body else None


def test_a_server_that_refuses_parameters_is_asked_without_them(tmp_path: Path) -> None:
    reports: list[str] = []
    all_are_here = Barrier(4)

    def complaint(body: dict[str, Any]) -> str | None:
        if {"max_tokens", "temperature"} <= set(body):  # side by side: all four are refused before one is adapted
            all_are_here.wait(5)
        return particular(body)

    with FaultServer(complaint=complaint) as server:
        guide = remote(server, tmp_path, "instruction", sampling=SamplingParams(temperature=0.7), retries=0)
        guide.server._report = reports.append  # pyright: ignore[reportPrivateUsage]
        assert len(query_guide(guide, requests(4))) == 4
        body = server.requests[-1]["body"]
        counts = guide.pop_metrics()
        assert (counts["guide_attempts"], counts["guide_succeeded"]) == (server.asked, 4)
        assert guide.state()["begun"] == server.asked > 8
    assert sums_hold(counts)
    assert "max_completion_tokens" in body
    assert not {"max_tokens", "temperature", "n"} & set(body)
    assert sorted(reports) == [
        "guide: n is omitted from now on, as the server rejects it",
        "guide: temperature is omitted from now on, as the server rejects it",
    ]


def test_of_two_parameters_that_exclude_each_other_the_temperature_stays(tmp_path: Path) -> None:
    def either(body: dict[str, Any]) -> str | None:
        both = "temperature" in body and "top_p" in body
        return "`temperature` and `top_p` cannot both be specified for this model. Please use only one." if both else None

    with FaultServer(complaint=either) as server:
        query_guide(remote(server, tmp_path, sampling=SamplingParams(temperature=0.7, top_p=0.9)), requests(1))
        assert server.requests[-1]["body"]["temperature"] == 0.7
        assert "top_p" not in server.requests[-1]["body"]


def test_what_was_asked_for_in_extra_body_is_never_left_out(tmp_path: Path) -> None:
    with FaultServer(complaint=particular) as server:
        guide = remote(server, tmp_path, extra_body={"temperature": 0.7, "max_tokens": None, "n": None})
        with pytest.raises(TrainingError, match=r"rejects requests .*max_tokens"):
            query_guide(guide, requests(1))


def test_without_completions_auto_asks_by_instruction_and_remembers_it(tmp_path: Path) -> None:
    reports: list[str] = []
    with FaultServer(lambda key, attempt: None) as server:
        cache = ResponseCache(tmp_path / "a.sqlite")
        assert connect(f"server:m@{server.url}", GuideConfig(), cache, reports.append).mode == "completion"
    with FaultServer(paths=(fault_server.CHAT,)) as server:
        cache = ResponseCache(tmp_path / "b.sqlite")
        assert connect(f"server:m@{server.url}", GuideConfig(), cache, reports.append).mode == "instruction"
    assert "no text completion" in reports[0]
    assert connect(f"server:m@{server.url}", guide_config(offline=True), cache, reports.append).mode == "instruction"


def test_a_wrong_key_says_nothing_about_how_to_ask(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "responses.sqlite")
    with FaultServer(api_key="right") as server, pytest.raises(ConfigError, match=r"rejects requests \(Error code: 401"):
        connect(f"server:m@{server.url}", GuideConfig(), cache, print)
    assert len(cache) == 0
    with FaultServer(always("503")) as server:
        assert connect(f"server:m@{server.url}", GuideConfig(), cache, print).mode == "completion"
    assert len(cache) == 0


def test_having_nothing_to_add_to_a_prefix_is_believed_when_it_is_said_again(tmp_path: Path) -> None:
    with FaultServer(always("empty")) as server:
        guide = remote(server, tmp_path, invalid_retries=2)
        assert query_guide(guide, requests(1, " and then")) == [Completion("", True)]
        assert server.asked == 3
        counts = guide.pop_metrics()
        assert (counts["guide_responses_invalid"], counts["guide_rows_generated"], counts["guide_rows_given_up"]) == (3, 1, 0)
        with pytest.raises(TrainingError, match="generated nothing"):  # to a prompt there is always something to add
            query_guide(guide, requests(1))
    assert query_guide(remote(server, tmp_path, invalid_retries=2, offline=True), requests(1, " and then")) == [
        Completion("", True)
    ]


def test_a_used_up_quota_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fault_server.ERRORS, 429, ("You exceeded your quota.", "insufficient_quota", "insufficient_quota"))
    with FaultServer(always("429")) as server:
        with pytest.raises(TrainingError, match=r"rejects requests .*exceeded your quota"):
            query_guide(remote(server, tmp_path), requests(1))
        assert server.asked == 1


def test_limits_on_tokens_need_a_server_that_counts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fault_server.answer_of
    monkeypatch.setattr(fault_server, "answer_of", lambda *asked: {**plain(*asked), "usage": None})
    with FaultServer() as server:
        query_guide(remote(server, tmp_path / "a"), requests(1))
        with pytest.raises(TrainingError, match="reports no usage"):
            query_guide(remote(server, tmp_path / "b", max_tokens=100), requests(1))


def test_pauses_are_told_and_end_when_nothing_is_left_to_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One question is refused for good, while the others wait for a server that wants to be left alone for a minute."""
    monkeypatch.setattr(fault_server, "RETRY_AFTER", "60")

    def plan(key: str, attempt: int) -> str:
        return "429_retry_after" if key != refused else "403"

    reports: list[str] = []
    with FaultServer(delay=0.2) as server:
        query_guide(remote(server, tmp_path / "a"), requests(4))
        refused = fault_server.request_key(fault_server.COMPLETIONS, server.requests[0]["body"])
        server.schedule = plan
        guide = remote(server, tmp_path / "b")
        guide.pool._sleep, guide.pool._report = None, reports.append  # pyright: ignore[reportPrivateUsage]
        began = time.monotonic()
        with pytest.raises(TrainingError, match="rejects requests"):
            query_guide(guide, requests(4))
        assert time.monotonic() - began < 10
    assert reports in ([], ["guide: HTTP 429; retrying in 60 s"])  # the one refused may have been the first


def test_a_pause_is_spoken_of_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_server, "RETRY_AFTER", "60")
    reports: list[str] = []
    with FaultServer(first(2, "429_retry_after")) as server:
        guide = remote(server, tmp_path)
        guide.pool._report = reports.append  # pyright: ignore[reportPrivateUsage]
        query_guide(guide, requests(3))
    assert reports == ["guide: HTTP 429; retrying in 60 s"]


@pytest.mark.parametrize("name", ["imdb", "toy_reviews"])
def test_a_task_tells_a_chat_model_what_to_do_and_so_may_you(tmp_path: Path, name: str) -> None:
    """The template is part of what an answer is kept under, where one is used."""
    task = Config(task=TaskConfig(name))
    told = resolve(task).guide.settings.instruction
    assert told is not None
    assert "{text}" in told
    mine = resolve(override(task, [("guide.instruction", "Go on: {text}")])).guide.settings
    assert mine.instruction == "Go on: {text}"
    with pytest.raises(ConfigError, match=r"put \{text\} there"):
        override(task, [("guide.instruction", "Go on!")])
    with FaultServer() as server:
        for mode in ("instruction", "assistant", "completion"):
            for instruction in (told, mine.instruction):
                query_guide(remote(server, tmp_path / mode, mode, instruction=instruction), requests(1))
        contents = [request["body"]["messages"][0]["content"] for request in server.requests[:4]]
    assert contents[:2] == [told.replace("{text}", f"{FILM} 0"), f"Go on: {FILM} 0"]
    assert contents[2:] == contents[:2]
    assert server.asked == 5  # a completion has no template, so the second was kept


# --- training -----------------------------------------------------------------------------------------------------------

VOCABULARY = re.findall(r"\w+", " ".join(fault_server.WORDS))


def trained(server: FaultServer, folder: Path, **options: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """Metrics of a small D2LOLS run with both phases, and its rows."""
    guide = remote(server, folder, **options)
    algorithm = d2lols(0.5, 0.5, 2).build()
    config = config_of(ppo__completions_per_iteration=12, ppo__minibatch_size=12, ppo__iterations=4)
    trainer = tiny_trainer(algorithm, config, guide)
    steps = [trainer.step(i) for i in range(4)]
    return [metrics for metrics, _ in steps], [experience.rollout.completions for _, experience in steps]


def comparable(metrics: Sequence[dict[str, Any]], but: str = "guide_(attempts|retried)$") -> list[str]:
    """Metrics without times; where faults are compared with none, without how often had to be asked."""
    left_out = re.compile(f"seconds|per_second|latency|{but}" if but else "seconds|per_second|latency")
    return [
        json.dumps({k: v for k, v in row.items() if not left_out.search(k)}, sort_keys=True, default=str) for row in metrics
    ]


def test_transient_faults_change_nothing_bit_for_bit(tmp_path: Path) -> None:
    with FaultServer() as server:
        metrics, texts = trained(server, tmp_path / "a")
    with FaultServer(a_third(TRANSIENT), hang_seconds=0.2) as server:
        faulty, same = trained(server, tmp_path / "b", concurrency=8)
        assert server.faults.total() > 5
        assert sum(row["guide_attempts"] for row in faulty) == server.asked
    assert same == texts
    assert comparable(faulty) == comparable(metrics)
    assert all(sums_hold(row) for row in [*metrics, *faulty])


def test_invalid_faults_give_the_same_run_twice_and_no_row_is_lost(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        with FaultServer(a_third((*TRANSIENT, *INVALID)), hang_seconds=0.2) as server:
            runs.append(trained(server, tmp_path / name, invalid_retries=9, concurrency=8))
            assert sum(row["guide_attempts"] for row in runs[-1][0]) == server.asked
    assert runs[0][1] == runs[1][1]
    assert comparable(runs[0][0], but="") == comparable(runs[1][0], but="")
    assert all(sums_hold(row) for row in runs[0][0])


def test_a_run_replays_offline_to_the_same_metrics(tmp_path: Path) -> None:
    with FaultServer() as server:
        metrics, texts = trained(server, tmp_path)
    again, same = trained(server, tmp_path, offline=True)
    assert same == texts
    assert comparable(again, but="") == comparable(metrics, but="")


# --- a person -----------------------------------------------------------------------------------------------------------


def answering(*lines: str) -> tuple[list[str], Any]:
    """Return the shown text, and a keyboard that types these lines."""
    typed, shown = list(lines), list[str]()

    def read(mark: str) -> str:
        if not typed:
            raise EOFError
        return typed.pop(0)

    return shown, (read, shown.append)


def test_a_person_continues_skips_undoes_and_is_not_asked_twice(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "responses.sqlite")
    shown, (read, show) = answering("goes well.", "wrong", "undo", "right\\nly", "skip")
    texts = HumanGuide(cache, read, show).complete(requests(3, " and then"))
    assert [text.text for text in texts] == [" goes well.", " right\nly", ""]
    assert all(text.finished for text in texts)
    assert any("[[ and then]]" in line for line in shown)
    assert HumanGuide(cache, read, show).complete(requests(3, " and then")) == texts


def test_answers_of_a_person_who_leaves_are_kept(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path / "responses.sqlite")
    _, (read, show) = answering("one")
    with pytest.raises(TrainingError, match="needs a terminal"):
        query_guide(HumanGuide(cache, read, show), requests(2))
    _, (read, show) = answering("two")
    assert [text.text for text in query_guide(HumanGuide(cache, read, show), requests(2))] == [" one", " two"]


def test_what_a_person_is_shown_is_escaped(tmp_path: Path) -> None:
    shown, (read, show) = answering("fine")
    HumanGuide(ResponseCache(tmp_path / "a.sqlite"), read, show).complete(requests(1, " \x1b[2J"))
    assert not any("\x1b" in line for line in shown)


# --- the policy in the guide's stead ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ppo_pp", "aggrevated", "d2lols"])
def test_with_policy_the_run_goes_on_without_the_guide(tmp_path: Path, name: str) -> None:
    """Half of the prompts are never answered: rollins are skipped, rollouts finished by the policy, lone texts dropped."""

    def half(key: str, attempt: int) -> str | None:
        return "503" if int(key[:2], 16) % 2 else None

    algorithm = override(Config(), [("algorithm.name", name), *beta_changes(0.5)])
    runs: list[list[dict[str, Any]]] = []
    with FaultServer(half) as server:
        for options in ({}, {"offline": True}):
            guide = remote(server, tmp_path, on_failure="policy", retries=1, **options)
            config = config_of(ppo__completions_per_iteration=16, ppo__minibatch_size=16, ppo__iterations=2)
            trainer = tiny_trainer(algorithm.algorithm.build(), config, guide)
            steps = [trainer.step(i) for i in range(2)]
            runs.append([metrics for metrics, _ in steps])
            for metrics, experience in steps:
                rollout = experience.rollout
                given_up = metrics["guide_rows_substituted"] + metrics["guide_rows_dropped"]
                assert metrics["guide_rows_given_up"] == given_up > 0
                assert sums_hold(metrics)
                assert len(rollout.completions) == 16 - metrics["guide_rows_dropped"]
                alone = (rollout.rollout_by == GUIDE) & ~rollout.by_guide.any(1)
                assert not bool(rollout.after_switch[alone].any())  # the guide's critic learns nothing from them
                assert bool((rollout.switch_position[alone] == rollout.completion_mask.sum(1)[alone]).all())
                assert bool(experience.advantages.isfinite().all())
    assert comparable(runs[0], but="") == comparable(runs[1], but="")
    if name == "ppo_pp":
        assert all(metrics["guide_rows_dropped"] == 0 for metrics in runs[0])


# --- asking ahead -------------------------------------------------------------------------------------------------------


def ppo_pp_run(server: FaultServer, folder: Path, ahead: int) -> tuple[list[str], list[int]]:
    """Comparable metrics of a PPO++ run, and how many requests the server had seen after each iteration."""
    config = config_of(ppo__completions_per_iteration=12, ppo__minibatch_size=12, ppo__iterations=4, guide__prefetch=ahead)
    trainer = tiny_trainer(ppo_pp(0.5).build(), config, remote(server, folder))
    metrics: list[dict[str, Any]] = []
    seen: list[int] = []
    for iteration in range(4):
        metrics.append(trainer.step(iteration)[0])
        seen.append(int(sum(row["guide_rows_needed"] for row in metrics)))
    if trainer.prefetcher is not None:
        trainer.prefetcher.close()
    assert all(row["guide_rows_cached"] == 0 for row in metrics)  # asked ahead in this run is answered, not cached
    return comparable(metrics), seen


def test_asking_ahead_changes_no_result_and_asks_nothing_twice(tmp_path: Path) -> None:
    with FaultServer() as server:
        plain, needed = ppo_pp_run(server, tmp_path / "a", 0)
        assert len(server.requests) == needed[-1]
    with FaultServer(delay=0.01) as server:
        ahead, _ = ppo_pp_run(server, tmp_path / "b", 2)
        assert len(server.requests) == needed[-1]
        assert len({json.dumps(request["body"]) for request in server.requests}) == needed[-1]
    assert ahead == plain


def test_the_next_iterations_are_asked_for_while_this_one_is_written(tmp_path: Path) -> None:
    with FaultServer() as server:
        config = config_of(ppo__completions_per_iteration=12, ppo__minibatch_size=12, ppo__iterations=4, guide__prefetch=2)
        trainer = tiny_trainer(ppo_pp(1.0).build(), config, remote(server, tmp_path))
        trainer.collect_rollout(0)
        assert trainer.prefetcher is not None
        trainer.prefetcher._pool.shutdown(wait=True)  # pyright: ignore[reportPrivateUsage]
        assert len(server.requests) == 36  # this iteration's and two more


# --- refused questions --------------------------------------------------------------------------------------------------


def stormy(body: dict[str, Any]) -> str | None:
    """A third of the prompts are never answered, whatever is asked about them."""
    asked = str(body.get("prompt") or body.get("messages"))
    number = int(re.findall(r"\d+", asked)[-1]) if re.search(r"\d", asked) else 1
    return "content_filter: the content management policy" if number % 3 == 0 else None


@pytest.mark.parametrize("on_refusal", ["policy", "drop"])
def test_a_refused_question_costs_its_completion_and_not_the_run(tmp_path: Path, on_refusal: str) -> None:
    found: list[dict[str, float]] = []
    with FaultServer(complaint=stormy) as server:
        for options in ({}, {"offline": True}):
            guide = remote(server, tmp_path, on_refusal=on_refusal, **options)
            completions = query_guide(guide, requests(9))
            assert [completion.refused for completion in completions] == [True, False, False] * 3
            assert [completion.dropped for completion in completions] == [on_refusal == "drop", False, False] * 3
            found.append(guide.pop_metrics())
        assert server.asked == 9  # a refused question is not asked again, with no other seed either
    assert found[0]["guide_refused"] == found[1]["guide_refused"] == found[0]["guide_rows_given_up"] == 3
    assert all(map(sums_hold, found))
    assert guide.state()["refused"] == 3


def test_a_refusal_by_the_answer_is_drawn_anew_before_it_counts(tmp_path: Path) -> None:
    with FaultServer(always("refusal")) as server:
        guide = remote(server, tmp_path, "instruction", invalid_retries=1)
        assert query_guide(guide, requests(1)) == [Completion("", finished=True, failed=True, refused=True)]
        assert server.asked == 2


def test_too_many_refusals_stop_the_run_also_across_its_parts(tmp_path: Path) -> None:
    with FaultServer(complaint=stormy) as server:
        guide = remote(server, tmp_path, max_refused_share=0.3)
        query_guide(guide, requests(12))  # 4 of 12, but of 16 at least are counted
        again = remote(server, tmp_path, max_refused_share=0.3)
        again.load_state(guide.state())
        with pytest.raises(GuideError, match=r"refused 6 of 18 questions \(it refused the question as filtered: .*0\.3"):
            query_guide(again, requests(6))


@pytest.mark.parametrize("on_refusal", ["policy", "drop"])
def test_rows_of_refused_questions_are_the_policys_or_left_out(tmp_path: Path, on_refusal: str) -> None:
    algorithm = override(Config(), [("algorithm.name", "ppo_pp"), *beta_changes(1.0)]).algorithm.build()

    def half(body: dict[str, Any]) -> str | None:
        return "maximum context length is 12 tokens" if body["seed"] % 2 else None

    with FaultServer(complaint=half) as server:
        guide = remote(server, tmp_path, on_refusal=on_refusal, max_refused_share=1.0)
        config = config_of(ppo__completions_per_iteration=16, ppo__minibatch_size=16, ppo__iterations=1)
        metrics, experience = tiny_trainer(algorithm, config, guide).step(0)
    refused = metrics["guide_refused"]
    assert 0 < refused < 16
    assert metrics["guide_rows_dropped"] == (refused if on_refusal == "drop" else 0)
    assert metrics["guide_rows_substituted"] == (0 if on_refusal == "drop" else refused)
    assert len(experience.rollout.completions) == 16 - metrics["guide_rows_dropped"]


TALK = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "count 3"},
    {
        "role": "assistant", "content": "", "reasoning_content": "hm",
        "tool_calls": [{"function": {"name": "n", "arguments": {"a": 1}}}],
    },
    {"role": "tool", "content": "3"},
)  # fmt: skip


@pytest.mark.parametrize("mode", ["auto", "none", *CHAT])
def test_a_conversation_is_sent_as_its_messages(healthy: FaultServer, tmp_path: Path, mode: str) -> None:
    prompt = Prompt("<|im_start|>…", messages=TALK, reply_prefix="<think></think>", tools=({"type": "function"},))
    prefix = "" if mode == "none" else "<think></think>one two"
    guide = remote(healthy, tmp_path, "completion" if mode == "auto" else mode, continuation=mode)
    (completion,) = query_guide(guide, [CompletionRequest(prompt, [1], prefix, [2] if prefix else [], 12, 0, 0, 0)])
    body = healthy.requests[-1]["body"]
    assert "<|im_start|>" not in json.dumps(body)
    call = {"id": "call00001", "type": "function", "function": {"name": "n", "arguments": '{"a": 1}'}}
    assert body["messages"][:4] == [
        TALK[0], TALK[1], {"role": "assistant", "content": "", "tool_calls": [call]}, {**TALK[3], "tool_call_id": "call00001"}
    ]  # fmt: skip
    assert body["tools"] == [{"type": "function"}]
    assert body["tool_choice"] == "none"
    begun = [message["content"] for message in body["messages"][4:5]]
    assert begun == ([] if mode == "none" else ["one two"])
    assert len(body["messages"]) == {"none": 4, "auto": 6, "instruction": 6}.get(mode, 5)
    # a reply begins as the policy's template begins it, and what goes on gets the space it needs
    assert completion.text.startswith("<think></think>" if mode == "none" else " ")


# --- judges -------------------------------------------------------------------------------------------------------------


def judged(server: FaultServer, folder: Path, rows: int = 20, **options: Any) -> dict[str, float]:
    quick = EndpointConfig(retry_seconds=0.0, timeout_seconds=1.0)
    config = JudgeConfig(spec=f"server:fault-model@{server.url}", endpoint=quick, **options)
    judge = chat_judge(config, folder, lambda line: None)
    prompts = [Prompt(f"post {number}", (f" reference {number}",)) for number in range(rows)]
    return win_rate(judge, prompts, [f" text {number}" for number in range(rows)])


def prefers_references(body: dict[str, Any], form: str) -> tuple[str, str]:
    first = body["messages"][-1]["content"].split("tldr (A):")[1].split("tldr (B):")[0]
    it, other = ("A", "B") if "reference" in first else ("B", "A")
    return form.replace("IT", it).replace("OTHER", other), "stop"


@pytest.mark.parametrize("takes_schemas", [True, False])
def test_a_judge_is_asked_for_json_by_a_schema_if_the_server_takes_one(tmp_path: Path, takes_schemas: bool) -> None:
    def refuse(body: dict[str, Any]) -> str | None:
        return "Unknown parameter: response_format" if "response_format" in body and not takes_schemas else None

    form = '{"comparison": "(OTHER) is short", "preferred": "IT"}' if takes_schemas else "Preferred: (IT), (OTHER) is short"
    with FaultServer(writer=lambda body, text: prefers_references(body, form), complaint=refuse) as server:
        found = judged(server, tmp_path, 3)
        last = server.requests[-1]["body"]
    assert (found["losses"], found["wins"], found["unparseable"]) == (3.0, 0.0, 0)
    assert ("response_format" in last) == takes_schemas
    assert "Respond with a JSON object" in last["messages"][-1]["content"]


def test_the_papers_question_is_an_option(tmp_path: Path) -> None:
    with FaultServer(writer=lambda body, text: prefers_references(body, "Preferred: (IT)")) as server:
        assert judged(server, tmp_path, 2, response_format="text")["losses"] == 2.0
        body = server.requests[-1]["body"]
    assert body["messages"][-1]["content"].endswith("Preferred: <(A) or (B)>")
    assert "response_format" not in body


def test_questions_that_a_judge_refuses_are_left_out_and_counted(tmp_path: Path) -> None:
    def complaint(body: dict[str, Any]) -> str | None:
        asked = body["messages"][-1]["content"]
        return "content management policy" if re.search(r"post (1|7)\n", asked) else None

    writer: Any = lambda body, text: prefers_references(body, "Preferred: (IT)")  # noqa: E731
    with FaultServer(writer=writer, complaint=complaint) as server:
        found = judged(server, tmp_path)
        assert (found["losses"], found["unparseable"], found["judge_refused"]) == (18.0, 0, 2)
        assert summary(found).endswith("0 unparseable responses, 2 refused")
        with pytest.raises(TrainingError, match=r"the judge refused 2 of 20 questions .* judge\.max_refused_share=0\.05"):
            judged(server, tmp_path, max_refused_share=0.05)
