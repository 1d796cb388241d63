"""Text to token ids and back: the only file that knows what happens at the boundary between two writers."""

from collections.abc import Sequence
from typing import Any

from rlgf.types import Prompt


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The ids of a prompt: those it fixes itself, otherwise its text with the tokenizer's own opening tokens."""
    if prompt.ids is not None:
        return list(prompt.ids)
    return list(tokenizer(prompt.text, add_special_tokens=True)["input_ids"]) if prompt.text else []


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that follows another, encoded apart from it and without opening tokens."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_target(tokenizer: Any, text: str, end_id: int, budget: int) -> list[int]:
    """A target continuation: cut to `budget` tokens, or closed by an end token where that still fits."""
    ids = encode_continuation(tokenizer, text)
    return [*ids, end_id] if len(ids) < budget else ids[:budget]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of ids, special tokens left out."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_continuations(tokenizer: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[str]:
    """The text that each response adds to its prompt (white space at the joint included)."""

    def batch(rows: list[list[int]]) -> list[str]:
        return tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    before = batch([list(prompt) for prompt in prompts])
    whole = batch([[*prompt, *response] for prompt, response in zip(prompts, responses)])
    return [
        text[len(start) :] if text.startswith(start) else decode(tokenizer, list(response))
        for start, text, response in zip(before, whole, responses)
    ]
