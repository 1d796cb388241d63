"""Tables in text files: nothing is shifted, re-typed or left out, and faults are named with their line.

Reports: pandas#14124 and #15203 (delimiters at the end), arrow#46853 (leading zeros), datasets#4467 ('null') and #3700
(save_to_disk).
"""

import bz2
import gzip
import lzma
from pathlib import Path
from typing import Any

import pytest

from rlgf.data.datasets import read_file, read_rows, read_splits
from rlgf.data.tables.delimited import read_delimited
from rlgf.data.tables.text import places_of
from rlgf.errors import DataError

TEXTS = ("prompt", "completion")


def cells(text: str, **options: Any) -> list[dict[str, Any]]:
    return list(read_delimited(text, "rows.csv", options.get("delimiter"), options.get("texts", TEXTS)))


def test_a_delimiter_too_many_at_the_end_of_rows_shifts_nothing() -> None:
    assert cells("prompt,completion\na,b,\nc,d,,\n") == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    assert cells("prompt,completion,\na,b,\n") == [{"prompt": "a", "completion": "b"}]
    assert cells("prompt\tcompletion\na\tb\t\n", delimiter="\t") == [{"prompt": "a", "completion": "b"}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,completion\na,b\n0,c,d\n", "line 3: has 3 cells, but the header has 2 columns"),
        ("prompt,completion\na,b\nc\n", "line 3: has 1 cells"),
        ('prompt,completion\n"a\nb",c\nd\n', "line 4: has 1 cells"),  # as an editor counts
        ('prompt,completion\n"a,b\n', "line 2: the quotation marks of a cell do not match"),
        ('prompt,completion\n"a"b,c\n', "line 2: the quotation marks"),
        ("prompt,prompt\na,b\n", "line 1: two columns are named 'prompt'"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_line(text: str, words: str) -> None:
    with pytest.raises(DataError, match=f"rows.csv, {words}"):
        cells(text)


def test_texts_are_never_turned_into_something_else() -> None:
    words = ["NA", "null", "None", "nan", "007", "1e5", "1,5", "True", "", "12345678901234567890", " a "]
    text = "prompt,other\n" + "".join(f'"{word}","{word}"\n' for word in words if word) + '"",x\n'
    found = cells(text)
    assert [row["prompt"] for row in found] == [word for word in words if word] + [""]
    assert [row["other"] for row in found][:-1] == [word for word in words if word]  # one text makes it a column of texts


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("1 -2 30", [1, -2, 30]), ("0.5 1.25 3.0", ["0.5", "1.25", "3.0"]), ("0.50 1.25", [0.5, 1.25]), ("1 0.5", [1.0, 0.5]),
        ("007 1", ["007", "1"]), ("1.10 1.9", ["1.10", "1.9"]), ("True False", [True, False]), ("1 NA", ["1", "NA"]),
        ("1,5 2,5", ["1,5", "2,5"]),
    ],
)  # fmt: skip
def test_a_column_of_numbers_is_one_whose_every_cell_is_a_plain_number(column: str, values: list[Any]) -> None:
    if column == "0.5 1.25 3.0":
        values = [0.5, 1.25, 3.0]  # written as Python writes them
    found = cells("prompt;n\n" + "".join(f"a;{cell}\n" for cell in column.split()))
    assert [row["n"] for row in found] == values


def test_the_header_tells_the_delimiter_and_quoted_line_breaks_stay() -> None:
    assert cells('sep=;\nprompt;completion\n"a;b";1,5\n') == [{"prompt": "a;b", "completion": "1,5"}]
    assert cells('prompt,completion\r\n"a\r\nb","say ""hi"""\r\n\r\n,,\r\nc,d\r\n') == [
        {"prompt": "a\r\nb", "completion": 'say "hi"'}, {"prompt": "c", "completion": "d"}
    ]  # fmt: skip
    rows = read_delimited('prompt,completion\n"a\n\nb",c\nd,e\n', "rows.csv", None, TEXTS)
    assert places_of(rows) == ["line 2", "line 5"]
    long = "x" * 200_000  # over the limit of Python's module
    assert cells(f"prompt,completion\n{long},b\n")[0]["prompt"] == long


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json"])
def test_files_are_utf8_or_what_their_mark_says(tmp_path: Path, name: str, encoding: str) -> None:
    text = "prompt,completion\ngröße,ja\n" if name == "rows.csv" else '{"prompt": "größe", "completion": "ja"}\n'
    (tmp_path / name).write_bytes(text.encode(encoding))
    assert read_file(tmp_path / name, TEXTS) == [{"prompt": "größe", "completion": "ja"}]


def test_another_encoding_is_named_not_guessed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("prompt,completion\na,b\ngröße,ja\n".encode("cp1252"))
    with pytest.raises(
        DataError, match=r"rows\.csv, line 3: cannot be decoded \(byte 0xf6 is not UTF-8\): .*task\.options\.encoding"
    ):
        read_file(path)
    assert read_splits(str(path), None, TEXTS, "cp1252")["train"]()[1]["prompt"] == "größe"
    with pytest.raises(DataError, match="which is no encoding"):
        read_file(path, (), "cp99999")
    path.write_bytes("prompt,completion\na,b\n".encode("utf-16-le"))
    with pytest.raises(DataError, match="holds NUL characters"):
        read_file(path)


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)])
def test_compressed_files_are_read_and_archives_refused(tmp_path: Path, suffix: str, compress: Any) -> None:
    path = tmp_path / f"rows.csv.{suffix}"
    path.write_bytes(compress(b"prompt,completion\na,b\n"))
    assert read_file(path, TEXTS) == [{"prompt": "a", "completion": "b"}]
    path.write_bytes(compress(b"prompt,completion\na,b\n" * 50)[:30])
    with pytest.raises(DataError, match="the compressed content cannot be decoded"):
        read_file(path)
    path.write_bytes(b"PK\x03\x04rest")
    with pytest.raises(DataError, match="a zip archive or a spreadsheet"):
        read_file(path)


@pytest.mark.parametrize(
    "text",
    [
        '[{"prompt": "007", "n": NaN}]', '{"data": [{"prompt": "007", "n": NaN}]}', '{"prompt": ["007"], "n": [NaN]}',
        '{"prompt": {"0": "007"}, "n": {"0": NaN}}', '{"prompt": "007", "n": NaN}', '{"prompt": "007", "n": NaN}\n\n',
    ],
)  # fmt: skip
def test_json_has_several_forms_and_keeps_its_texts(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    (row,) = read_file(tmp_path / "rows.json", ("prompt", "n"))
    assert row == {"prompt": "007", "n": None}  # NaN is how tables write a missing text
    (row,) = read_file(tmp_path / "rows.json", ("prompt",))
    assert row["n"] != row["n"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("rows.json", '[{"a": 1},\n{"a" 2}]', "line 2: not valid JSON"),
        ("rows.json", "[1]", "row 1: expected an object, found int"),
        ("rows.json", '{"train": [{"a": 1}], "test": [{"a": 1}]}', r"holds several lists of rows \(train, test\)"),
        ("rows.json", '{"a": [1, 2], "b": [1]}', "columns of different lengths"),
        ("rows.jsonl", '{"a": 1}\n\n{"a": 1, "a": 2}\n', "line 3: the key 'a' occurs twice"),
    ],
)
def test_json_that_is_no_table_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words):
        read_file(tmp_path / name)


def test_shards_are_one_split_and_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"train-0000{number}-of-00002.csv").write_text(f"prompt\n{number}\n")
    (tmp_path / ".hidden.csv").write_text("")
    (tmp_path / "dataset_infos.json").write_text("{}")
    splits = read_splits(str(tmp_path), None, ("prompt",))
    assert [row["prompt"] for row in splits["train"]()] == ["0", "1"]
    assert list(splits) == ["train"]
    (tmp_path / "dev.csv").write_text("prompt\na\n")
    (tmp_path / "dev.jsonl").write_text('{"prompt": "a"}')
    with pytest.raises(DataError, match="two files for the split 'dev'"):
        read_splits(str(tmp_path))


def test_folders_of_save_to_disk_and_arrow_files_are_read(tmp_path: Path) -> None:
    import datasets
    import pyarrow as pa

    rows = [{"prompt": [{"role": "user", "content": "a", "extra": {"x": "1"}}]}, {"prompt": [{"role": "user", "content": "b"}]}]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict(train=made, test=made).save_to_disk(str(tmp_path / "splits"))
    assert read_rows(str(tmp_path / "saved"), "train", ("prompt",)) == rows
    assert list(read_splits(str(tmp_path / "splits"))) == ["train", "test"]
    with (
        pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file,
        pa.ipc.new_file(file, pa.schema([("prompt", pa.string())])) as out,
    ):
        out.write_table(pa.table({"prompt": ["a", None]}))
    assert read_file(tmp_path / "rows.arrow", ("prompt",)) == [{"prompt": "a"}, {"prompt": None}]
    (tmp_path / "bad.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be loaded"):
        read_file(tmp_path / "bad.arrow")
