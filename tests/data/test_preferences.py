"""Preference pairs: the source of their prompts, dropped rows, and the split of posts."""

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from rlgf.cli import app
from rlgf.config.schema import Config
from rlgf.config.sections import PreferenceConfig, TaskConfig
from rlgf.data.chat import PromptBuilder
from rlgf.data.preferences import Columns, Pair, Pairs, length_baseline, pairwise_accuracy, parts_of, read_pairs, split_for_role
from rlgf.errors import INPUT_ERRORS
from rlgf.pipeline import reward_model_stage
from rlgf.pipeline.resolve import resolve
from rlgf.tasks import prompts
from rlgf.types import Prompt

ROOT = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: a film?\n\nAssistant:"


def pairs_of(rows: list[dict[str, Any]], tokenizer: Any, min_words: int = 2) -> tuple[list[Pair], dict[str, int]]:
    pairs, dropped = read_pairs(rows, "pairs.jsonl", PromptBuilder(tokenizer), min_words, Columns())
    return pairs, dict(dropped)


def test_a_prompt_is_a_column_or_what_two_dialogues_share():
    assert parts_of({"prompt": "p", "chosen": " c", "rejected": " r"}, Columns(), "row 1") == ("p", " c", " r")
    row = {"chosen": f"{ROOT} See Alien, it is good.", "rejected": f"{ROOT} See the sea."}
    assert parts_of(row, Columns(), "row 1") == (ROOT, " See Alien, it is good.", " See the sea.")
    shorter = {"chosen": f"{ROOT} See it", "rejected": f"{ROOT} See it again"}  # one side is the beginning of the other
    assert parts_of(shorter, Columns(), "row 1") == (ROOT, " See it", " See it again")


def test_the_last_turn_they_share_counts_even_if_one_goes_on_for_longer():
    row = {"chosen": f"{ROOT} yes\n\nHuman: why?\n\nAssistant: so", "rejected": f"{ROOT} no"}
    assert parts_of(row, Columns(), "row 1") == (ROOT, " yes\n\nHuman: why?\n\nAssistant: so", " no")


def test_conversations_share_their_first_messages():
    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    asked = [said("user", "hi"), said("assistant", "hello"), said("user", "a film?")]
    row = {"chosen": [*asked, said("assistant", "Alien")], "rejected": [*asked, said("assistant", "none")]}
    assert parts_of(row, Columns(), "row 1") == (asked, "Alien", "none")
    assert parts_of({**row, "prompt": "a film?"}, Columns(), "row 1") == (asked, "Alien", "none")  # the dialogues say more
    other = [said("user", "ho"), said("assistant", "none")]
    assert parts_of({**row, "rejected": other}, Columns(), "row 1") is None
    explicit = {"prompt": asked, "chosen": [said("assistant", "Alien")], "rejected": [said("assistant", "none")]}
    assert parts_of(explicit, Columns(), "row 1") == (asked, "Alien", "none")


def test_responses_may_be_texts_in_parts():
    def said(role: str, *texts: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}

    asked = [said("user", "a film?")]
    row = {"chosen": [*asked, said("assistant", "Ali", "en")], "rejected": [*asked, said("assistant", "none")]}
    assert parts_of(row, Columns(), "row 1") == (asked, "Alien", "none")
    explicit = {"prompt": asked, "chosen": [said("assistant", "Alien")], "rejected": said("assistant", "no", "ne")}
    assert parts_of(explicit, Columns(), "row 1") == (asked, "Alien", "none")
    picture = {"role": "assistant", "content": [{"type": "image", "url": "x"}]}
    with pytest.raises(INPUT_ERRORS, match="a response must be a string or one assistant message"):
        parts_of({**explicit, "chosen": picture}, Columns(), "row 1")


def test_what_cannot_be_compared_is_dropped_and_counted(word_tokenizer: Any):
    rows = [
        {"prompt": "plot", "chosen": " great plot", "rejected": " dull plot"},
        {"prompt": "plot", "chosen": " great plot", "rejected": "great plot "},
        {"prompt": "plot", "chosen": " great plot", "rejected": " dull"},
        {"chosen": "great plot", "rejected": "dull plot"},
    ]
    pairs, dropped = pairs_of(rows, word_tokenizer)
    assert [(pair.prompt.text, pair.chosen, pair.rejected, pair.group) for pair in pairs] == [
        ("plot", " great plot", " dull plot", "plot")
    ]
    assert dropped == {
        "pairs with identical responses": 1, "pairs with a response under 2 words": 1, "pairs with no common prompt": 1,
    }  # fmt: skip


def test_rows_without_sides_are_refused(word_tokenizer: Any):
    with pytest.raises(INPUT_ERRORS, match=r"row 1: there is no column 'rejected'; it has chosen, prompt"):
        pairs_of([{"prompt": "plot", "chosen": " great plot"}], word_tokenizer)
    with pytest.raises(INPUT_ERRORS, match="must be two strings or two conversations"):
        pairs_of([{"chosen": 1, "rejected": 2}], word_tokenizer)


def made(posts: int, each: int = 3) -> list[Pair]:
    return [Pair(Prompt(f"post {p}"), f"chosen {i}", f"rejected {i}", f"post {p}") for p in range(posts) for i in range(each)]


def posts_of(*parts: Any) -> list[set[str]]:
    return [{pair.group for pair in part} for part in parts]


def test_no_post_is_in_two_parts_nor_in_training_and_test():
    pairs = Pairs(made(50), [])
    first, second = (split_for_role(pairs, 2, part) for part in (0, 1))
    one, other, held = posts_of(first.train, second.train, first.test)
    assert (len(one), len(other), len(held)) == (20, 20, 10)
    assert not one & other
    assert not (one | other) & held
    assert first.test == second.test
    assert len(first.train) == len(second.train) == 60
    alone = split_for_role(pairs, 1, 0)
    assert posts_of(alone.train) == [one | other]


def test_a_test_split_is_used_without_posts_that_are_trained_on():
    pairs = Pairs(made(10), [*made(2), Pair(Prompt("new"), "a b", "c d", "new")], {"pairs with identical responses": 4})
    part = split_for_role(pairs, 1, 0)
    assert [pair.group for pair in part.test] == ["new"]
    assert part.dropped == {"pairs with identical responses": 4, "held-out pairs about posts of the training pairs": 6}


def test_too_few_posts_are_refused():
    with pytest.raises(INPUT_ERRORS, match="about 0 posts to train on and 1 to measure on"):
        split_for_role(Pairs(made(1), []), 1, 0)


def test_the_longer_rule_by_hand():
    lengths = [(" aaaa", " a"), ("a", "aaa"), ("aa ", "aa"), ("aaa", "b")]
    assert length_baseline([Pair(Prompt(""), chosen, rejected, "") for chosen, rejected in lengths]) == 2.5 / 4
    assert pairwise_accuracy([1.0, 2.0, 3.0], [0.0, 2.0, 4.0]) == 0.5
    assert pairwise_accuracy([], []) != pairwise_accuracy([], [])  # of nothing it is not a number


@pytest.mark.data
def test_dialogues_of_hh_are_told_apart_as_counted_by_another_program(shared_data: Path, word_tokenizer: Any):
    from rlgf.config.sections import TaskConfig

    counted = {  # rows, equal sides, sides under five words, prompts
        "harmless-base": (2312, 0, 250), "helpful-base": (2354, 2, 233), "helpful-online": (1137, 2, 26),
        "helpful-rejection-sampled": (2749, 32, 144),
    }  # fmt: skip
    for name, (rows, equal, short) in counted.items():
        source = str(shared_data / "hh_rlhf_test" / f"{name}.test.jsonl.gz")
        pairs = prompts.preference_pairs(TaskConfig("prompts", source), word_tokenizer, 5)
        dropped = {"pairs with identical responses": equal, "pairs with a response under 5 words": short}
        assert pairs.dropped == {reason: count for reason, count in dropped.items() if count}
        assert len(pairs.train) == rows - equal - short
        assert all(pair.prompt.text.endswith("\n\nAssistant:") for pair in pairs.train)
        part = split_for_role(pairs, 1, 0)
        train, test = posts_of(part.train, part.test)
        assert not train & test


@pytest.mark.data
@pytest.mark.parametrize("rank", [0, 2])
def test_a_reward_model_is_trained_on_dialogues_of_hh_by_one_command(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
):
    with gzip.open(shared_data / "hh_rlhf_test" / "helpful-base.test.jsonl.gz", "rt") as file:
        (tmp_path / "hh.jsonl").write_text("".join(itertools.islice(file, 120)))
    small = (
        "model.layers=1 model.width=16 model.heads=2 model.max_length=1600 model.vocabulary=400 pretrain.steps=0 sft.steps=1"
    )
    training = (
        f"task.max_new_tokens=8 preferences.training.steps=3 preferences.training.batch_size=4 preferences.lora.rank={rank}"
    )
    command = f"rlgf reward prompts --data hh.jsonl reward.path=preferences --out reward {small} {training}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", command.split())
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 0
    measured = json.loads((tmp_path / "reward" / "stage.json").read_text())["metrics"]
    assert (measured["steps"], measured["trained_posts"], measured["held_out_posts"]) == (3, 88, 22)
    assert 0 <= measured["accuracy"] <= 1
    assert 0 <= measured["length_baseline"] <= 1
    assert (tmp_path / "reward" / "adapter_config.json").is_file() == bool(rank)


def test_the_prompts_of_pairs_are_made_as_the_tasks_are(tmp_path: Path, word_tokenizer: Any):
    source = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"the plot {n}", "better": " is good", "worse": " is bad"} for n in range(6)]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"chosen_column": "better", "rejected_column": "worse", "suffix": "\n\nANSWER:", "train_split": "mine"}
    config = Config(
        task=TaskConfig("prompts", "elsewhere", options=own), preferences=PreferenceConfig(data=str(source), min_words=0)
    )
    pairs = reward_model_stage.preference_pairs(resolve(config).reward.preferences, word_tokenizer, "reward")
    (first, *_) = [*pairs.train, *pairs.test]
    assert first.prompt.text.endswith("\n\nANSWER:")
    assert (first.chosen, first.rejected) == (" is good", " is bad")
