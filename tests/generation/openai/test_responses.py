"""Parsing of a server's JSON: text, finish reason, usage, and invalid responses."""

import json
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from rlgf.generation.openai.client import retry_after
from rlgf.generation.openai.responses import (
    InvalidError,
    PermanentError,
    ServerRequest,
    ServerResponse,
    TransientError,
    Usage,
    read_chat,
    read_completion,
    read_ids,
)

QUESTION = ServerRequest("The film begins in a quiet town", " where nobody", 12, 0)
USAGE = {"prompt_tokens": 5, "completion_tokens": 7}


def told(text: Any, reason: Any = "stop", **message: Any) -> Any:
    """A chat answer as parsed JSON."""
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": reason}], "usage": USAGE}


def written(text: Any, reason: Any = "stop") -> Any:
    """A text completion as parsed JSON."""
    return {"choices": [{"text": text, "finish_reason": reason}], "usage": USAGE}


STRIPPED = {
    " goes out.": " goes out.",
    "goes out.": " goes out.",
    '"goes out."': " goes out.",
    "«goes out.»": " goes out.",
    "where nobody goes out.": " goes out.",
    "The film begins in a quiet town where nobody goes out.": " goes out.",
    "the film begins in a quiet town where nobody goes out.": " the film begins in a quiet town where nobody goes out.",
    "town where nobody goes out.": " goes out.",
    "a quiet town where nobody's home.": "'s home.",
    "Sure, here is the continuation:\n\ngoes out.": " goes out.",
    "<think>Hm. A town.</think>goes out.": " goes out.",
    "Hm. A town.</think>\n\ngoes out.": "\n\ngoes out.",
    "[THINK]Hm.[/THINK]<thinking>Again.</thinking> goes out.": " goes out.",
    '<think>Hm.</think>Certainly:\n"where nobody goes out."': " goes out.",
}


@pytest.mark.parametrize(("said", "kept"), STRIPPED.items())
def test_echoes_quotes_preambles_and_thoughts_are_taken_off(said: str, kept: str) -> None:
    answer = read_chat(told(said), QUESTION)
    assert answer == ServerResponse(kept, True, Usage(5, 7, 0, True), stripped=said.strip() != kept.strip())


def test_the_last_words_are_only_an_echo_where_a_model_was_told_to_continue() -> None:
    said = "town where nobody goes out."
    assert read_chat(told(said), QUESTION, instructed=False).text == " " + said
    loop = ServerRequest("", " very very very very", 12, 0)
    assert read_chat(told("very very very good"), loop).text == " very very very good"


def test_an_echo_shows_where_the_joint_is() -> None:
    question = ServerRequest("The film begins", " in a qui", 12, 0)
    assert read_chat(told("The film begins in a quiet town."), question).text == "et town."
    assert read_chat(told("begins in a quiet town."), question).text == "et town."


def test_a_quotation_that_was_cut_off_loses_its_opening_mark() -> None:
    assert read_chat(told('"goes out and', "length"), QUESTION).text == " goes out and"
    assert read_chat(told('"Out!" he said and', "length"), QUESTION).text == ' "Out!" he said and'


def test_a_message_may_come_in_parts() -> None:
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "goes "}, {"type": "text", "text": "out."}]
    assert read_chat(told(parts), QUESTION).text == " goes out."


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (told("<think>Hm. A town. And", "length"), "still thinking"),
        (told(None, "length"), "ran out before it generated anything"),
        (told("", "stop"), "generated nothing"),
        (told(None, refusal="No."), "refused"),
        (told("no", "content_filter"), "refused"),
        (told(None, "tool_calls"), "called a tool"),
        (told("The film begins in a village. It"), "started over"),
        (told("a \ud800 b"), "not valid Unicode"),
    ],
)
def test_answers_that_cannot_be_used_say_why_and_what_they_cost(data: Any, reason: str) -> None:
    with pytest.raises(InvalidError, match=reason) as caught:
        read_chat(data, QUESTION)
    assert caught.value.usage == Usage(5, 7, 0, True)


def test_having_nothing_to_add_is_told_from_having_had_no_room() -> None:
    for data, silent in (
        (told(""), True),
        (told(None, "length"), False),
        (told('""'), False),
        (told("<think>a</think>"), False),
    ):
        with pytest.raises(InvalidError) as caught:
            read_chat(data, QUESTION)
        assert caught.value.is_empty is silent


@pytest.mark.parametrize(
    "data",
    [
        None, [], {}, {"choices": None}, {"choices": []}, {"choices": ["a"]}, {"choices": [{}, {}]},
        written(42), written("fine", 3),
        written("fine", "error"), written("fine", "insufficient_system_resource"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_asked_for_again(data: Any) -> None:
    with pytest.raises(TransientError):
        read_completion(data, QUESTION)


def test_a_completion_is_taken_as_it_is() -> None:
    for text in (" goes out.", "goes out.", '"goes"', "where nobody goes", "a\x00b", "<think>a"):
        assert read_completion(written(text), QUESTION).text == text
    assert read_completion(written(" out. END"), QUESTION, stop=("END",)).text == " out. "


@pytest.mark.parametrize(
    ("reason", "finished"), [("stop", True), ("eos_token", True), ("length", False), ("max_tokens", False)]
)
def test_how_a_text_ended(reason: str, finished: bool) -> None:
    assert read_completion(written("a", reason), QUESTION).finished is finished


def test_bills_count_thoughts_and_believe_no_nonsense() -> None:
    def bill(usage: Any) -> Usage:
        return read_completion({**written("a"), "usage": usage}, QUESTION).usage

    thinking = {"completion_tokens_details": {"reasoning_tokens": 90}}
    assert bill({"prompt_tokens": 5, "completion_tokens": 100, **thinking}) == Usage(5, 100, 90, True)
    assert bill({"prompt_tokens": -5, "completion_tokens": True, "completion_tokens_details": "many"}) == Usage(0, 0, 0, True)
    for nothing in (None, {}, "much"):
        assert not bill(nothing).known


# --- by token ids -------------------------------------------------------------------------------------------------------

IDS = ServerRequest("", "", 4, 0, ids=(7, 8, 9), min_tokens=2)
END = (0, 1)


def spoken(ids: Any, reason: str = "stop", **more: Any) -> Any:
    return {"choices": [{"text": "x", "token_ids": ids, "finish_reason": reason, **more}], "usage": USAGE}


@pytest.mark.parametrize(
    ("ids", "reason", "kept"),
    [
        ([5, 6, 0], "stop", (5, 6, 0)),
        ([5, 6, 1], "stop", (5, 6, 1)),
        ([5, 6, 3], "stop", (5, 6, 0)),  # an end token of its own becomes the policy's
        ([5, 6, 4, 5], "length", (5, 6, 4, 5)),
        ([5, 6, 4, 0], "stop", (5, 6, 4, 0)),
    ],
)
def test_token_ids_end_with_the_policys_end_token_or_at_the_budget(ids: Any, reason: str, kept: tuple[int, ...]) -> None:
    answer = read_ids(spoken(ids, reason, prompt_token_ids=[7, 8, 9]), IDS, END, exact=True)
    assert (answer.ids, answer.finished) == (kept, reason == "stop")


def test_nothing_to_add_in_token_ids_is_an_end_token() -> None:
    for ids in ([], [0], [3]):
        assert read_ids(spoken(ids), ServerRequest("", "", 4, 0, ids=(7,)), END, exact=True).ids == (0,)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (spoken([5, 6], "length"), "generated 2 of 4 tokens"),
        (spoken([5, 6, 7, 8, 9], "length"), "generated 5 of 4 tokens"),
        (spoken([5, 6, 7, 8, 0]), "generated 5 tokens where 2 to 4"),
        (spoken([5, 0]), "generated 2 tokens where 2 to 4"),
        (spoken([5, 6, 0], prompt_token_ids=[7, 8]), "received other tokens"),
        (written("goes out."), "returns no token ids"),
    ],
)
def test_token_ids_that_are_not_what_was_asked_for_stop_the_run(data: Any, reason: str) -> None:
    with pytest.raises(PermanentError, match=reason):
        read_ids(data, IDS, END, exact=True)


def test_a_least_length_is_asked_of_those_that_keep_to_it() -> None:
    assert read_ids(spoken([5, 0]), IDS, END, exact=False).ids == (5, 0)


@pytest.mark.parametrize("ids", ["many", [5, "6"], [5, True], [5, -1], [5, 1.0], {"ids": [5]}])
def test_token_ids_of_wrong_types_are_asked_for_again(ids: Any) -> None:
    with pytest.raises(TransientError, match="wrong types"):
        read_ids(spoken(ids), IDS, END, exact=True)


def test_answers_survive_the_cache() -> None:
    assert json.loads(json.dumps(read_ids(spoken([5, 6, 0]), IDS, END, exact=True).ids)) == [5, 6, 0]


# --- pauses that servers ask for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0), ({"retry-after": "7"}, 7), ({"retry-after": "0.5"}, 0.5), ({"retry-after": "-3"}, 0),
        ({"retry-after": "soon"}, 0), ({"retry-after": "nan"}, 0), ({"retry-after": "inf"}, 3600),
        ({"retry-after": "86400"}, 3600),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25), ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}, 3600), ({"retry-after": "Wed, 99 Oct 2099"}, 0),
    ],
)  # fmt: skip
def test_pauses_are_read_as_seconds_milliseconds_and_dates(headers: dict[str, str], seconds: float) -> None:
    assert retry_after(headers) == seconds


def test_a_date_is_a_pause_from_now_on() -> None:
    assert 27 < retry_after({"retry-after": format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)}) <= 30
