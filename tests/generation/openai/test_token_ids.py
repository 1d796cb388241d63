"""A server with the policy's tokenizer, queried by token ids."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fault_server import TOKENIZE, TRANSIENT, FaultServer, Tokens, a_third, first
from helpers import WORDS, config_of, guide_changes, guide_config, tiny_trainer
from rlgf.algorithms.base import Algorithm
from rlgf.algorithms.registry import aggrevated, d2lols, ppo_pp
from rlgf.config.loading import override
from rlgf.config.recipes import quickstart
from rlgf.errors import ConfigError, TrainingError
from rlgf.generation.openai import token_ids as agreement
from rlgf.generation.openai.cache import ResponseCache
from rlgf.generation.openai.token_ids import connect_by_token_ids
from rlgf.guides.base import CompletionRequest, query_guide
from rlgf.guides.remote import RemoteGuide
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.stages import train_tokenizer
from rlgf.types import GUIDE, POLICY, Prompt

pytestmark = pytest.mark.server

END = int(WORDS.eos_token_id)


def encoder(tokenizer: Any) -> Any:
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def vllm(tokenizer: Any = WORDS, **options: Any) -> Tokens:
    return Tokens(encoder(tokenizer), len(tokenizer), **options)


def remote(server: FaultServer, folder: Path, reports: list[str] | None = None, **options: Any) -> RemoteGuide:
    quick: dict[str, Any] = {"retry_seconds": 0.0, "timeout_seconds": 1.0, "concurrency": 4, "continuation": "token_ids"}
    config, cache = guide_config(**{**quick, **options}), ResponseCache(folder / "responses.sqlite")
    tokens = agreement.TokenIdSetup(WORDS, (END,), 32)
    report = (lambda line: None) if reports is None else reports.append
    reached = connect_by_token_ids(f"server:fault-model@{server.url}", config, tokens, cache, report)
    return RemoteGuide(reached, config, cache, sleep=lambda seconds: None)


def texts_asked(server: FaultServer) -> list[dict[str, Any]]:
    """The bodies of what was asked for, but for the questions before training."""
    bodies = [request["body"] for request in server.requests if request["path"] != TOKENIZE]
    return [body for body in bodies if "logit_bias" not in body]


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer(tokens=vllm()) as server:
        yield server


def request(index: int = 0, prefix_ids: tuple[int, ...] = (), budget: int = 6, minimum: int = 0) -> CompletionRequest:
    prefix = WORDS.decode(prefix_ids)
    return CompletionRequest(Prompt("review of : plot =>"), [2, 3, 4, 7, 5], prefix, prefix_ids, budget, minimum, index, 0)


# --- before anything is trained -----------------------------------------------------------------------------------------


def test_it_is_asked_for_the_tokens_of_texts_on_which_tokenizers_differ(server: FaultServer, tmp_path: Path) -> None:
    guide = remote(server, tmp_path)
    asked = [r["body"]["prompt"] for r in server.requests if r["path"] == TOKENIZE]
    for kind in ("  ", "\n", "\t", "\U0001f389", "电", "<|endoftext|>", "\x00", "é"):
        assert any(kind in text for text in asked)
    assert asked[-1] == " ".join(WORDS.decode([token]) for token in range(len(WORDS)))
    assert all(r["body"]["add_special_tokens"] is False for r in server.requests if r["path"] == TOKENIZE)
    assert guide.capabilities.exact_length
    assert guide.capabilities.can_continue
    assert guide.capabilities.takes_token_ids


def test_another_tokenizer_is_refused_and_no_endpoint_too(tmp_path: Path) -> None:
    other = train_tokenizer(["the plot is a bore"], 300)
    for tokens, words in (
        (vllm(other), "its tokens of 'The film begins"),
        (None, "cannot continue token ids .*404"),
        (vllm(context=31), "has a context of 31 tokens, but a prompt and its completion can have 32"),
    ):
        with FaultServer(tokens=tokens) as server, pytest.raises(ConfigError, match=words):
            remote(server, tmp_path)
    shifted = Tokens(lambda text: [token + 1 for token in encoder(WORDS)(text)], len(WORDS))
    with FaultServer(tokens=shifted) as server, pytest.raises(ConfigError, match="cannot continue token ids"):
        remote(server, tmp_path)


def test_a_vocabulary_that_differs_in_few_tokens_is_found_out(tmp_path: Path) -> None:
    def swapped(text: str) -> list[int]:
        return [{20: 21, 21: 20}.get(token, token) for token in encoder(WORDS)(text)]

    with FaultServer(tokens=Tokens(swapped, len(WORDS))) as server, pytest.raises(ConfigError, match="the policy's"):
        remote(server, tmp_path)


def test_nothing_is_trained_for_a_guide_that_is_refused(tmp_path: Path) -> None:
    def config(server: FaultServer, **guide: Any) -> Any:
        changes = {"spec": f"server:m@{server.url}", "continuation": "token_ids", "retry_seconds": 0.0, **guide}
        return override(quickstart(), [*guide_changes(**changes), ("algorithm.name", "ppo_pp")])

    reports: list[str] = []
    with FaultServer() as server, pytest.raises(ConfigError, match="choose another guide"):
        prepare(config(server), tmp_path / "stages", reports.append)
    with FaultServer(tokens=vllm(context=20)) as server, pytest.raises(ConfigError, match="has a context of 20 tokens"):
        prepare(config(server), tmp_path / "stages", reports.append)
    with pytest.raises(ConfigError, match="about text"):
        config(server, stop=["\n"])
    assert not any("making sft" in line for line in reports)


def test_what_was_agreed_on_is_kept_for_a_replay(server: FaultServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="offline"):
        remote(server, tmp_path, offline=True)
    wanted = query_guide(remote(server, tmp_path), [request(i) for i in range(4)])
    server.stop()
    again = remote(server, tmp_path, offline=True)
    assert again.capabilities.exact_length
    assert query_guide(again, [request(i) for i in range(4)]) == wanted
    with pytest.raises(ConfigError, match="is unreachable"):
        remote(server, tmp_path)
    server.start()


# --- questions and answers ----------------------------------------------------------------------------------------------


def test_questions_and_answers_are_ids(server: FaultServer, tmp_path: Path) -> None:
    guide = remote(server, tmp_path, sampling={"top_k": 7, "top_p": 0.5})
    texts = query_guide(guide, [request(i, prefix_ids=(9, 10), budget=12, minimum=2) for i in range(20)])
    for body in texts_asked(server):
        assert body["prompt"] == [2, 3, 4, 7, 5, 9, 10]
        assert (body["max_tokens"], body["min_tokens"], body["top_k"], body["top_p"]) == (12, 2, 7, 0.5)
        assert body["stop_token_ids"] == [END]
    assert len({body["seed"] for body in texts_asked(server)}) == 20
    assert {text.finished for text in texts} == {True, False}
    for text in texts:
        assert text.ids is not None
        assert (text.ids[-1] == END) == text.finished
        assert len(text.ids) <= 12


def test_a_context_that_cuts_texts_short_stops_the_run(tmp_path: Path) -> None:
    with FaultServer(tokens=vllm()) as server:
        guide = remote(server, tmp_path)
        server.tokens = vllm(context=8)  # it was restarted with less
        with pytest.raises(TrainingError, match=r"generated 3 of 6 tokens .* --max-model-len"):
            query_guide(guide, [request(minimum=6)])


def test_a_transient_failure_is_asked_again(tmp_path: Path) -> None:
    with FaultServer(tokens=vllm()) as server:
        wanted = query_guide(remote(server, tmp_path / "a"), [request(i) for i in range(3)])
    for kind in TRANSIENT:
        with FaultServer(first(1, kind), tokens=vllm(), hang_seconds=0.2) as server:
            plan, server.schedule = server.schedule, None  # it is well while it is asked whether it can serve
            guide = remote(server, tmp_path / kind, timeout_seconds=0.6)
            server.schedule, before = plan, server.asked
            assert query_guide(guide, [request(i) for i in range(3)]) == wanted
            assert guide.pop_metrics()["guide_attempts"] == server.asked - before == 6


# --- training -----------------------------------------------------------------------------------------------------------


def trained(server: FaultServer, folder: Path, algorithm: Algorithm, minimum: int = 0, **options: Any) -> Any:
    plan, server.schedule = server.schedule, None
    guide = remote(server, folder, **options)
    server.schedule = plan
    config = config_of(
        ppo__completions_per_iteration=12, ppo__minibatch_size=12, ppo__iterations=3, task__min_new_tokens=minimum,
    )  # fmt: skip
    trainer = tiny_trainer(algorithm, config, guide)
    steps = [trainer.step(i) for i in range(3)]
    if trainer.prefetcher is not None:
        trainer.prefetcher.close()
    return [metrics for metrics, _ in steps], [experience.rollout for _, experience in steps]


def timeless(metrics: list[dict[str, Any]]) -> list[str]:
    names = ("seconds", "tokens_per", "guide_latency")
    return [json.dumps({k: v for k, v in row.items() if not k.startswith(names)}, sort_keys=True) for row in metrics]


def test_where_lengths_are_fixed_only_what_stands_before_the_switch_is_written(tmp_path: Path) -> None:
    with FaultServer(tokens=vllm()) as server:
        _, rollouts = trained(server, tmp_path / "a", ppo_pp(1.0).build(), minimum=6)
        asked = [body["max_tokens"] for body in texts_asked(server)]
        switches = [int(h) for rollout in rollouts for h in rollout.switch_position]
        assert sorted(asked) == sorted(h for h in switches if h)
        assert all(body["min_tokens"] == body["max_tokens"] for body in texts_asked(server))
        assert sum(rollout.counters["discarded_tokens"] for rollout in rollouts) == 0
    with FaultServer(tokens=vllm(obeys=False)) as server:
        reports: list[str] = []
        guide = remote(server, tmp_path / "b", reports)
        assert not guide.capabilities.exact_length
        assert "ignores min_tokens" in reports[0]
        _, rollouts = trained(server, tmp_path / "b", ppo_pp(1.0).build(), minimum=6)
        assert {body["max_tokens"] for body in texts_asked(server)} == {6}
        assert {body["min_tokens"] for body in texts_asked(server)} == {0}


def test_the_policys_ids_are_sent_as_they_are_and_the_guides_are_kept_as_they_come(server: FaultServer, tmp_path: Path) -> None:
    _, rollouts = trained(server, tmp_path, aggrevated(0.8).build())
    cache = ResponseCache(tmp_path / "responses.sqlite")
    answers = [json.loads(row[0]) for row in cache._execute("SELECT response FROM responses").rows]  # pyright: ignore[reportPrivateUsage]
    told = {tuple(answer["ids"]) for answer in answers if "ids" in answer}
    sent = {tuple(body["prompt"]) for body in texts_asked(server)}
    for rollout in rollouts:
        assert list(rollout.guide_completions) == [None] * len(rollout.completions)
        for row in range(len(rollout.completions)):
            ids, origin = rollout.ids[row].tolist(), rollout.origin[row].tolist()
            if GUIDE not in origin:
                continue
            start = origin.index(int(GUIDE))
            assert tuple(ids[:start]) in sent
            assert tuple(token for token, author in zip(ids, origin) if author == GUIDE) in told
            assert all(author != POLICY for author in origin[start:])


def test_transient_faults_change_nothing_and_a_replay_is_the_same_run(tmp_path: Path) -> None:
    kinds = [kind for kind in TRANSIENT if kind not in ("hang", "trickle")]
    with FaultServer(tokens=vllm()) as server:
        metrics, rollouts = trained(server, tmp_path / "a", d2lols(0.8, 0.8, 1).build())
    with FaultServer(a_third(kinds), tokens=vllm()) as server:
        faulty, same = trained(server, tmp_path / "b", d2lols(0.8, 0.8, 1).build())
        assert server.faults.total() > 3
    again, replayed = trained(server, tmp_path / "b", d2lols(0.8, 0.8, 1).build(), offline=True)
    for first_rollout, second, third in zip(rollouts, same, replayed):
        assert first_rollout.ids.equal(second.ids)
        assert first_rollout.ids.equal(third.ids)
    assert timeless(again) == timeless(faulty)
    for row in faulty:
        assert row["guide_attempts"] == row["guide_succeeded"] + row["guide_retried"]
    assert [row["score"] for row in metrics] == [row["score"] for row in faulty]
