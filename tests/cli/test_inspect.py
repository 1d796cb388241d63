"""`rlgf samples`: completions by origin."""

from pathlib import Path

import pytest

from rlgf.cli import app
from rlgf.data.files import to_line


def test_texts_are_shown_by_author_without_colour_and_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    spans = [
        {"origin": "guide", "tokens": 1, "text": " great"},
        {"origin": "policy", "tokens": 2, "text": " \x1b[31mplot[bold]"},
    ]
    row = {
        "iteration": 0,
        "index": 3,
        "prompt": "review",
        "spans": spans,
        "switch_position": 1,
        "ended_with_eos": True,
        "score": 1.0,
    }
    (tmp_path / "rollouts.jsonl").write_text(to_line(row))
    monkeypatch.setattr("sys.argv", ["rlgf", "samples", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "review [guide: great] [policy: \\x1b[31mplot[bold]] ■" in shown
    assert "\x1b" not in shown
