"""Text to token ids and back: the only file that knows what happens at the boundary between two writers."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from rlgf.types import Prompt


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The ids of a prompt: those it fixes itself, otherwise its text with the tokenizer's own opening tokens."""
    if prompt.ids is not None:
        return list(prompt.ids)
    return list(tokenizer(prompt.text, add_special_tokens=True)["input_ids"]) if prompt.text else []


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """The same of many prompts at once, which tokenizers do faster."""
    texts = [prompt.text for prompt in prompts if prompt.ids is None and prompt.text]
    encoded = iter(tokenizer(texts, add_special_tokens=True)["input_ids"] if texts else [])
    return [list(prompt.ids) if prompt.ids is not None else list(next(encoded)) if prompt.text else [] for prompt in prompts]


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that follows another, encoded apart from it, without opening tokens and without a space of their own.

    SentencePiece tokenizers put a space before every text; behind a newline they do not, so the text is encoded behind one.
    """
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not text or not _opens_with_space(tokenizer):
        return ids
    mark = tokenizer("\n", add_special_tokens=False)["input_ids"]
    whole = tokenizer("\n" + text, add_special_tokens=False)["input_ids"]
    return list(whole[len(mark) :]) if whole[: len(mark)] == mark else ids


@lru_cache(maxsize=32)
def _opens_with_space(tokenizer: Any) -> bool:
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("\u2581")


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
