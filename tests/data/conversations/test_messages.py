"""Messages as data files have them."""

import pytest

from rlgf.data.conversations.messages import read_conversation, read_tools, reply_of, text_of, without_nulls
from rlgf.errors import DataError

TALK = [{"role": "user", "content": "hi"}]


def test_nulls_that_arrow_adds_are_removed_at_any_depth() -> None:
    row = [{"role": "tool", "content": None, "tool_calls": [{"function": {"arguments": {"city": "c", "zone": None}}}]}]
    assert without_nulls(row) == [{"role": "tool", "tool_calls": [{"function": {"arguments": {"city": "c"}}}]}]
    assert without_nulls(["a", None, {"b": [None]}]) == ["a", None, {"b": [None]}]  # a null in a list was written


def test_a_conversation_may_be_json_or_a_list_per_field() -> None:
    assert read_conversation('[{"role": "user", "content": "hi"}]', "row 1") == TALK
    assert read_conversation({"role": ["user"], "content": ["hi"]}, "row 1") == TALK
    for text in ("[1, 2]", "[a list of roles]", "plain", '[{"role": unfinished'):
        assert read_conversation(text, "row 1") == text
    with pytest.raises(DataError, match="row 1: a conversation is written in Python's notation"):
        read_conversation("[{'role': 'user', 'content': 'hi'}]", "row 1")


def test_tools_are_a_list_of_schemas_or_its_json() -> None:
    assert read_tools([{"name": "a"}], "tools", "row 1") == ({"name": "a"},)
    assert read_tools('[{"name": "a"}]', "tools", "row 1") == ({"name": "a"},)
    assert [read_tools(value, "tools", "row 1") for value in (None, [], "", "[]")] == [None] * 4
    for value in ("hammer", ["a"], 3):
        with pytest.raises(DataError, match=r"row 1: 'tools' is .* must be a list of tools"):
            read_tools(value, "tools", "row 1")


def test_a_reply_is_a_text_unless_its_message_holds_more() -> None:
    assert reply_of([{"role": "assistant", "content": "a", "name": "x"}], "row 1") == "a"
    thinking = {"role": "assistant", "content": "a", "reasoning": "why"}
    assert reply_of(thinking, "row 1") == thinking
    assert text_of(thinking) == "<think>\nwhy\n</think>\n\na"
    with pytest.raises(DataError, match="row 1: a response must be a string or one assistant message"):
        reply_of(TALK, "row 1")
