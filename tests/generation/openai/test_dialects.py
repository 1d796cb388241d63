"""Dialects of servers that call themselves OpenAI-compatible: answers in their manner, written anew.

Reports: alpaca_eval#227 and helm#3327 (a filter's 400 for one prompt), tabbyAPI#83 and #289 (finish reasons).
"""

from typing import Any

import pytest

from rlgf.generation.openai.dialects import describe_body, error_in, raise_refusal
from rlgf.generation.openai.refusals import RequestRefusedError, refusal_of
from rlgf.generation.openai.responses import (
    InvalidError,
    ServerRequest,
    TransientError,
    Usage,
    read_chat,
    read_completion,
)

QUESTION = ServerRequest("A quiet town", "", 12, 0)
TOLD = Usage(5, 7, 0, True)
COUNTED = {"prompt_tokens": 5, "completion_tokens": 7}


def chat(message: Any, reason: Any = "stop", usage: Any = COUNTED, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "message": message, "finish_reason": reason, **choice}], "usage": usage}


SAID = {"role": "assistant", "content": " goes out."}
PARTS = [{"type": "text", "text": " goes out."}]
UNDERSTOOD = {
    "vLLM, with fields of its own": chat({**SAID, "reasoning_content": None, "tool_calls": []}, stop_reason=None),
    "vLLM's reasoning next to the text": chat({**SAID, "reasoning_content": "A town."}),
    "SGLang, a matched stop": chat(SAID, matched_stop=2),
    "llama.cpp, counts as timings": {**chat(SAID, usage=None), "timings": {"prompt_n": 5, "predicted_n": 7}},
    "TGI, another word for the end": chat(SAID, "eos_token"),
    "TGI's own form": {"generated_text": " goes out.", "details": {"finish_reason": "eos_token", "generated_tokens": 7}},
    "Ollama's own form": {"message": SAID, "done": True, "done_reason": "stop", "prompt_eval_count": 5, "eval_count": 7},
    "LM Studio, content in parts": chat({"role": "assistant", "content": [{"type": "text", "text": " goes out."}]}),
    "Mistral, thoughts among the parts": chat({"content": [{"type": "thinking", "thinking": []}, *PARTS]}),
    "LiteLLM, a reason as an enumeration": chat(SAID, "FinishReason.STOP"),
    "Azure, with filter results": chat(SAID, content_filter_results={"hate": {"filtered": False}}),
    "OpenRouter, with the provider's reason": chat(SAID, native_finish_reason="end_turn"),
    "TabbyAPI, a reason that says nothing": chat(SAID, "Generated"),
    "TabbyAPI, no reason": chat(SAID, None),
    "counts as texts": chat(SAID, usage={"prompt_tokens": "5", "completion_tokens": 7.0}),
    "counts by other names": chat(SAID, usage={"input_tokens": 5, "output_tokens": 7}),
    "a text where a message belongs": {"choices": [{"text": " goes out.", "finish_reason": "stop"}], "usage": COUNTED},
    "a reason as an object": chat(SAID, {"type": "stop"}),
    "one choice without its list": {"choices": chat(SAID)["choices"][0], "usage": COUNTED},
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_what_is_clear_is_understood(name: str) -> None:
    answer = read_chat(UNDERSTOOD[name], QUESTION)
    assert (answer.text, answer.finished) == (" goes out.", True)
    assert answer.usage == (Usage(0, 7, 0, True) if name == "TGI's own form" else TOLD)


@pytest.mark.parametrize("reason", ["length", "max_tokens", "MAX_TOKENS", "model_length", "max_output_tokens"])
def test_words_for_the_full_length(reason: str) -> None:
    assert not read_chat(chat(SAID, reason), QUESTION).finished


def test_without_a_reason_the_tokens_tell_whether_it_ended() -> None:
    assert not read_chat(chat(SAID, None, {"completion_tokens": 12}), QUESTION).finished
    with pytest.raises(TransientError, match="neither a finish_reason nor a count of its tokens"):
        read_chat(chat(SAID, None, None), QUESTION)


UNCLEAR = [
    ({"output": "goes out."}, "has no choices, but output"),
    ({"choices": []}, "has no choices"),
    ({"choices": [{"index": 0, "finish_reason": "stop"}]}, "has no message, but index, finish_reason"),
    (chat(SAID, "abort"), "was cut off (finish_reason is 'abort')"),
    ({"choices": chat(SAID)["choices"] * 2}, "has 2 choices"),
    ([], "is a list, not an object"),
]


@pytest.mark.parametrize(("answer", "words"), UNCLEAR)
def test_what_is_not_clear_is_named(answer: Any, words: str) -> None:
    with pytest.raises(TransientError) as caught:
        read_chat(answer, QUESTION)
    assert words in str(caught.value)


@pytest.mark.parametrize("reason", ["content_filter", "SAFETY", "PROHIBITED_CONTENT"])
def test_a_filtered_answer_is_a_refusal(reason: str) -> None:
    with pytest.raises(InvalidError, match="it refused") as caught:
        read_chat(chat({"content": ""}, reason), QUESTION)
    assert caught.value.refused


def test_tools_and_thoughts_without_a_text_are_told_apart() -> None:
    call = {"content": "", "tool_calls": [{"function": {"name": "look"}}]}
    with pytest.raises(InvalidError, match="it called a tool"):
        read_chat(chat(call), QUESTION)  # some say "stop" and call a tool
    with pytest.raises(InvalidError, match=r"returned thoughts .* no text"):
        read_chat(chat({"content": None, "reasoning_content": "Hm."}), QUESTION)
    with pytest.raises(InvalidError, match=r"raise endpoint\.thinking_tokens"):
        read_chat(chat({"content": None, "reasoning": "Hm."}, "length"), QUESTION)


def test_a_text_completion_may_come_as_a_message() -> None:
    assert read_completion(chat(SAID), QUESTION).text == " goes out."
    with pytest.raises(TransientError, match="has no text, but finish_reason"):
        read_completion({"choices": [{"finish_reason": "stop"}]}, QUESTION)


ERRORS = [
    ({"error": {"message": "busy", "code": 503}}, (503, "503", "busy")),
    ({"error": "no slot"}, (0, "", "no slot")),
    ({"object": "error", "message": "too long", "code": 400}, (400, "400", "too long")),
    ({"detail": "not now"}, (0, "", "not now")),
    ({"choices": [{"error": {"code": 502, "message": "the provider failed"}, "finish_reason": "error"}]},
     (502, "502", "the provider failed")),
    ({"error": "Input validation error", "error_type": "validation"}, (0, "validation", "Input validation error")),
    (chat(SAID), None),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "error"), ERRORS)
def test_errors_that_come_with_status_200(answer: Any, error: Any) -> None:
    assert error_in(answer) == error


REFUSED = [
    (400, "content_filter", "The response was filtered", "filtered"),
    (400, None, "litellm.ContentPolicyViolationError: Azure has a policy", "filtered"),
    (403, None, "This model requires moderation. Your input was flagged", "filtered"),
    (400, None, "This model's maximum context length is 12 tokens. However, you requested 30", "too long"),
    (400, "context_length_exceeded", "Please shorten it", "too long"),
    (400, None, "The input (30 tokens) is longer than the model's context length (12 tokens).", "too long"),
    (400, "exceed_context_size_error", "the request exceeds the available context size", "too long"),
    (500, None, "the request exceeds the available context size, try increasing it", "too long"),
    (422, "validation", "Input validation error: `inputs` must have less than 1024 tokens. Given: 1200", "too long"),
    (422, "validation", "`inputs` tokens + `max_new_tokens` must be <= 4096", "too long"),
    (400, None, "prompt is too long: 201234 tokens > 200000 maximum", "too long"),
    (413, None, "Request too large: too many tokens", "too long"),
    (400, None, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.", None),
    (400, None, "Unknown parameter: 'top_k'", None),
    (403, None, "This project may not use this model.", None),
    (401, None, "content_filter", None),
    (429, None, "Request too large for tokens per minute", None),
    (500, None, "The content filter is down", None),
]


@pytest.mark.parametrize(("status", "code", "message", "reason"), REFUSED)
def test_a_refusal_of_one_question_is_told_from_one_of_all(status: int, code: Any, message: str, reason: Any) -> None:
    assert refusal_of(status, code, message) == reason


def test_a_refusal_may_come_with_status_200() -> None:
    with pytest.raises(RequestRefusedError, match="refused the question as too long: shown"):
        raise_refusal(0, "validation", "`inputs` must have less than 4 tokens", "shown")
    raise_refusal(503, "", "overloaded", "shown")


def test_what_is_not_json_is_described() -> None:
    assert "web page" in describe_body(b"<!doctype html>")
    assert "stream of events" in describe_body(b'data: {"id": 1}')
    assert describe_body(b" \n") == "its response is empty"
    assert describe_body(b"{half") == "its response is not JSON"
