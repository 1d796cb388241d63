"""Bad input of every command is one sentence, and Ctrl-C no error."""

import re
import signal
import sys
from pathlib import Path

import pytest

from rlgf import __main__ as entry
from rlgf.cli import app


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "quickstrat"], "did you mean 'quickstart'"),
        (["train", "quickstart", "--algorithm", "pp"], "did you mean 'ppo'"),
        (["train", "quickstart", "--guide", "refrences"], "did you mean 'references'"),
        (["compare", "quickstart", "--seeds", "0,-1"], "--seeds is '0,-1', but must be whole numbers from 0 to"),
        (["train", "quickstart", "--out", "x" * 300], r"xxx….* cannot be used .*choose another --out"),
        (["train", "quickstart", "--out", "dangling"], "dangling cannot be created .a link to what does not exist"),
        (["train", "quickstart", "ppo.epoch=3"], "did you mean 'ppo.epochs'"),
        (["train", "quickstart", "epochs=3"], "ppo.epochs"),
        (["train", "quickstart", "task.options.slot=3"], "slots"),
        (["train", "quickstart", "task.name=imbd"], "did you mean 'imdb'"),
        (["train", "quickstart", "--beta", "1.5"], r"--beta is 1\.5, but must be at most 1\."),
        (["train", "quickstart", "--algorithm", "lols", "--alpha", "nan"], r"--alpha is nan, but must be a finite number\."),
        (["train", "quickstart", "--algorithm", "d2lols", "--alpha", "0.5"], "whole number"),
        (["train", "quickstart", "--alpha", "0.5"], "lols"),
        (["train", "quickstart", "ppo.epochs=many"], "ppo.epochs"),
        (["train", "quickstart", "ppo"], "section.field=value"),
        (["train", "quickstart", "--guide", "references", "--algorithm", "aggrevated"], "cannot continue a prefix"),
        (["train", "quickstart", "runtime.trackers=[tensorbord]"], "did you mean 'tensorboard'"),
        (["train", "prompts"], "needs data"),
        (["train", "imdb-small"], "data 'stanfordnlp/imdb@e628.* the Hugging Face Hub is unreachable.*: give a Hub name"),
        (["train", "commongen-small"], "data 'allenai/common_gen.* the Hugging Face Hub is unreachable"),
        (["train", "tldr-small"], "data 'CarperAI/openai_summarize_tldr@80e3.* the Hugging Face Hub is unreachable"),
        (["train", "imdb-small", "--data", "nowhere"], "nowhere"),
        (["train", "quickstart", "--policy", "nowhere"], "nowhere"),
        (["train", "missing.yaml"], "missing.yaml"),
        (["train", "quickstart", "--out", "file/run"], r"file/run cannot be created \(Not a directory\): choose another --out"),
        (["train", "quickstart", "--stages", "file/stages"], "file/stages cannot be created .*another --stages"),
        (["compare", "quickstart", "--out", "file/runs"], "file/runs cannot be created .*another --out"),
        (["sft", "quickstart", "--out", "file/sft/model"], "file/sft cannot be created .*another --out"),
        (
            ["evaluate", "quickstart", "--policy", "nowhere", "--json", "file/metrics.json"],
            "file/metrics.json cannot be written",
        ),
        (["compare", "quickstart", "--algorithms", "ppo,lol"], "did you mean 'lols'"),
        (["compare", "quickstart", "--seeds", "0,a"], "whole numbers"),
        (["samples", "nowhere"], "is not a run"),
        (["evaluate", "nowhere"], "neither a run"),
        (["show", "ppo+"], "did you mean 'ppo"),
        (["check", "task", "toy_review"], "did you mean 'toy_reviews'"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("missing/x")
    monkeypatch.setattr("sys.argv", ["rlgf", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert re.search(words, captured.err), captured.err
    assert "Traceback" not in captured.err
    assert not list(tmp_path.glob("runs/*/config.yaml"))


def test_ctrl_c_while_libraries_are_imported_is_no_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    class Impatient:
        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> None:
            if name == "rlgf.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "rlgf.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Impatient, *sys.meta_path])
    with pytest.raises(SystemExit) as stopped:
        entry.main()
    assert stopped.value.code == 130
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("rlgf tr", ["train"]),
        ("rlgf train quick", ["quickstart"]),
        ("rlgf train quickstart --alg", ["--algorithm"]),
        ("rlgf train quickstart --algorithm ppo", ["ppo", "ppo_pp"]),
        ("rlgf check ta", ["task"]),
    ],
)
def test_a_shell_completes_commands_options_and_names(
    typed: str, offered: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_RLGF_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    with pytest.raises(SystemExit) as stopped:
        app.app(args=[], prog_name="rlgf")
    assert not stopped.value.code
    assert capsys.readouterr().out.split() == offered


@pytest.mark.parametrize("number", [*entry.SIGNALS, signal.SIGINT])
def test_a_signal_while_libraries_are_imported_has_a_sentence(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        entry.leave(number, None)
    assert stopped.value.code == 128 + number
    assert capfd.readouterr().err == f"error: interrupted by {signal.Signals(number).name}, before the command began.\n"
