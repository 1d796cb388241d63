"""Guide completions in the policy's tokens."""

import pytest

from rlgf.data.tokenization import Codec
from rlgf.guides.base import Completion, CompletionRequest
from rlgf.guides.encoding import EncodedCompletion, encode_guide_completions
from rlgf.models.language_model import LanguageModel
from rlgf.types import Prompt

WORD = "superb"


def encoded(policy: LanguageModel, completion: Completion, limit: int, prefix: tuple[int, ...] = ()) -> EncodedCompletion:
    request = CompletionRequest(Prompt("review of : plot =>"), [3, 4], "", prefix, limit, 0, 0, 0)
    (found,) = encode_guide_completions(policy, [request], [completion])
    assert found is not None
    return found


def parts(found: EncodedCompletion) -> tuple[list[int], bool, bool]:
    return found.ids, found.ended_with_eos, found.truncated


def test_completions_by_hand(tiny_model: LanguageModel) -> None:
    policy, end = tiny_model, tiny_model.eos_token_id
    (word,) = policy.tokenizer(f" {WORD}").input_ids
    assert parts(encoded(policy, Completion(f" {WORD}", finished=True), 3)) == ([word, end], True, False)
    assert parts(encoded(policy, Completion(f" {WORD}", finished=True), 1)) == ([word], False, False)
    assert parts(encoded(policy, Completion(f" {WORD}", finished=False), 3)) == ([word], False, False)
    assert parts(encoded(policy, Completion(f" {WORD} {WORD}", finished=True), 1)) == ([word], False, True)
    assert parts(encoded(policy, Completion("", finished=True), 3)) == ([end], True, False)
    assert parts(encoded(policy, Completion("", True, ids=[7, 8, end]), 3)) == ([7, 8, end], True, False)
    assert parts(encoded(policy, Completion("", True, ids=[7, 8, end]), 2)) == ([7, 8], False, True)
    assert parts(encoded(policy, Completion("", False, ids=[7, 8]), 3)) == ([7, 8], False, False)


def test_a_text_is_encoded_once(tiny_model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    response = Codec.response

    def counted(self: Codec, text: str, has_prefix: bool = False) -> list[int]:
        seen.append(text)
        return response(self, text, has_prefix)

    monkeypatch.setattr(Codec, "response", counted)
    encoded(tiny_model, Completion(f" {WORD}", finished=True), 3)
    assert seen == [f" {WORD}"]


def test_a_text_that_encoding_changes_is_kept_and_counted(tiny_model: LanguageModel) -> None:
    kept, changed = (encoded(tiny_model, Completion(text, True), 5) for text in (f" {WORD}", " unheard-of"))
    assert (kept.text, kept.changed) == (f" {WORD}", False)
    assert (changed.text, changed.changed) == (" unheard-of", True)
    assert encoded(tiny_model, Completion("", True, ids=[7]), 5).text is None


def test_failed_completions_have_no_tokens(tiny_model: LanguageModel) -> None:
    request = CompletionRequest(Prompt("review of : plot =>"), [3, 4], "", [], 3, 0, 0, 0)
    assert encode_guide_completions(tiny_model, [request], [Completion("", True, failed=True)]) == [None]
