"""Tokenized examples: blocks of raw text, span corruption, and the targets of a task."""

from typing import Any

import pytest

from helpers import END, WORDS, tiny_model
from rlgf.config.sections import TaskConfig
from rlgf.errors import ConfigError
from rlgf.pipeline.stages import train_tokenizer
from rlgf.supervised.examples import (
    SENTINELS,
    Example,
    TargetExamples,
    check_example_lengths,
    corrupt_spans,
    split_into_blocks,
)
from rlgf.tasks.base import Task
from rlgf.types import Prompt

TEXTS = ["great plot", "dull cast", "great music"]


def ids_of(text: str) -> list[int]:
    return list(WORDS(text)["input_ids"])


def test_raw_texts_are_joined_by_the_end_token_and_cut_into_whole_blocks():
    stream = [*ids_of(TEXTS[0]), END, *ids_of(TEXTS[1]), END, *ids_of(TEXTS[2]), END]
    assert split_into_blocks(TEXTS, tiny_model(), 4) == [Example(stream[:4], 1), Example(stream[4:8], 1)]
    with pytest.raises(ConfigError, match=r"the raw text has 9 tokens, fewer than one block of model\.max_length = 10"):
        split_into_blocks(TEXTS, tiny_model(), 10)


def test_span_corruption_needs_sentinels():
    model: Any = type("Model", (), {"tokenizer": train_tokenizer(TEXTS, 300), "eos_token_id": 0})()
    with pytest.raises(ConfigError, match="needs the tokens <extra_id_0>"):
        corrupt_spans(TEXTS, model, 0)


def test_source_and_target_of_a_corrupted_text_both_end_with_the_end_token():
    model: Any = type("Model", (), {"tokenizer": train_tokenizer(TEXTS, 300, SENTINELS), "eos_token_id": 0})()
    short, example = "g", corrupt_spans(["g", *TEXTS], model, 0)[0]
    assert len(model.tokenizer(short)["input_ids"]) == 1  # nothing of it can be left out
    assert len(corrupt_spans([short, *TEXTS], model, 0)) == len(TEXTS)
    assert example.ids[example.start - 1] == example.ids[-1] == 0
    assert SENTINELS[0] in model.tokenizer.convert_ids_to_tokens(example.ids[: example.start])
    with pytest.raises(ConfigError, match="no text of two tokens or more"):
        corrupt_spans([short], model, 0)


def test_each_target_of_each_prompt_is_an_example_that_is_trained_behind_its_prompt():
    prompts = [Prompt("plot", sft_targets=(" great plot", " dull")), Prompt("cast", sft_targets=(" great",)), Prompt("music")]
    task, model = Task("t", prompts, prompts, prompts), tiny_model()
    expected = [
        Example([*ids_of("plot"), *ids_of("great plot")], 1, truncated=True),  # no room for the end token
        Example([*ids_of("plot"), *ids_of("dull"), END], 1),
        Example([*ids_of("cast"), *ids_of("great"), END], 1),
    ]
    examples = TargetExamples(task, model, 2)
    assert list(examples) == examples[:] == expected
    assert list(TargetExamples(task, model, 2, max_examples=2)) == expected[:2]
    assert check_example_lengths(examples, model, TaskConfig()) == 1
    with pytest.raises(ConfigError, match="task 't' has no targets"):
        TargetExamples(Task("t", prompts[2:], [], []), model, 2)


def test_an_example_longer_than_the_context_is_refused_by_its_number():
    examples = [Example([1] * 32, 1), Example([1] * 33, 1)]
    with pytest.raises(ConfigError, match=r"demonstration 2: prompt and target have 33 tokens, .* context is 32"):
        check_example_lengths(examples, tiny_model(), TaskConfig())
