"""Text to token ids and back, and the boundary between prompt and continuation."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlgf.types import Prompt
from rlgf.untrusted_text import replace_surrogates

# a continuation is encoded after the first of these that stays separate tokens
ANCHORS = ("\n", "(", "/", "0", "=", "a")
# byte-level tokenizers write a printable byte as itself, any other as the next free character from
# U+0100 on
_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = sorted({*range(0x100)} - {*_PRINTING})
_BYTE_OF = {chr(byte): byte for byte in _PRINTING} | {chr(0x100 + i): byte for i, byte in enumerate(_HIDDEN)}


@dataclass(frozen=True)
class Codec:
    """The conversion between text and token ids for one model.

    A causal model's response continues its prompt, whose closing tokens are removed. The response
    of an encoder–decoder (`is_encoder_decoder`) is a separate text, and its prompt keeps them.
    """

    tokenizer: Any
    is_encoder_decoder: bool = False

    def prompt(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt: its own if given, otherwise its encoded text.

        The text is encoded with the tokenizer's opening tokens.
        """
        return self.prompts([prompt])[0]

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Return the ids of each prompt; one call is faster than one per prompt."""
        texts = [replace_surrogates(prompt.text) for prompt in prompts if prompt.ids is None and prompt.text]
        encoded = map(self._open_once, self.tokenizer(texts, add_special_tokens=True)["input_ids"] if texts else [])
        close = (lambda ids: list(ids)) if self.is_encoder_decoder else (lambda ids: _without_closing(self.tokenizer, ids))
        return [
            list(prompt.ids) if prompt.ids is not None else close(next(encoded)) if prompt.text else [] for prompt in prompts
        ]

    def _open_once(self, ids: Sequence[int]) -> Sequence[int]:
        """Remove duplicate opening tokens if the text, as from a template, has its own."""
        opening = _opening(self.tokenizer)
        return ids[len(opening) :] if opening and tuple(ids[: 2 * len(opening)]) == opening * 2 else ids

    def response(self, text: str, has_prefix: bool = False) -> list[int]:
        """Return the ids of a response, without opening and EOS tokens.

        With `has_prefix` the text continues a response that has begun.
        """
        if has_prefix or not self.is_encoder_decoder:
            return encode_continuation(self.tokenizer, text)
        return list(self.tokenizer(replace_surrogates(text).removeprefix(" "), add_special_tokens=False)["input_ids"])

    def target(self, text: str, end_id: int, max_new_tokens: int) -> list[int]:
        """Return the ids of a target response, truncated to `max_new_tokens` tokens.

        One with fewer tokens is closed by the EOS token.
        """
        ids = self.response(text)
        return [*ids, end_id] if len(ids) < max_new_tokens else ids[:max_new_tokens]

    def decode(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[str]:
        """Decode each response.

        For causal models this includes white space at the boundary to the prompt.
        """
        if self.is_encoder_decoder:
            return _batch_decode(self.tokenizer, responses)
        return decode_continuations(self.tokenizer, prompts, responses)


def _without_closing(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Remove tokens that a tokenizer appends to every text, since a prompt is continued."""
    return list(ids[: len(ids) - _num_closing(tokenizer)])


@lru_cache(maxsize=32)
def _opening(tokenizer: Any) -> tuple[int, ...]:
    """Return the tokens that a tokenizer prepends to every text."""
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    starts = [place for place in range(len(whole)) if bare and whole[place : place + len(bare)] == bare]
    return tuple(whole[: starts[0]]) if starts else ()


@lru_cache(maxsize=32)
def _num_closing(tokenizer: Any) -> int:
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    ends = [place + len(bare) for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
    return len(whole) - ends[-1] if ends else 0


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """Encode a text that follows another, without opening tokens or an added space.

    SentencePiece tokenizers, and byte-level ones with `add_prefix_space`, put a space before every
    text or word, but not inside one. So the text is encoded after an anchor, whose tokens are then
    removed. Unpaired surrogates, which no tokenizer accepts, become U+FFFD.
    """
    text = replace_surrogates(text)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not text or not _opens_with_space(tokenizer):
        return ids
    for anchor in ANCHORS:
        anchor_ids = list(tokenizer(anchor, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(anchor + text, add_special_tokens=False)["input_ids"])
        if anchor_ids and whole[: len(anchor_ids)] == anchor_ids:
            return whole[len(anchor_ids) :]
    return ids


@lru_cache(maxsize=32)
def _opens_with_space(tokenizer: Any) -> bool:
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    # the space of SentencePiece, and that of byte-level tokenizers (U+0120)
    return str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(("\u2581", "\u0120"))


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode ids, without special tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_continuations(tokenizer: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[str]:
    """Return the text that each response adds to its prompt, with boundary white space."""
    before = _batch_decode(tokenizer, prompts)
    whole = _batch_decode(tokenizer, [[*prompt, *response] for prompt, response in zip(prompts, responses)])
    return [
        text[len(start) :] if text.startswith(start) else decode(tokenizer, list(response))
        for start, text, response in zip(before, whole, responses)
    ]


def _batch_decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    return tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def join_with_space(before: str, text: str) -> str:
    """Return `text` with a space before it, unless either side has white space.

    For texts written separately from their prefix (in a chat, at a terminal).
    """
    apart = text and before and not before[-1].isspace() and not text[0].isspace()
    return " " + text if apart else text


def complete_utf8_prefix(tokenizer: Any, ids: Sequence[int]) -> int:
    """Return the number of leading tokens whose text does not end inside a character.

    Tokens are dropped only for bytes that begin a character and lack its rest, at most three at a
    time. Bytes that no continuation can complete stay: a policy may generate invalid UTF-8.
    """
    kept = len(ids)
    if _byte_fallback(tokenizer) == "nowhere":
        return kept
    while kept and (missing := _incomplete_bytes(tokenizer, ids, kept)):
        while missing > 0:
            kept -= 1
            missing -= len(_token_bytes(tokenizer, ids[kept]))
    return kept


def _incomplete_bytes(tokenizer: Any, ids: Sequence[int], length: int) -> int:
    """Return the number of bytes at the end of `ids[:length]` of an incomplete character."""
    tail = b""
    while length and len(tail) < 3:
        length -= 1
        tail = _token_bytes(tokenizer, ids[length]) + tail
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(tail[-3:])
    return len(decoder.getstate()[0])


def _token_bytes(tokenizer: Any, token: int) -> bytes:
    """Return the bytes of a token.

    For tokenizers that do not split characters these are the bytes of its name.
    """
    name, fallback = str(tokenizer.convert_ids_to_tokens(int(token))), _byte_fallback(tokenizer)
    if fallback == "everywhere" and all(letter in _BYTE_OF for letter in name):
        return bytes(_BYTE_OF[letter] for letter in name)
    if fallback == "unknown characters" and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.encode("utf-8", "replace")


@lru_cache(maxsize=32)
def _byte_fallback(tokenizer: Any) -> str:
    """Return which characters a tokenizer may split into bytes.

    "everywhere" (byte-level), "unknown characters" (byte fallback) or "nowhere".
    """
    if not hasattr(tokenizer, "convert_ids_to_tokens"):  # not a tokenizer of transformers
        return "nowhere"
    names = tokenizer.convert_ids_to_tokens(tokenizer("\u00e9", add_special_tokens=False)["input_ids"])
    if "\u00c3\u00a9" in "".join(map(str, names)):
        return "everywhere"
    return "unknown characters" if "<0xC3>" in tokenizer.get_vocab() else "nowhere"
