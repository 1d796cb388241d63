"""Hostile texts in data: halves of characters, columns with control characters, numbers of thousands of digits."""

import json
from pathlib import Path
from typing import Any

import pytest

from hostile import CONCENTRATE, HOSTILE, is_clean
from rlgf.config.sections import TaskConfig
from rlgf.data.datasets import read_rows
from rlgf.data.files import read_json, read_jsonl
from rlgf.data.tokenization import Codec
from rlgf.errors import INPUT_ERRORS, DataError
from rlgf.tasks.registry import task_definition
from rlgf.types import Prompt


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_halves_of_characters_become_the_replacement_character_everywhere_in_a_row(tmp_path: Path) -> None:
    row = {"a\ud800": ["b\udc00", {"c\udfff": "🎉 \ud83c"}], "n": 1, "whole": "\U0001f389"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    expected = {"a\ufffd": ["b\ufffd", {"c\ufffd": "🎉 \ufffd"}], "n": 1, "whole": "\U0001f389"}
    assert read_jsonl(tmp_path / "rows.jsonl") == [expected]


@pytest.mark.parametrize("kind", ["text", "conversation", "references"])
def test_a_task_is_built_of_hostile_texts(kind: str, tmp_path: Path, word_tokenizer: Any) -> None:
    texts = [text for text in HOSTILE.values() if text.strip()]
    rows: list[dict[str, Any]] = [{"prompt": f"{number} {text}", "completion": text} for number, text in enumerate(texts)]
    if kind == "references":
        rows = [{"prompt": str(number), "references": [text, text]} for number, text in enumerate(texts)]
    options: dict[str, Any] = {}
    if kind == "conversation":
        rows = [
            {"prompt": [{"role": "user", "content": f"{number} {text}"}], "completion": text}
            for number, text in enumerate(texts)
        ]
        options = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    config = TaskConfig("prompts", str(write(tmp_path / "rows.jsonl", rows)), options=options)
    task = task_definition(config).build(config, word_tokenizer)
    found = [*task.train, *task.validation, *task.test]
    assert len(found) == len(texts)
    for prompt in found:
        (prompt.text + "".join(prompt.references)).encode()
        Codec(word_tokenizer).prompt(prompt)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_prompt_of_python_code_is_encoded_whatever_it_holds(text: str, word_tokenizer: Any) -> None:
    assert isinstance(Codec(word_tokenizer).prompt(Prompt(text)), list)


@pytest.mark.parametrize("column", ["prompt", "chosen", "question\x1b[31m\n"])
def test_columns_with_control_characters_are_listed_clean(column: str, tmp_path: Path, word_tokenizer: Any) -> None:
    hostile = dict.fromkeys(HOSTILE.values(), 1)
    rows = [{**hostile, "chosen": "a"} if column == "chosen" else hostile for _ in range(3)]
    path = write(tmp_path / "rows.jsonl", rows)
    config = TaskConfig("prompts", str(path))
    with pytest.raises(INPUT_ERRORS) as caught:
        task_definition(config).build(config, word_tokenizer)
    assert is_clean(str(caught.value))
    with pytest.raises(INPUT_ERRORS, match="there is no column") as caught:
        read_rows(str(path), "train", (f"{column}?",))
    assert is_clean(str(caught.value))
    assert len(str(caught.value)) < 1_000


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"a": ' + "1" * 5_000 + "}", r"line 2: has a number of thousands of digits"),
        ("[" * 100_000, r"line 2: nested too deeply"),
        ('{"a": "\x1b"}', r"line 2: not valid JSON"), ("[1]", r"line 2: expected an object, found list"),
        ("\x1b[31m", "line 2: not valid JSON"),
    ],
)  # fmt: skip
def test_a_line_that_cannot_be_read_is_named(line: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n' + line + "\n")
    with pytest.raises(DataError, match=told) as caught:
        read_jsonl(path)
    assert is_clean(str(caught.value))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": ' + "1" * 5_000 + "}", "\x1b[31m", "\udcff"])
def test_a_json_file_that_cannot_be_read_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_json(path)
    assert is_clean(str(caught.value))


def test_a_folder_with_a_hostile_name_is_named_clean(tmp_path: Path) -> None:
    name = "".join(letter for letter in CONCENTRATE if letter not in "/\0" and not "\ud800" <= letter <= "\udfff")[:80]
    with pytest.raises(INPUT_ERRORS) as caught:
        read_rows(str(tmp_path / name), "train")
    assert is_clean(str(caught.value))
    folder = tmp_path / "\x1b[31m\n\u202e"
    folder.mkdir()
    with pytest.raises(INPUT_ERRORS) as caught:
        read_rows(str(write(folder / "rows.jsonl", [])), "train")
    assert is_clean(str(caught.value))
