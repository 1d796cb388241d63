"""JSON lines: written and read back."""

from pathlib import Path

from rlgf.data.files import read_complete_lines, to_line


def test_logged_texts_with_every_kind_of_line_end_are_read_back(tmp_path: Path):
    rows = [{"iteration": number, "text": "a\x85b\u2028c\u2029d\re\nf\x0cg"} for number in range(3)]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(map(to_line, rows)) + '{"iteration": 3, "te', encoding="utf-8", newline="")
    assert read_complete_lines(path) == rows
