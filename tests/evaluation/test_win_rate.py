"""Win rates: the prompt of the judge, the order, parsing of responses, and the arithmetic."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from helpers import small, word_reward
from rlgf.config.loading import override
from rlgf.config.recipes import recipe
from rlgf.config.sections import EndpointConfig, JudgeConfig
from rlgf.config.variants import build_variants, plan_comparison
from rlgf.errors import ConfigError, TrainingError
from rlgf.evaluation.chat_judge import (
    TEMPLATE,
    ChatJudge,
    chat_judge,
    fill_template,
    load_template,
    server_settings,
    split_system,
)
from rlgf.evaluation.verdicts import parse_choice
from rlgf.evaluation.win_rate import RewardJudge, summary, win_rate, win_rate_metrics
from rlgf.experiments.compare import compare
from rlgf.generation.openai.cache import ResponseCache
from rlgf.generation.openai.pool import PoolRequest, PoolResponse
from rlgf.pipeline.preflight import check
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.run import evaluate_policy_on_test
from rlgf.pipeline.stage_cache import StageCache
from rlgf.types import Prompt


@pytest.mark.parametrize(
    ("answer", "choice"),
    [
        ("Comparison: A says more.\nPreferred: (A)", "A"),
        ("Comparison: (A) is long, (B) is not.\n\nPreferred: (B)\n\n", "B"),
        ("Preferred: B", "B"),
        ("Preferred: **(A)**.", "A"),
        ("(B)", "B"),
        ("A", "A"),
        ("Preferred: Summary B", "B"),
        ("Preferred: TLDR (A)", "A"),
        ("**Preferred:** B", "B"),
        ("**Preferred: B**", "B"),
        ("Preferred: <A>", "A"),
        ("Preferred: [B]", "B"),
        ("Preferred: A)", "A"),
        ("Preferred: (b)", "B"),
        ("Preferred: <b>A</b>", "A"),
        ("Preferred: <b>(A)</b>", "A"),
        ("Preferred: [A] or (B)", None),
        ("Preferred: (A) or (B)", None),
        ("Preferred: neither", None),
        ("Preferred: (A)\nI hope that this helps.", "A"),
        ("A good summary is hard to find.", None),
        ("Preferred: C", None),
        ("Comparison: (A) is better", "A"),
        ("", None),
        (" \n ", None),
    ],
)
def test_a_choice_is_read_where_it_is_stated(answer: str, choice: str | None):
    assert parse_choice(answer) == choice


def test_the_question_is_that_of_the_paper_with_its_parts_in_their_places():
    system, asked = fill_template(TEMPLATE, Prompt("a [summary 1] post\n\nTL;DR:"), " first", " second [context]")
    assert system == (
        "You are an expert summary evaluator and can consistently\ndistinguish between good and bad summaries. You provide\n"
        "informative, correct evaluations."
    )
    assert "context: a [summary 1] post\n\nTL;DR:\ntldr (A): first\ntldr (B): second [context]\nFIRST" in asked
    assert asked.startswith("Task: Judge the quality of two TLDRs")
    assert asked.endswith("Preferred: <(A) or (B)>")
    assert split_system("[context] [summary 1] [summary 2]") == (None, "[context] [summary 1] [summary 2]")


@pytest.mark.data
def test_the_template_is_quoted_to_the_letter(shared_data: Path):
    paper = (shared_data.parent / "spec" / "paper.txt").read_text()
    assert TEMPLATE in paper.replace(" <<SYS>>", "<<SYS>>")


def test_a_conversation_is_shown_turn_by_turn():
    prompt = Prompt("<user>…", messages=({"role": "user", "content": "hi"}, {"role": "assistant", "content": "well"}))
    assert "context: user: hi\nassistant: well\ntldr (A): a" in fill_template(TEMPLATE, prompt, "a", "b")[1]


def test_another_question_must_say_where_its_parts_stand(tmp_path: Path):
    assert load_template(None) is TEMPLATE
    path = tmp_path / "question.txt"
    path.write_text("Which is kinder to [context]?\n(A) [summary 1]\n(B) [summary 2]\n")
    assert fill_template(load_template(str(path)), Prompt("you"), "a", "b") == (None, "Which is kinder to you?\n(A) a\n(B) b")
    path.write_text("Which is kinder to [context]?")
    with pytest.raises(ConfigError, match=r"lacks \[summary 1\] and \[summary 2\]"):
        load_template(str(path))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_template(str(tmp_path / "nothing.txt"))


def test_a_rate_by_hand():
    found = win_rate_metrics([1.0, 1.0, 0.5, 0.0])
    assert found["win_rate"] == 0.625
    # squared deviations .140625 × 2 + .015625 + .390625 = .6875; over 3, over 4, the root
    assert found["win_rate_standard_error"] == pytest.approx((0.6875 / 3 / 4) ** 0.5)
    assert (found["wins"], found["ties"], found["losses"]) == (2.0, 1.0, 1.0)
    assert win_rate_metrics([1.0])["win_rate_standard_error"] == 0.0
    assert win_rate_metrics([])["win_rate"] != win_rate_metrics([])["win_rate"]  # nobody judged: not a number
    assert summary({**found, "unparseable": 1.0}) == "62.5 % ± 23.9: 2 wins, 1 ties, 1 losses, 1 unparseable responses"


PROMPTS = [Prompt("p", (" dull plot", " other")), Prompt("q", (" great plot",)), Prompt("r"), Prompt("s", (" great plot",))]


def test_a_reward_model_prefers_the_higher_score_and_prompts_without_a_reference_are_left_out():
    judge = RewardJudge(word_reward, "words")
    found = win_rate(judge, PROMPTS, [" great plot", " dull plot", " great", " great plot"])
    assert (found["wins"], found["ties"], found["losses"], found["unparseable"]) == (1.0, 1.0, 1.0, 0)
    assert found["win_rate"] == 0.5


class Scripted:
    """In place of the pool of a server: answers by what stands as (A)."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.asked = answer, list[str]()

    def complete(self, requests: Sequence[PoolRequest], use: Any) -> list[Any]:
        questions = [request.samples[0].prompt for request in requests]
        self.asked += questions
        answers = [PoolResponse([{"text": self.answer(question)}], True) for question in questions]
        return [use(row, answer) for row, answer in enumerate(answers)]


def first_of(asked: str) -> str:
    return asked.split("tldr (A): ")[1].split("\n")[0]


def chat(answer: Any, **options: Any) -> ChatJudge:
    return ChatJudge(Scripted(answer), "scripted", **options)  # pyright: ignore


MANY = [Prompt(f"post {n}", (f" reference {n}",)) for n in range(200)]
TEXTS = [f" text {n}" for n in range(200)]


def test_the_order_is_a_function_of_seed_and_row():
    def says_text(asked: str) -> str:
        return "Preferred: (A)" if first_of(asked).startswith("text") else "Preferred: (B)"

    judge = chat(says_text)
    assert win_rate(judge, MANY, TEXTS)["win_rate"] == 1.0
    orders = [first_of(asked).startswith("text") for asked in judge.pool.asked]  # pyright: ignore
    assert 70 < sum(orders) < 130
    half = chat(says_text)
    win_rate(half, MANY[:50], TEXTS[:50])
    assert [first_of(asked).startswith("text") for asked in half.pool.asked] == orders[:50]  # pyright: ignore
    other = chat(says_text, seed=1)
    win_rate(other, MANY, TEXTS)
    assert [first_of(asked).startswith("text") for asked in other.pool.asked] != orders  # pyright: ignore


def test_a_judge_that_always_says_a_wins_about_half_in_random_order_and_ties_in_both():
    always = chat(lambda asked: "Comparison: hm.\nPreferred: (A)")
    assert 0.35 < win_rate(always, MANY, TEXTS)["win_rate"] < 0.65
    both = chat(lambda asked: "Comparison: hm.\nPreferred: (A)", order="both")
    found = win_rate(both, MANY, TEXTS)
    assert (found["ties"], found["win_rate"], found["win_rate_standard_error"]) == (200.0, 0.5, 0.0)
    assert len(both.pool.asked) == 400  # pyright: ignore


def test_answers_that_say_nothing_are_counted_and_left_out():
    def sometimes(asked: str) -> str:
        return "I cannot say." if "post 7\n" in asked else "(A)" if first_of(asked).startswith("text") else "(B)"

    for order in ("random", "both"):
        found = win_rate(chat(sometimes, order=order), MANY[:10], TEXTS[:10])
        assert (found["unparseable"], found["wins"], found["win_rate"]) == (1, 9.0, 1.0)


def test_a_server_is_asked_for_the_likeliest_answer_with_the_system_message_apart():
    settings = server_settings(JudgeConfig(spec="server:m@http://localhost/v1", max_new_tokens=99), TEMPLATE)
    assert settings.sampling.greedy
    assert settings.continuation == "none"
    assert settings.system is not None
    assert settings.system.startswith("You are an expert summary evaluator")
    assert settings.instruction == "{text}"


@pytest.mark.integration
def test_responses_of_an_earlier_version_are_found(tmp_path: Path):
    """The keys are those of commit b9c0d81, before guide and judge shared a pool."""
    cache = ResponseCache(tmp_path / "judge-responses.sqlite")
    cache.put("8d4fb326e3bff252998dc69671a4f795425515b1a4eeb726bfbbebdef9b8250b", {"text": "(A)", "finished": True})
    cache.put("8aa571d3602f8cde8f1f148a0bd42b8a96dbf617b43a57fe3d73a6a6017b0da0", {"text": "(B)", "finished": True})
    endpoint = EndpointConfig(thinking_tokens=3, offline=True)
    config = JudgeConfig(spec="server:m@http://127.0.0.1:9/v1", order="both", seed=1, response_format="text", endpoint=endpoint)
    judge = chat_judge(config, tmp_path, lambda line: None)
    assert judge.compare([Prompt("post")], [" text"], [" other"]) == [1.0]
    with pytest.raises(TrainingError, match="the judge is offline"):
        judge.compare([Prompt("another post")], [" text"], [" other"])


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("gpt-4", "unknown judge 'gpt-4'"),
        ("server:model", "judge 'server:model…' is not of the form server:MODEL@URL"),
        ("preferences", "has no preference pairs"),
    ],
)
def test_judges_that_cannot_be_are_refused_before_any_work(spec: str, words: str):
    with pytest.raises(ConfigError, match=words):
        check(resolve(small(("judge.spec", spec))))


def test_secrets_of_a_judge_come_from_the_environment():
    with pytest.raises(ConfigError, match=r"judge\.endpoint\.extra_headers\.X-Api-Key is written out"):
        override(small(), [("judge.endpoint.extra_headers", {"X-Api-Key": "abc"})])


@pytest.mark.integration
def test_a_comparison_names_its_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlgf.pipeline.prepare.prepare_judge", lambda *_: RewardJudge(word_reward, "the words' judge"))
    config = small(("evaluation.best_of", 2), ("ppo.iterations", 1))
    results = compare(plan_comparison(config, build_variants(config, ["ppo"], {}), [0]), tmp_path)
    assert all("win_rate" in row["metrics"] for row in results["rows"])
    table = (tmp_path / "table.md").read_text()
    assert "by the words' judge; 0 unparseable responses" in " ".join(table.split())
    assert "win rate" in table


@pytest.mark.integration
def test_a_judge_on_a_server_is_asked_before_anything_is_trained(stages: Path, tmp_path: Path):
    spec = "server:chat@http://127.0.0.1:9/v1"
    changes = [("judge.spec", spec), ("judge.endpoint.retries", 0)]
    with pytest.raises(ConfigError, match="probe: the judge"):
        prepare(small(*changes), tmp_path / "stages")
    assert not list((tmp_path / "stages").glob("sft*"))
    assert prepare(small(*changes, ("judge.endpoint.offline", True)), stages).judge is not None
    with pytest.raises(ConfigError, match="probe: the judge"):
        evaluate_policy_on_test(resolve(small(*changes)), None, StageCache(tmp_path / "others", lambda line: None))
    assert not list((tmp_path / "others").glob("sft*"))


def test_a_judge_without_anything_to_compare_with_is_refused_before_any_work(tmp_path: Path):
    rows = "".join(json.dumps({"prompt": f"about film {number}:"}) + "\n" for number in range(20))
    (tmp_path / "rows.jsonl").write_text(rows)
    config = override(recipe("prompts"), [
        ("task.data", str(tmp_path / "rows.jsonl")), ("judge.spec", "server:chat@http://127.0.0.1:9/v1"),
        ("pretrain.steps", 0), ("sft.epochs", 0.0),
        ("reward.path", "repetition_penalty"), ("model.vocabulary", 300),
    ])  # fmt: skip
    with pytest.raises(ConfigError, match=r"no test prompt of task 'prompts' has one: leave out --judge"):
        prepare(config, tmp_path / "stages")
