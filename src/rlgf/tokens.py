"""Text to token ids and back: the only file that knows what happens at the boundary between two writers."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from rlgf.types import Prompt

ANCHORS = ("\n", "(", "/", "0", "=", "a")  # what a continuation is encoded behind, until one stays a token of its own
# how byte-level tokenizers spell a byte: itself where it prints, else the next free character from U+0100 on
_PRINTING = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_HIDDEN = sorted({*range(0x100)} - {*_PRINTING})
_BYTE_OF = {chr(byte): byte for byte in _PRINTING} | {chr(0x100 + i): byte for i, byte in enumerate(_HIDDEN)}


@dataclass(frozen=True)
class Codec:
    """Text to tokens and back, as one model takes and gives them.

    A causal model's response goes on behind its prompt, of which no closing token is left. An encoder–decoder's is a text by
    itself (`alone`), beside a prompt that is closed.
    """

    tokenizer: Any
    alone: bool = False

    def prompt(self, prompt: Prompt) -> list[int]:
        """The ids of a prompt: those it fixes itself, otherwise its text with the tokenizer's own opening tokens."""
        return self.prompts([prompt])[0]

    def prompts(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """The same of many prompts at once, which tokenizers do faster."""
        texts = [prompt.text for prompt in prompts if prompt.ids is None and prompt.text]
        encoded = iter(self.tokenizer(texts, add_special_tokens=True)["input_ids"] if texts else [])
        close = (lambda ids: list(ids)) if self.alone else (lambda ids: _opened(self.tokenizer, ids))
        return [
            list(prompt.ids) if prompt.ids is not None else close(next(encoded)) if prompt.text else [] for prompt in prompts
        ]

    def response(self, text: str, begun: bool = False) -> list[int]:
        """The ids of a response, or, where it has `begun`, of what follows; without opening and end tokens."""
        if begun or not self.alone:
            return encode_continuation(self.tokenizer, text)
        return list(self.tokenizer(well_formed(text).removeprefix(" "), add_special_tokens=False)["input_ids"])

    def target(self, text: str, end_id: int, budget: int) -> list[int]:
        """A target response: cut to `budget` tokens, or closed by an end token where that still fits."""
        ids = self.response(text)
        return [*ids, end_id] if len(ids) < budget else ids[:budget]

    def texts(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[str]:
        """The text of each response (white space at the joint to its prompt included, where it goes on behind that)."""
        if self.alone:
            return _batch_decode(self.tokenizer, responses)
        return decode_continuations(self.tokenizer, prompts, responses)


def _opened(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """The ids without the tokens that some tokenizers close every text with: a prompt goes on."""
    return list(ids[: len(ids) - _closing(tokenizer)])


@lru_cache(maxsize=32)
def _closing(tokenizer: Any) -> int:
    bare, whole = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    ends = [place + len(bare) for place in range(len(whole)) if whole[place : place + len(bare)] == bare]
    return len(whole) - ends[-1] if ends else 0


def encode_continuation(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text that follows another, encoded apart from it, without opening tokens and without a space of their own.

    SentencePiece tokenizers put a space before every text, or before every word; not so inside one. So the text is encoded
    behind an anchor, whose tokens are taken off again. Half surrogate pairs, which no tokenizer takes, become U+FFFD.
    """
    text = well_formed(text)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not text or not _opens_with_space(tokenizer):
        return ids
    for anchor in ANCHORS:
        mark = list(tokenizer(anchor, add_special_tokens=False)["input_ids"])
        whole = list(tokenizer(anchor + text, add_special_tokens=False)["input_ids"])
        if mark and whole[: len(mark)] == mark:
            return whole[len(mark) :]
    return ids


def well_formed(text: str) -> str:
    """The text with U+FFFD for half surrogate pairs, which broken JSON can hold and no file or tokenizer can."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@lru_cache(maxsize=32)
def _opens_with_space(tokenizer: Any) -> bool:
    ids = tokenizer("a", add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("\u2581")


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of ids, special tokens left out."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_continuations(tokenizer: Any, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> list[str]:
    """The text that each response adds to its prompt (white space at the joint included)."""

    before = _batch_decode(tokenizer, prompts)
    whole = _batch_decode(tokenizer, [[*prompt, *response] for prompt, response in zip(prompts, responses)])
    return [
        text[len(start) :] if text.startswith(start) else decode(tokenizer, list(response))
        for start, text, response in zip(before, whole, responses)
    ]


def _batch_decode(tokenizer: Any, rows: Sequence[Sequence[int]]) -> list[str]:
    return tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def spaced(before: str, text: str) -> str:
    """A text written apart from what stands before it (in a chat, at a terminal), with one space if neither side has any."""
    apart = text and before and not before[-1].isspace() and not text[0].isspace()
    return " " + text if apart else text


def whole_characters(tokenizer: Any, ids: Sequence[int]) -> int:
    """How many leading tokens to keep so that their text does not end inside a character.

    Tokens are given up only for bytes that begin a character and lack its rest, of which a text ends in three at most at a
    time. Bytes that no continuation could make a character stay: a policy may write invalid UTF-8, and nobody can mend that.
    """
    kept = len(ids)
    if _splits(tokenizer) == "nowhere":
        return kept
    while kept and (missing := _begun(tokenizer, ids, kept)):
        while missing > 0:
            kept -= 1
            missing -= len(_spelt(tokenizer, ids[kept]))
    return kept


def _begun(tokenizer: Any, ids: Sequence[int], length: int) -> int:
    """How many bytes at the end of `ids[:length]` belong to a character that is not complete."""
    tail = b""
    while length and len(tail) < 3:
        length -= 1
        tail = _spelt(tokenizer, ids[length]) + tail
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(tail[-3:])
    return len(decoder.getstate()[0])


def _spelt(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token writes; of tokenizers that do not split characters, those of its name."""
    name, way = str(tokenizer.convert_ids_to_tokens(int(token))), _splits(tokenizer)
    if way == "everywhere" and all(letter in _BYTE_OF for letter in name):
        return bytes(_BYTE_OF[letter] for letter in name)
    if way == "unknown characters" and len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        return bytes([int(name[3:5], 16)])
    return name.encode("utf-8", "replace")


@lru_cache(maxsize=32)
def _splits(tokenizer: Any) -> str:
    """Where a tokenizer may split a character into bytes: everywhere (byte-level), those it does not know, or nowhere."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):  # no tokenizer of transformers' kind
        return "nowhere"
    names = tokenizer.convert_ids_to_tokens(tokenizer("\u00e9", add_special_tokens=False)["input_ids"])
    if "\u00c3\u00a9" in "".join(map(str, names)):
        return "everywhere"
    return "unknown characters" if "<0xC3>" in tokenizer.get_vocab() else "nowhere"
