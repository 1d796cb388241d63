"""Errors of data name the setting that helps, and a file for evaluation is measured whole."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlgf.config.sections import TaskConfig
from rlgf.data.tokenization import Codec
from rlgf.errors import ConfigError, DataError
from rlgf.pipeline.preflight import check_lengths
from rlgf.pipeline.prepare import with_test_data
from rlgf.pipeline.resolve import TaskPlan
from rlgf.pipeline.stage_cache import no_report
from rlgf.tasks.registry import task_definition

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def plan(data: str, **options: Any) -> TaskPlan:
    config = TaskConfig("prompts", data, max_new_tokens=4, options=options)
    return TaskPlan(config, task_definition(config))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"question": "a", "id": 1},
            "no 'prompt'; the row has id, question: set task.options.prompt_column=question",
        ),
        ({"words": "a"}, "the row has words: set task.options.prompt_column to one of them"),
        ({"prompt": None, "question": "a"}, "'prompt' is null: remove the row, or give it a prompt"),
        ({"chosen": "a", "prompt": "b"}, "name the columns of pairs with task.options.chosen_column"),
    ],
)
def test_a_row_without_a_prompt_is_answered_with_the_setting(row: Any, told: str, tmp_path: Path, pair_tokenizer: Any) -> None:
    data = plan(write(tmp_path / "rows.jsonl", [{"prompt": "x"}, row] if "chosen" not in row else [row] * 9))
    with pytest.raises(DataError) as caught:
        data.definition.build(data.config, pair_tokenizer)
    assert told in str(caught.value)
    assert "line 2" in str(caught.value) or "chosen" in row


def test_a_prompt_that_is_too_long_is_answered_with_the_limit_that_fits(tmp_path: Path, pair_tokenizer: Any) -> None:
    data = plan(write(tmp_path / "rows.jsonl", [{"prompt": f"{n} great plot {'cast ' * 30}"} for n in range(20)]))
    task, codec = data.definition.build(data.config, pair_tokenizer), Codec(pair_tokenizer)
    with pytest.raises(ConfigError, match=r"set task\.options\.prompt_tokens=16, or set a smaller task\.max_new_tokens"):
        check_lengths(codec, 20, task, data)
    fits = plan(data.config.data or "", prompt_tokens=16)
    assert check_lengths(codec, 20, fits.definition.build(fits.config, pair_tokenizer), fits) == 20


def test_the_last_reply_of_messages_is_the_target(tmp_path: Path, pair_tokenizer: Any) -> None:
    turns = [{"role": "user", "content": "great plot?"}, {"role": "assistant", "content": "superb"}]
    rows = [{"messages": [{**turns[0], "content": f"plot {n}?"}, turns[1]], "n": n} for n in range(20)]
    rows.append({"messages": [{"role": "user", "content": "cast?"}], "n": 20})  # nobody has answered it
    data = plan(write(tmp_path / "rows.jsonl", rows), chat_template=TEMPLATE)
    task = data.definition.build(data.config, pair_tokenizer)
    prompts = {prompt.columns["n"]: prompt for prompt in [*task.train, *task.validation, *task.test]}
    assert len(prompts) == 21
    assert prompts[3].text == "<user>plot 3?<assistant>"
    assert prompts[3].sft_targets == ("superb",)
    assert dict(prompts[3].columns) == {"n": 3}
    assert prompts[20].text == "<user>cast?<assistant>"
    assert prompts[20].sft_targets == ()


def test_a_file_for_evaluation_is_measured_whole_and_the_run_keeps_its_own(tmp_path: Path, pair_tokenizer: Any) -> None:
    own = plan(write(tmp_path / "own.jsonl", [{"prompt": f"plot {n}"} for n in range(20)]))
    other = write(tmp_path / "other.jsonl", [{"prompt": f"cast {n}"} for n in range(7)] + [{"prompt": "plot 3"}])
    task = with_test_data(own, other, pair_tokenizer, no_report)
    assert [prompt.text for prompt in task.test] == [*(f"cast {n}" for n in range(7)), "plot 3"]
    assert len(task.train) == 16
    (tmp_path / "own.jsonl").unlink()
    said: list[str] = []
    assert len(with_test_data(own, other, pair_tokenizer, said.append).test) == 8
    assert "no longer there" in said[0]
    one = write(tmp_path / "one.jsonl", [{"prompt": "script"}])
    assert len(with_test_data(own, one, pair_tokenizer, no_report).test) == 1
    generated = TaskConfig("toy_reviews")
    with pytest.raises(ConfigError, match="generates its own data"):
        with_test_data(TaskPlan(generated, task_definition(generated)), other, pair_tokenizer, no_report)
