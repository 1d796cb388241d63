"""Chat templates: prompt and reply together are the whole conversation, in ten families of templates.

The templates are short re-creations of what each family does, in our own words. Reports: LlamaFactory#9218 and
ms-swift#6894 (thoughts twice), ms-swift#6467 (nulls of Arrow), OpenRLHF#1079 (tools), Qwen3-Coder#444 and sglang#12123
(arguments as JSON, quoted twice).
"""

from typing import Any

import pytest

from rlgf.data.chat import PromptBuilder
from rlgf.data.conversations.messages import TemplateInputs, reply_of
from rlgf.data.conversations.template import ChatTemplate
from rlgf.errors import DataError
from rlgf.pipeline.stages import train_tokenizer

CHATML = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPLIT = (  # the thoughts of a message, from their field or from its text
    "{% set said = m.content %}{% set why = m.reasoning_content or '' %}{% if '</think>' in said and not why %}"
    "{% set why = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}" + SPLIT + "<|im_start|>assistant\n"
    "{% if loop.last or why %}<think>\n{{ why }}\n</think>\n\n{% endif %}{{ said }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
DEEPSEEK = (  # past thoughts are dropped, and the prompt opens new ones
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<|A|>{{ m.content.split('</think>')[-1] }}<|end|>"
    "{% else %}<|U|>{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|A|><think>\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% set date = date_string or strftime_now('%d %b %Y') %}"
    "<|h|>system<|/h|>\n\nToday Date: {{ date }}\n<|eot|>"
    "{% for m in messages %}<|h|>{{ m.role }}<|/h|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|h|>assistant<|/h|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
HARMONY = (  # gpt-oss: thoughts are a message of their own, from the field `thinking`
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GLM = (  # the template's marks without line breaks; an empty pair where there are no thoughts
    "[gMASK]{% for m in messages %}{% if m.role == 'assistant' %}"
    + SPLIT
    + "<|assistant|>\n<think>{{ why }}</think>\n{{ said }}"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
OPENED = QWEN3.replace("<|im_start|>assistant\n{% if enable_thinking", "<|im_start|>assistant\n<think>\n{% if enable_thinking")
FAMILIES = {
    "ChatML (Qwen 2.5)": CHATML, "Qwen 3": QWEN3, "Qwen 3 that thinks always": OPENED, "DeepSeek R1": DEEPSEEK,
    "Llama 3": LLAMA3, "Gemma": GEMMA, "Mistral": MISTRAL, "Phi": PHI, "gpt-oss": HARMONY, "GLM 4.5": GLM,
}  # fmt: skip
ASKED = [{"role": "user", "content": "How many?"}]
TAGGED = "<think>\nI count.\n</think>\n\nTwo."
FIELD = {"role": "assistant", "content": "Two.", "reasoning_content": "I count."}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = train_tokenizer(["how many are there ? i count two ."] * 3, 300)
    made.add_special_tokens({"bos_token": "<bos>"})
    return made


def whole(tokenizer: Any, template: str, content: Any) -> str:
    message = {"role": "assistant", "content": content} if isinstance(content, str) else content
    return str(ChatTemplate(tokenizer, template).render_closed([*ASKED, message], "a row"))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_reply_are_what_the_template_makes_of_the_conversation(tokenizer: Any, family: str) -> None:
    chat = ChatTemplate(tokenizer, FAMILIES[family])
    before = chat.prompt(ASKED, "a row")
    joined = before + chat.reply(ASKED, "Two.")
    assert "Two." in joined
    assert joined.count("<bos>") <= 1
    if family == "DeepSeek R1":  # the prompt has opened thoughts: they are closed again
        assert joined == before + "\n</think>\n\nTwo."
    else:
        assert whole(tokenizer, FAMILIES[family], "Two.").startswith(joined)
        assert whole(tokenizer, FAMILIES[family], "Two.").removeprefix(joined).strip() in (
            "", "<|im_end|>", "<|eot|>", "</turn>", tokenizer.eos_token, "<|end|>", "<|return|>"
        )  # fmt: skip
    assert chat.opening(ASKED) + "Two." == chat.reply(ASKED, "Two.")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reply", [TAGGED, FIELD, {**FIELD, "content": TAGGED}])
def test_thoughts_stand_once(tokenizer: Any, family: str, reply: Any) -> None:
    chat = ChatTemplate(tokenizer, FAMILIES[family])
    (message,) = PromptBuilder(tokenizer, template=FAMILIES[family])([ASKED], ["a row"])
    assert message is not None
    joined = message.text + chat.reply(ASKED, reply_of(reply, "a row"))
    assert joined.count("I count.") == 1
    assert joined.count("<think>") == joined.count("</think>") == (0 if family == "gpt-oss" else 1)
    assert joined.endswith("Two.")


def test_thoughts_that_a_prompt_has_closed_are_refused(tokenizer: Any) -> None:
    chat = ChatTemplate(tokenizer, QWEN3, variables={"enable_thinking": False})
    assert chat.reply(ASKED, "Two.") == "Two."
    with pytest.raises(DataError, match="row 3: the response has thoughts, but the chat template ends the prompt with closed"):
        chat.reply(ASKED, TAGGED, where="row 3")


def test_thoughts_in_a_field_and_others_in_the_text_are_refused(tokenizer: Any) -> None:
    talk = [*ASKED, {**FIELD, "content": "<think>another</think>Two."}, *ASKED]
    with pytest.raises(DataError, match="row 1: message 2 has thoughts in a field and others in its text"):
        PromptBuilder(tokenizer, template=CHATML)([talk], ["row 1"])


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look", "arguments": {"city": "Köln"}}}]}
AS_TEXT = CHATML.replace("{{ c.function | tojson }}", "{{ c.function.name + ' ' + c.function.arguments }}")


@pytest.mark.parametrize("arguments", [{"city": "Köln"}, '{"city": "Köln"}'])
@pytest.mark.parametrize("template", [CHATML, AS_TEXT])
def test_arguments_have_the_form_that_the_template_reads(tokenizer: Any, template: str, arguments: Any) -> None:
    call = {**CALL, "content": "", "tool_calls": [{"function": {"name": "look", "arguments": arguments}}]}
    shown = ChatTemplate(tokenizer, template).prompt([*ASKED, call, *ASKED], "a row")
    assert '{"city": "Köln"}' in shown
    assert "\\" not in shown


def test_a_reply_may_call_tools(tokenizer: Any) -> None:
    chat = ChatTemplate(tokenizer, CHATML)
    reply = chat.reply(ASKED, reply_of(CALL, "a row"))
    assert reply == '<call>{"name": "look", "arguments": {"city": "Köln"}}</call>'


TOOLS = ({"type": "function", "function": {"name": "look"}},)


def test_tools_reach_the_template_or_are_counted(tokenizer: Any) -> None:
    for template, ignored in ((CHATML, 0), (PHI, 1)):
        builder = PromptBuilder(tokenizer, template=template)
        (prompt,) = builder([ASKED], ["row 1"], [TemplateInputs(TOOLS)])
        assert prompt is not None
        assert prompt.text.startswith("<tools>") == (not ignored)
        assert (prompt.tools, builder.num_tools_ignored) == (TOOLS, ignored)


def test_no_prompt_depends_on_the_day(tokenizer: Any) -> None:
    chat = ChatTemplate(tokenizer, LLAMA3)
    assert "Today Date: 26 Jul 2024\n" in chat.prompt(ASKED, "a row")
    assert chat.asks_for_date
    assert not ChatTemplate(tokenizer, CHATML).asks_for_date
    own = ChatTemplate(tokenizer, LLAMA3, variables={"date_string": "1 May 2000"})
    assert "Today Date: 1 May 2000\n" in own.prompt(ASKED, "a row")
    computed = LLAMA3.replace("strftime_now('%d %b %Y')", "strftime_now(form)")
    with pytest.raises(DataError, match="asks for today's date in a computed format"):
        ChatTemplate(tokenizer, computed).prompt(ASKED, "a row")


def test_variables_of_a_row_reach_the_template(tokenizer: Any) -> None:
    builder = PromptBuilder(tokenizer, template=QWEN3)
    (quiet,) = builder([ASKED], ["row 1"], [TemplateInputs(variables={"enable_thinking": False})])
    (loud,) = builder([ASKED], ["row 1"])
    assert quiet is not None
    assert loud is not None
    assert quiet.text == loud.text + "<think>\n\n</think>\n\n"
    assert (quiet.reply_prefix, loud.reply_prefix) == ("", "<think>\n\n</think>\n\n")
    assert builder.response(quiet, "Two.") == "Two."
