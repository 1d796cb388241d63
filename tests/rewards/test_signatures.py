"""The shapes in which people write rewards and guides, and what is said of the others."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlgf.config.loading import override
from rlgf.config.recipes import recipe
from rlgf.config.sections import GuideConfig, RewardConfig, TaskConfig
from rlgf.config.specs import complete_spec, load_object
from rlgf.data.source_hash import spec_hash
from rlgf.errors import ConfigError, GuideError, RewardError
from rlgf.guides.base import CompletionRequest, query_guide
from rlgf.guides.local import FunctionGuide
from rlgf.rewards.base import score
from rlgf.rewards.signatures import bind_columns
from rlgf.types import Prompt

PROMPTS = [Prompt("2 + 2 =", columns={"answer": "4"}), Prompt("2 + 3 =", columns={"answer": "5", "level": 2})]
TEXTS = [" 4", " 4"]


def trl(completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(text.strip() == answer) for text, answer in zip(completions, columns["answer"])]


def trl_with_prompts(prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **rest: Any) -> list[float]:
    assert set(rest) == {"level", "references"}
    assert rest["level"] == [None, 2]  # of a row without the column
    return [float(f"{prompt} {right}" == prompt + text) for prompt, text, right in zip(prompts, completions, answer)]


def trl_of_two(completions: Sequence[str], answer: Sequence[str], level: Any = None, weight: float = 1.0) -> list[float]:
    assert level == [None, 2]
    return [weight * (text.strip() == right) for text, right in zip(completions, answer)]


def ours(prompts: Sequence[Prompt], texts: Sequence[str]) -> list[float]:
    return [float(text.strip() == prompt.columns["answer"]) for prompt, text in zip(prompts, texts)]


def ours_with_a_column(prompts: Sequence[Prompt], texts: Sequence[str], answer: Sequence[str]) -> list[float]:
    return [float(text.strip() == right) for text, right in zip(texts, answer)]


class CallableReward:
    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        return trl(completions, **columns)


@pytest.mark.parametrize("function", [trl, trl_with_prompts, trl_of_two, ours, ours_with_a_column, CallableReward()])
def test_the_same_rewards_come_from_functions_of_either_shape(function: Any) -> None:
    assert score(bind_columns(function), PROMPTS, TEXTS) == [1.0, 0.0]


def test_a_conversation_reaches_a_function_of_trl_as_messages() -> None:
    messages = ({"role": "user", "content": "hi"},)
    prompt = Prompt("<user>hi<assistant>", messages=messages, reply_prefix="<think></think>")
    seen: list[Any] = []

    def reward(prompts: Any, completions: Any, **columns: Any) -> list[float]:
        seen.extend([prompts, completions])
        return [0.0]

    score(bind_columns(reward), [prompt], ["<think></think>hello"])
    assert seen == [[list(messages)], [[{"role": "assistant", "content": "hello"}]]]


@pytest.mark.parametrize(("function", "shown"), [(lambda text: 1.0, r"<lambda>\(text\)"), (lambda: [1.0], r"<lambda>\(\)")])
def test_another_shape_is_answered_with_ours(function: Any, shown: str) -> None:
    with pytest.raises(ConfigError, match=rf"the reward {shown} cannot be called: a reward is called as reward\(prompts, comp"):
        bind_columns(function)


def test_an_argument_that_is_no_column_is_named_with_the_columns_there_are() -> None:
    def reward(completions: Sequence[str], solution: Sequence[str]) -> list[float]:
        return [0.0]

    with pytest.raises(RewardError, match=r"takes 'solution', which is no column of the rows \(they have answer\)"):
        score(bind_columns(reward), PROMPTS[:1], TEXTS[:1])


def test_a_failure_names_the_line_of_the_user_and_the_columns(tmp_path: Path) -> None:
    (tmp_path / "wrong_rewards.py").write_text(
        "import json\n\ndef key(prompts, texts):\n    return [prompt.columns['color'] for prompt in prompts]\n\n"
        "def deep(prompts, texts):\n    return [json.loads(text) for text in ['{']]\n\n"
        "def text(prompts, texts):\n    return [len(prompt + text) for prompt, text in zip(prompts, texts)]\n"
    )
    file = str(tmp_path / "wrong_rewards.py")
    for name, words in {
        "key": r"\(KeyError: 'color', wrong_rewards\.py line 4; prompt\.columns has answer\)",
        "deep": r"\(JSONDecodeError: .*, wrong_rewards\.py line 7; prompt\.columns has answer\)",  # not in json's own file
        "text": r"wrong_rewards\.py line 10; .*; a prompt is a rlgf\.Prompt, its text is prompt\.text\)",
    }.items():
        with pytest.raises(RewardError, match=words):
            score(bind_columns(load_object(f"python:{file}:{name}", "reward")), PROMPTS[:1], TEXTS[:1])


def test_a_guide_of_another_shape_is_answered_with_ours_and_its_failure_with_the_columns() -> None:
    with pytest.raises(ConfigError, match=r"guide <lambda>\(prompt, prefix\) cannot be called: a guide is called as guide\("):
        FunctionGuide(lambda prompt, prefix: "")  # type: ignore[misc]
    guide = FunctionGuide(lambda requests: [request.prompt.columns["color"] for request in requests])
    with pytest.raises(GuideError, match=r"KeyError: 'color', .*; prompt\.columns has answer\)"):
        query_guide(guide, [CompletionRequest(PROMPTS[0], [], "", [], 4, 0, 0, 0)])


def test_a_function_in_a_file_is_named_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper_of_polite.py").write_text("WORD = 'thank'\n")
    (tmp_path / "json.py").write_text(  # a name that is taken
        "from helper_of_polite import WORD\n\ndef polite(prompts, texts):\n    return [float(WORD in text) for text in texts]\n"
    )
    config = override(recipe("prompts"), [("reward.path", "json.py:polite")])
    assert config.reward.path == "python:json.py:polite"
    assert score(load_object(config.reward.path, "reward"), PROMPTS, ["thank you", "no"]) == [1.0, 0.0]
    before = spec_hash(config.reward.path)
    (tmp_path / "helper_of_polite.py").write_text("WORD = 'please'\n")
    assert spec_hash(config.reward.path) not in (None, before)
    assert RewardConfig(weights={"json.py:polite": 1.0}).names == ("python:json.py:polite",)
    assert GuideConfig(spec="guides/mine.py:guide").spec == "python:guides/mine.py:guide"
    assert TaskConfig(name="mine.py:TASK").name == "python:mine.py:TASK"
    assert complete_spec("server:model.py@http://host/v1") == "server:model.py@http://host/v1"
    with pytest.raises(ConfigError, match=r"cannot be loaded \(there is no file nowhere\.py in "):
        load_object("python:nowhere.py:polite", "reward")
