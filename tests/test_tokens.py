"""Text to ids and back at the joint between two writers, with real tokenizers."""

from pathlib import Path
from typing import Any

import pytest

from rlgf.tokens import decode, decode_continuations, encode_continuation, encode_prompt, encode_prompts, encode_target
from rlgf.types import Prompt

TEXTS = [" there was a dog", "there", "\nLily", " two  spaces", "", ".", " end. And", "'s dog", "\n\n new", "a b"]


def gpt2(folder: Path) -> Any:
    from transformers import GPT2TokenizerFast

    return GPT2TokenizerFast.from_pretrained(folder / "tokenizers" / "gpt2")


def stories(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "stories260k" / "hf")


@pytest.mark.data
@pytest.mark.parametrize("load", [gpt2, stories])
@pytest.mark.parametrize("text", TEXTS)
def test_a_continuation_adds_exactly_its_text(shared_data: Path, load: Any, text: str):
    tokenizer = load(shared_data)
    before = encode_prompt(tokenizer, Prompt("Once upon a time"))
    after = encode_continuation(tokenizer, text)
    assert decode(tokenizer, [*before, *after]) == "Once upon a time" + text
    assert decode_continuations(tokenizer, [before], [after]) == [text]


@pytest.mark.data
def test_many_prompts_are_encoded_as_one(shared_data: Path):
    tokenizer = stories(shared_data)
    prompts = [Prompt("Once upon"), Prompt("a time", ids=(5, 6)), Prompt(""), Prompt("there was")]
    assert encode_prompts(tokenizer, prompts) == [encode_prompt(tokenizer, prompt) for prompt in prompts]


@pytest.mark.data
def test_a_target_ends_with_an_end_token_only_where_there_is_room(shared_data: Path):
    tokenizer = gpt2(shared_data)
    words = encode_continuation(tokenizer, " one two three")
    assert encode_target(tokenizer, " one two three", 50256, 4) == [*words, 50256]
    assert encode_target(tokenizer, " one two three", 50256, 3) == words
    assert encode_target(tokenizer, " one two three", 50256, 2) == words[:2]
