"""Prompts from texts and conversations: chat templates by hand, and what truncation keeps."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlgf.data.chat import PromptBuilder, normalize_whitespace
from rlgf.data.conversations.messages import is_conversation, messages_of
from rlgf.data.conversations.template import ChatTemplate, read_template
from rlgf.errors import INPUT_ERRORS, DataError
from rlgf.evaluation.chat_judge import fill_template
from rlgf.pipeline.stages import train_tokenizer
from rlgf.text_metrics.as_rewards import build_text_function

TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
BRACKETS = (  # Llama 2's way: no opening of the assistant's turn, and replies are trimmed
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% elif message['role'] == 'assistant' %} {{ message['content'] | trim }} </s>"
    "{% else %}{{ raise_exception('only user and assistant may speak') }}{% endif %}{% endfor %}"
)
ASKED = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How was the film?"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "It was a"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the film was a great joy and its cast moved me"] * 3, 300)


@pytest.fixture(scope="module")
def chatty(tokenizer: Any) -> Any:
    """A tokenizer with a template whose marks are tokens of their own."""
    import copy

    own = copy.deepcopy(tokenizer)
    own.add_special_tokens({"extra_special_tokens": ["<|turn|>", "<|end|>"]})
    own.chat_template = TEMPLATE
    return own


def test_a_conversation_becomes_what_the_template_makes_of_it(chatty: Any):
    reader = PromptBuilder(chatty)
    (prompt,) = reader([ASKED], ["row 1"])
    text = "<|turn|>system\nBe kind.<|end|>\n<|turn|>user\nHow was the film?<|end|>\n<|turn|>assistant\n"
    assert prompt is not None
    assert prompt.text == text
    assert prompt.messages == tuple(ASKED)
    assert prompt.ids is not None
    assert chatty.decode(prompt.ids, skip_special_tokens=False) == text
    assert prompt.ids.count(chatty.convert_tokens_to_ids("<|turn|>")) == 3  # one token each, and no opening token besides
    assert prompt.ids[0] == chatty.convert_tokens_to_ids("<|turn|>")


def test_a_partial_turn_of_the_assistant_goes_on_and_is_not_closed(chatty: Any):
    (prompt,) = PromptBuilder(chatty)([BEGUN], ["row 1"])
    assert prompt is not None
    assert prompt.text.endswith("<|turn|>assistant\nIt was a")
    assert ChatTemplate(chatty).reply(BEGUN, " great joy") == " great joy"


def test_a_reply_stands_behind_the_prompt_as_the_template_writes_it(tokenizer: Any, chatty: Any):
    assert ChatTemplate(chatty).reply(ASKED, "A joy.") == "A joy."
    brackets = ChatTemplate(tokenizer, BRACKETS)
    assert brackets.prompt(ASKED[1:], "row 1") == "[INST] How was the film? [/INST]"
    assert brackets.reply(ASKED[1:], "  A joy. ") == " A joy."
    assert brackets.render_closed([*ASKED[1:], {"role": "assistant", "content": "A joy."}], "row 1") == (
        "[INST] How was the film? [/INST] A joy. </s>"
    )


def test_a_tokenizer_without_a_template_says_how_to_give_one(tokenizer: Any):
    with pytest.raises(DataError, match="row 7 is a conversation, but the tokenizer has no chat template: give one with task"):
        PromptBuilder(tokenizer)([ASKED], ["row 7"])
    (prompt,) = PromptBuilder(tokenizer, template=TEMPLATE)([ASKED], ["row 7"])
    assert prompt is not None
    assert prompt.text.endswith("<|turn|>assistant\n")


def test_what_a_template_refuses_is_an_error_with_its_row_and_reason(tokenizer: Any):
    with pytest.raises(INPUT_ERRORS, match=r"row 2: the chat template rejects .*only user and assistant may speak"):
        PromptBuilder(tokenizer, template=BRACKETS)([ASKED], ["row 2"])


def test_a_template_is_a_file_or_a_text(tmp_path: Any):
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    assert read_template(str(tmp_path / "chat.jinja")) == TEMPLATE
    assert read_template(TEMPLATE) == TEMPLATE
    assert read_template(None) is None
    with pytest.raises(INPUT_ERRORS, match="neither a file nor a Jinja template"):
        read_template(str(tmp_path / "other.jinja"))


@pytest.mark.parametrize("value", [[{"role": "user"}], [{"role": "user", "content": [{"type": "image"}]}]])
def test_messages_without_a_text_are_refused(chatty: Any, value: Any):
    with pytest.raises(INPUT_ERRORS, match="row 3: message 1 must have a 'role' and a 'content' that are strings"):
        PromptBuilder(chatty)([value], ["row 3"])


def test_what_is_a_conversation():
    assert is_conversation(ASKED)
    assert not is_conversation([])
    assert not is_conversation(["a", "b"])
    assert not is_conversation("a")


@pytest.mark.parametrize("value", ["", "  \n", None, 3])
def test_empty_prompts_and_other_things_are_refused(tokenizer: Any, value: Any):
    with pytest.raises(INPUT_ERRORS, match="row 4: the prompt"):
        PromptBuilder(tokenizer)([value], ["row 4"])


SUFFIX = "\n\nTL;DR:"


def words(count: int) -> str:
    return " ".join(f"word{number}" for number in range(count))


@pytest.mark.parametrize("truncation", ["right", "left"])
def test_a_long_text_is_cut_on_one_side_and_the_suffix_stays(word_tokenizer: Any, truncation: Any):
    reader = PromptBuilder(word_tokenizer, 5, truncation, " =>")
    long, short = PromptBuilder.__call__(reader, ["review of : plot cast music", "review of : plot"], ["row 1", "row 2"])
    assert long is not None
    assert short is not None
    assert long.text == {"right": "review of : plot =>", "left": ": plot cast music =>"}[truncation].replace("  ", " ")
    assert short.text == "review of : plot =>"
    assert reader.num_truncated == 1


def test_a_suffix_that_is_there_is_not_written_twice(word_tokenizer: Any):
    (prompt,) = PromptBuilder(word_tokenizer, suffix=" =>")(["review of =>"], ["row 1"])
    assert prompt is not None
    assert prompt.text == "review of =>"
    with pytest.raises(INPUT_ERRORS, match="the prompt is empty"):
        PromptBuilder(word_tokenizer, suffix=" =>")([" =>"], ["row 1"])


@given(
    st.text(min_size=1, max_size=60).filter(lambda text: text.strip()), st.integers(12, 40), st.sampled_from(["right", "left"])
)
def test_whatever_the_text_the_suffix_is_whole_and_the_rest_a_part_of_it(text: str, limit: int, truncation: Any):
    tokenizer = PROPERTY_TOKENIZER
    reader = PromptBuilder(tokenizer, limit, truncation, SUFFIX)
    (prompt,) = reader([text], ["row 1"])
    assert prompt is not None
    assert prompt.text.endswith(SUFFIX)
    kept = prompt.text.removesuffix(SUFFIX)
    body = text.removesuffix(SUFFIX)
    assert body.startswith(kept) if truncation == "right" else body.endswith(kept)
    assert reader.count(prompt.text) <= limit
    assert (kept != body) == bool(reader.num_truncated)


PROPERTY_TOKENIZER = train_tokenizer(["the film was a great joy, wasn't it? TL;DR: yes"], 280)


def test_as_much_is_kept_as_fits():
    text = words(400)
    for truncation in ("right", "left"):
        reader = PromptBuilder(PROPERTY_TOKENIZER, 64, truncation, SUFFIX)
        (prompt,) = reader([text], ["row 1"])
        assert prompt is not None
        assert 62 <= reader.count(prompt.text) <= 64
    right, left = (PromptBuilder(PROPERTY_TOKENIZER, 64, side, SUFFIX)([text], ["row 1"])[0] for side in ("right", "left"))
    assert right is not None
    assert left is not None
    assert right.text.startswith("word0 word1 ")
    assert left.text.endswith(f"word399{SUFFIX}")


def test_a_limit_that_holds_no_more_than_the_suffix_is_refused():
    with pytest.raises(INPUT_ERRORS, match="alone has"):
        PromptBuilder(PROPERTY_TOKENIZER, 3, suffix=SUFFIX)


def test_a_conversation_is_never_cut_but_left_out_and_counted(chatty: Any):
    reader = PromptBuilder(chatty, 20)
    assert reader([ASKED], ["row 1"]) == [None]
    assert (reader.num_truncated, reader.num_too_long) == (0, 1)


def test_texts_that_differ_in_case_and_white_space_are_the_same_post():
    assert normalize_whitespace(" A post\n\nabout  it ") == normalize_whitespace("a POST about it") == "a post about it"


OPENED = (  # Zephyr's way: the line break behind the role belongs to the message, and the prompt ends without it
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_what_opens_a_reply_is_no_part_of_what_is_said(tokenizer: Any):
    opened = ChatTemplate(tokenizer, OPENED)
    assert opened.prompt(ASKED[1:], "row 1").endswith("<|assistant|>")
    assert opened.reply(ASKED[1:], "A joy.") == "\nA joy."
    assert opened.strip_opening(ASKED[1:], "\nA joy.") == "A joy."
    assert opened.strip_opening(ASKED[1:], "\n\nA joy.") == "\nA joy."
    assert opened.strip_opening(BEGUN, " great joy") == "It was a great joy"
    assert ChatTemplate(tokenizer, TEMPLATE).strip_opening(ASKED, "\nA joy.") == "A joy."  # another model's opening
    assert ChatTemplate(tokenizer, TEMPLATE).strip_opening(ASKED, "    indented") == "    indented"
    thinking = TEMPLATE.replace("\n{{ message['content'] }}", "\n<think></think>{{ message['content'] }}")
    assert ChatTemplate(tokenizer, thinking).strip_opening(ASKED, "<think></think>A joy.") == "A joy."


def test_what_every_reply_begins_with_is_known_and_not_read_as_text(tokenizer: Any):
    thinking = TEMPLATE.replace("\n{{ message['content'] }}", "\n<think></think>{{ message['content'] }}")
    (prompt,) = PromptBuilder(tokenizer, template=thinking)([ASKED], ["row 1"])
    assert prompt is not None
    written = ChatTemplate(tokenizer, thinking).reply(ASKED, "one two three")
    assert written == prompt.reply_prefix + "one two three" != "one two three"
    assert prompt.strip_reply_prefix(written) == prompt.strip_reply_prefix("one two three") == "one two three"
    with_reference = dataclasses.replace(prompt, references=(written,))
    for name, options, value in (
        ("rouge1", {}, 1.0), ("length_penalty", {"maximum": 3}, 0.0), ("repetition_penalty", {"order": 1}, 0.0),
    ):  # fmt: skip
        function = build_text_function(name, options=options)
        assert function([with_reference] * 2, [written, "one two three"]) == [value] * 2, name
    asked = fill_template("[context]|[summary 1]|[summary 2]", prompt, written, "four")[1]
    assert asked.endswith("|one two three|four")
    (going_on,) = PromptBuilder(tokenizer, template=thinking)([BEGUN], ["row 1"])
    assert going_on is not None
    assert going_on.reply_prefix == ""


def test_an_opening_of_special_tokens_is_known_as_it_is_decoded(tokenizer: Any):
    end = tokenizer.eos_token
    opening = TEMPLATE.replace("\n{{ message['content'] }}", "\n" + end + "final{{ message['content'] }}")
    (prompt,) = PromptBuilder(tokenizer, template=opening)([ASKED], ["row 1"])
    assert prompt is not None
    assert end in prompt.reply_prefix
    written = tokenizer(prompt.reply_prefix + "A joy.", add_special_tokens=False)["input_ids"]
    assert prompt.strip_reply_prefix(tokenizer.decode(written, skip_special_tokens=True)).strip() == "A joy."
    assert prompt.strip_reply_prefix(prompt.reply_prefix + "A joy.") == "A joy."


def test_calls_of_tools_and_texts_in_parts_are_messages():
    calls = [{"function": {"name": "look_up", "arguments": {}}}]
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    found = messages_of([{"role": "assistant", "tool_calls": calls}, {"role": "tool", "content": parts}], "row 1")
    assert found == ({"role": "assistant", "tool_calls": calls, "content": ""}, {"role": "tool", "content": "one two"})
    with pytest.raises(INPUT_ERRORS, match="row 1: message 1 must have"):
        messages_of([{"role": "user", "content": [{"type": "image"}]}], "row 1")


def test_what_else_a_message_holds_reaches_the_template(tokenizer: Any):
    named = TEMPLATE.replace("{{ message['content'] }}", "{{ message.get('name', 'nobody') }}: {{ message['content'] }}")
    talk = [{"role": "user", "content": "How?", "name": "Ann"}, {"role": "assistant", "content": "Well.", "name": None}]
    (prompt,) = PromptBuilder(tokenizer, template=named)([[*talk, {"role": "user", "content": "Why?"}]], ["row 1"])
    assert prompt is not None
    assert [words in prompt.text for words in ("Ann: How?", "nobody: Well.", "nobody: Why?")] == [True] * 3


def test_a_separator_stands_before_responses_that_begin_with_no_white_space(tokenizer: Any):
    reader = PromptBuilder(tokenizer, separator=" ", template=TEMPLATE)
    plain, talk = reader(["How was it?", ASKED], ["row 1", "row 2"])
    assert plain is not None
    assert talk is not None
    assert [reader.response(plain, text) for text in ("A joy.", " A joy.", "\nA joy.", "")] == [
        " A joy.", " A joy.", "\nA joy.", ""
    ]  # fmt: skip
    assert reader.response(talk, "A joy.") == "A joy."
    (open_ended,) = reader(["How was it?\n"], ["row 1"])
    assert open_ended is not None
    assert reader.response(open_ended, "A joy.") == "A joy."


def test_a_template_that_wants_a_system_message_gets_one_in_trials(tokenizer: Any):
    strict = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('say how to behave') }}{% endif %}" + OPENED
    assert ChatTemplate(tokenizer, strict).reply(ASKED, "A joy.") == "\nA joy."
