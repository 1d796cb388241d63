"""TL;DR: the split of posts, truncation of prompts, and the judge's recorded responses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fault_server import FaultServer, first
from rlgf.config.loading import override
from rlgf.config.recipes import tldr_small
from rlgf.config.sections import TaskConfig
from rlgf.data.files import read_jsonl
from rlgf.data.preferences import Pairs, length_baseline, split_for_role
from rlgf.errors import INPUT_ERRORS
from rlgf.evaluation.win_rate import win_rate
from rlgf.pipeline.build_rewards import prepare_judge
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.stage_cache import StageCache
from rlgf.pipeline.stages import train_tokenizer
from rlgf.tasks import tldr
from rlgf.tasks.base import Task
from rlgf.types import Prompt

# letters alone tell posts apart, and a number at the end would be cut off
NAMES = [f"{first}{second}" for first in ("ash", "elm", "oak", "fir") for second in ("ton", "ley", "ford", "by", "ham")]


def body(name: str, end: str = "What now?") -> str:
    return f"My friend from {name} took the boat. " + "He did not ask, and I do not know what to say. " * 3 + end


def post(name: str, **changes: Any) -> dict[str, Any]:
    row = {"subreddit": "boats", "title": f"The boat of {name}", "post": body(name), "reference": f"  {name} took my boat."}
    return {**row, **changes}


def pair(name: str, **changes: Any) -> dict[str, Any]:
    row = {"subreddit": "boats", "title": f"The boat of {name}", "post": body(name)}
    return {**row, "chosen": f" {name} took my boat, what now?", "rejected": f" a boat of {name} is gone away", **changes}


def folder_of(path: Path, posts: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]) -> TaskConfig:
    for name, rows in (("sft_posts", posts), ("comparisons", pairs)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TaskConfig("tldr", str(path), 50, options={"prompt_tokens": 64, "test_posts": 3, "validation_posts": 2})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer([body(name) for name in NAMES], 400)


@pytest.fixture
def config(tmp_path: Path) -> TaskConfig:
    """Ten posts with a summary of their own, two that are compared too, and eight that are only compared."""
    shared = [post(NAMES[10]), post(NAMES[11], post=body(NAMES[11], "Edit: he brought it back!"))]
    compared = [pair(name) for name in NAMES[10:] for _ in range(2)]
    return folder_of(tmp_path, [*map(post, NAMES[:10]), *shared], compared)


def named(prompts: Sequence[Prompt]) -> set[str]:
    """Return the owners of the boats that prompts are about."""
    return {prompt.text.partition("The boat of ")[2].partition("\n")[0] for prompt in prompts}


def parts_of(task: Task) -> dict[str, set[str]]:
    assert task.demonstrations is not None
    parts = {"sft": task.demonstrations, "train": task.train, "validation": task.validation, "test": task.test}
    return {name: named(part) for name, part in parts.items()}


def test_every_post_is_in_one_part_and_those_that_are_compared_are_left_to_the_reward_models(
    config: TaskConfig, tokenizer: Any
):
    task = tldr.build(config, tokenizer)
    parts = parts_of(task)
    assert {name: len(part) for name, part in parts.items()} == {"sft": 2, "train": 3, "validation": 2, "test": 3}
    assert set.union(*parts.values()) == set(NAMES[:10])  # ten in all, so that none is in two
    # the one that was edited at its end is the same post
    assert task.warnings == {tldr.SHARED: 2, "prompts truncated to 64 tokens": 10}
    pairs = tldr.preference_pairs(config, tokenizer, 5)
    assert named([pair.prompt for pair in [*pairs.train, *pairs.test]]) == set(NAMES[10:])


def test_reward_model_judge_and_held_out_pairs_are_about_different_posts(config: TaskConfig, tokenizer: Any):
    pairs = tldr.preference_pairs(config, tokenizer, 5)
    reward, judge = (split_for_role(pairs, 2, part) for part in (0, 1))
    posts = [{pair.group for pair in part} for part in (reward.train, judge.train, reward.test)]
    assert [len(part) for part in posts] == [4, 4, 2]
    assert len(set.union(*posts)) == 10
    assert [pair.chosen for pair in reward.test] == [pair.chosen for pair in judge.test]


def test_a_prompt_is_the_standard_format_and_ends_with_tldr_however_short_it_must_be(config: TaskConfig, tokenizer: Any):
    assert tldr.format_post(post("ash")) == f"SUBREDDIT: r/boats\n\nTITLE: The boat of ash\n\nPOST: {body('ash')}"
    for limit in (24, 64, 500):
        short = TaskConfig("tldr", config.data, options={**config.options, "prompt_tokens": limit})
        task = tldr.build(short, tokenizer)
        pairs = tldr.preference_pairs(short, tokenizer, 5)
        for prompt in [*task.train, *task.test, *(pair.prompt for pair in pairs.train)]:
            assert prompt.text.endswith("\n\nTL;DR:")
            assert prompt.text.startswith("SUBREDDIT: r/boats")
            assert len(tokenizer(prompt.text)["input_ids"]) <= limit
            assert prompt.text.endswith("What now?\n\nTL;DR:") == (limit == 500)
    with pytest.raises(INPUT_ERRORS, match=r"suffix .* alone has"):
        tldr.build(TaskConfig("tldr", config.data, options={**config.options, "prompt_tokens": 2}), tokenizer)


def test_a_summary_follows_behind_one_space_and_an_empty_one_is_none(tmp_path: Path, tokenizer: Any):
    posts = [post(name) for name in NAMES[:6]] + [post("wye", reference=" TL;DR: a boat "), post("exe", reference="  ")]
    config = folder_of(tmp_path, posts, [pair("yew")])
    task = tldr.build(config, tokenizer)
    assert task.demonstrations is not None
    prompts = [*task.train, *task.demonstrations, *task.validation, *task.test]
    found = {next(iter(named([prompt]))): (prompt.references, prompt.sft_targets) for prompt in prompts}
    assert found["ashton"] == ((" ashton took my boat.",), (" ashton took my boat.",))
    assert found["wye"] == ((" a boat",), (" a boat",))
    assert found["exe"] == ((), ())


def test_columns_of_a_post_reach_the_reward(config: TaskConfig, tokenizer: Any):
    (prompt, *_) = tldr.build(config, tokenizer).train
    assert prompt.columns["subreddit"] == "boats"
    assert prompt.columns["title"].startswith("The boat of")


def test_raw_texts_hold_no_post_of_validation_or_test_nor_of_the_held_out_pairs(config: TaskConfig, tokenizer: Any):
    parts = parts_of(tldr.build(config, tokenizer))
    trained = {pair.group for pair in tldr.preference_pairs(config, tokenizer, 5).train}
    texts = tldr.raw_texts(config, 0)
    about = {name for name in NAMES if any(f"The boat of {name}\n" in text for text in texts)}
    assert about == parts["sft"] | parts["train"] | {name for name in NAMES[10:] if tldr.post_key(body(name)) in trained}
    assert sum("TL;DR: " in text for text in texts) == 5  # those of SFT and reinforcement learning
    assert len(tldr.raw_texts(config, 4)) == 4


def test_what_is_missing_is_named(tmp_path: Path, config: TaskConfig, tokenizer: Any):
    (tmp_path / "comparisons.jsonl").rename(tmp_path / "other.jsonl")
    with pytest.raises(INPUT_ERRORS, match=r"holds no comparisons\.jsonl\[\.gz\]"):
        tldr.build(config, tokenizer)
    with pytest.raises(INPUT_ERRORS, match="task 'tldr' needs data"):
        tldr.build(TaskConfig("tldr"), tokenizer)


def test_too_few_posts_are_refused(tmp_path: Path, tokenizer: Any):
    config = folder_of(tmp_path, [post(name) for name in NAMES[:4]], [pair("yew")])
    with pytest.raises(INPUT_ERRORS, match=r"no post is left for sft of 4: lower task\.options\.test_posts"):
        tldr.build(config, tokenizer)


def test_a_hub_dataset_has_splits_of_its_own_and_its_comparisons_beside_it(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    import datasets

    def asked(name: str) -> str:
        return tldr.format_post({**post(name), "post": body(name)})

    def load_dataset(source: str) -> Any:
        if source == "someone/tldr":
            parts = {"train": NAMES[:6], "valid": NAMES[6:8], "test": NAMES[8:10]}
            rows = {s: [{"prompt": f"{asked(n)}\nTL;DR:", "label": f"of {n}"} for n in names] for s, names in parts.items()}
        else:
            sides = {"chosen": "TL;DR: a boat that was lost there", "rejected": "TL;DR: a boat that he did find"}
            parts = {"train": NAMES[10:18], "test": NAMES[18:]}
            rows = {s: [{"prompt": f"{asked(n)}\nTL;DR:", **sides} for n in names] for s, names in parts.items()}
        return datasets.DatasetDict({split: datasets.Dataset.from_list(part) for split, part in rows.items()})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    config = TaskConfig("tldr", "someone/tldr", 50, options={"prompt_tokens": 64, "comparisons": "someone/comparisons"})
    task = tldr.build(config, tokenizer)
    assert [len(part) for part in (task.train, task.validation, task.test)] == [6, 2, 2]
    assert named(task.validation) == set(NAMES[6:8])
    assert task.train[0].sft_targets == (" of ashton",)
    pairs = tldr.preference_pairs(config, tokenizer, 5)
    assert [len(part) for part in (pairs.train, pairs.test)] == [8, 2]
    assert (pairs.train[0].chosen, pairs.train[0].rejected) == (" a boat that was lost there", " a boat that he did find")
    for prompt in [*task.train, *(pair.prompt for pair in pairs.train)]:
        assert prompt.text.endswith("\nTL;DR:")
        assert prompt.text.count("TL;DR:") == 1
        assert len(tokenizer(prompt.text)["input_ids"]) <= 64
    with pytest.raises(INPUT_ERRORS, match=r"needs pairs: give task\.options\.comparisons"):
        tldr.preference_pairs(TaskConfig("tldr", "someone/tldr"), tokenizer, 5)


@pytest.fixture(scope="module")
def real(shared_data: Path) -> tuple[TaskConfig, Task, Pairs]:
    """The posts and comparisons beside the repository, as the recipe reads them."""
    config = TaskConfig("tldr", str(shared_data / "tldr"), options=tldr_small().task.options)
    tokenizer = train_tokenizer(tldr.raw_texts(config, 300), 1000)
    return config, tldr.build(config, tokenizer), tldr.preference_pairs(config, tokenizer, 5)


def posts_of(shared_data: Path, *parts: Sequence[Prompt]) -> list[str]:
    rows = {row["idx"]: row["post"] for row in read_jsonl(shared_data / "tldr" / "sft_posts.jsonl.gz")}
    return [tldr.post_key(rows[prompt.columns["idx"]]) for part in parts for prompt in part]


@pytest.mark.data
def test_the_real_posts_are_split_once(shared_data: Path, real: tuple[TaskConfig, Task, Pairs]):
    _, task, pairs = real
    assert task.demonstrations is not None
    assert task.warnings[tldr.SHARED] == 402  # as the data's README has it, edited posts among them
    parts = [task.demonstrations, task.train, task.validation, task.test]
    assert [len(part) for part in parts] == [580, 579, 128, 256]  # 1,543 and 402 are all 1,945
    used = posts_of(shared_data, *parts)
    assert len(set(used)) == 1543
    reward, judge = (split_for_role(pairs, 2, part) for part in (0, 1))
    compared = [{pair.group for pair in part} for part in (reward.train, judge.train, reward.test)]
    assert sum(map(len, compared)) == len(set.union(*compared)) == 1651
    assert not set.union(*compared) & set(used)
    assert pairs.dropped == {"pairs with a response under 5 words": 14}
    assert len(pairs.train) + len(pairs.test) == 10_000 - 14
    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in [*pairs.train, *pairs.test]]
    longer, equal = (sum(test(*sides) for sides in lengths) / len(lengths) for test in (int.__gt__, int.__eq__))
    assert longer == pytest.approx(0.568, abs=0.001)  # as the data's README has it
    assert length_baseline([*pairs.train, *pairs.test]) == pytest.approx(longer + equal / 2)


@pytest.mark.data
def test_no_raw_text_is_about_a_post_that_anything_is_measured_on(shared_data: Path, real: tuple[TaskConfig, Task, Pairs]):
    config, task, pairs = real
    held = {*posts_of(shared_data, task.validation, task.test), *(pair.group for pair in pairs.test)}
    marks = {tldr.post_key(text.partition("POST: ")[2].partition("\n\nTL;DR:")[0]) for text in tldr.raw_texts(config, 0)}
    assert len(marks) > 3000
    assert not marks & held


@pytest.mark.data
@pytest.mark.parametrize("order", ["random", "both"])
def test_the_thousand_recorded_answers_of_a_judge_give_640_to_360(shared_data: Path, tmp_path: Path, order: Any):
    """A server that answers as GPT did is asked over HTTP, in an order of our own; it knows texts, not what they are called."""
    rows = [row for row in read_jsonl(shared_data / "tldr" / "sft_posts.jsonl.gz") if row["gpt_judge_preferred"]]
    assert len(rows) == 1000
    prompts = [Prompt(row["query"], (row["reference"],)) for row in rows]
    recorded = {row["query"].strip(): row for row in rows}
    seen: list[str] = []

    def answer(request: dict[str, Any], path: str) -> tuple[str, str]:
        asked = request["messages"][-1]["content"]
        row = recorded[asked.partition("context: ")[2].partition("\ntldr (A): ")[0]]
        sides = {"ours": row["openai_ppo_1b"].strip(), "reference": row["reference"].strip()}
        first = asked.partition("\ntldr (A): ")[2].partition("\ntldr (B): ")[0]
        assert first in sides.values()
        choice = "A" if first == sides[row["gpt_judge_preferred"]] else "B"
        seen.append(choice)
        return f"Comparison: {' '.join(row['gpt_judge_explanation'].split())}\nPreferred: ({choice})", "stop"

    with FaultServer(writer=answer) as server:
        spec = f"server:fault-model@{server.url}"
        config = override(tldr_small(), [("judge", {"spec": spec, "order": order})])
        judge = prepare_judge(resolve(config).judge, {}, StageCache(tmp_path, lambda line: None))
        assert judge is not None
        found = win_rate(judge, prompts, [row["openai_ppo_1b"] for row in rows])
        asked = server.asked
    assert (found["wins"], found["losses"], found["ties"], found["unparseable"]) == (640.0, 360.0, 0.0, 0)
    assert found["win_rate"] == 0.64
    assert asked == (1000 if order == "random" else 2000)
    assert 0.4 < seen.count("A") / len(seen) < 0.6  # neither place stands for a side


@pytest.mark.server
def test_a_chat_judge_counts_what_it_cannot_read_and_asks_again_where_the_server_fails(tmp_path: Path):
    prompts = [Prompt(f"post {number}", (f" reference {number}",)) for number in range(40)]
    texts = [f" text {number}" for number in range(40)]
    bodies: list[dict[str, Any]] = []

    def answer(request: dict[str, Any], path: str) -> tuple[str, str]:
        bodies.append(request)
        asked = request["messages"][-1]["content"]
        if "context: post 7\n" in asked:
            return "Both have their merits.", "stop"
        return f"Comparison: fine.\nPreferred: ({'A' if 'tldr (A): text' in asked else 'B'})", "stop"

    with FaultServer(first(1, "503"), writer=answer) as server:
        config = override(
            tldr_small(),
            [("judge", {"spec": f"server:fault-model@{server.url}", "max_new_tokens": 99, "endpoint": {"retry_seconds": 0.0}})],
        )
        judge = prepare_judge(resolve(config).judge, {}, StageCache(tmp_path, lambda line: None))
        assert judge is not None
        assert judge.name == "chat model fault-model, order random"
        found = win_rate(judge, prompts, texts)
        once = server.answered
        again = win_rate(judge, prompts, texts)
        assert server.answered == once == 40  # the second time from the cache
    assert (found["wins"], found["losses"], found["unparseable"], found["win_rate"]) == (39.0, 0.0, 1, 1.0)
    assert again == found
    system, question = bodies[0]["messages"]
    assert system["role"] == "system"
    assert system["content"].startswith("You are an expert summary evaluator")
    assert question["content"].startswith("Task: Judge the quality of two TLDRs")
    assert bodies[0]["temperature"] == 0
    assert 99 in (bodies[0].get("max_tokens"), bodies[0].get("max_completion_tokens"))
