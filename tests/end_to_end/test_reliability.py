"""Whole runs that somebody's code, a signal, a flipped bit or a kill gets in the way of."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers import SMALL, small
from rlgf.cli import app
from rlgf.config.loading import dump
from rlgf.config.schema import Config
from rlgf.data.checksums import read_checked_json
from rlgf.data.files import read_complete_lines
from rlgf.errors import ConfigError, TrainingError
from rlgf.pipeline.run import train
from rlgf.runs.directory import IDENTITY

TIMES = ("seconds", "tokens_per_second", "guide_latency")
LOGS = ("metrics.jsonl", "rollouts.jsonl", "evaluation.jsonl")
CHANGES: list[tuple[str, object]] = [("algorithm.name", "ppo_pp"), ("runtime.checkpoint_every", 2), ("reward.normalize", True)]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """A maker of modules of a user, which are forgotten afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made = list[str]()

    def make(name: str, source: str) -> None:
        (tmp_path / f"{name}.py").write_text(source)
        made.append(name)
        for each in made:
            sys.modules.pop(each, None)
        importlib.invalidate_caches()

    yield make
    for name in made:
        sys.modules.pop(name, None)


def timeless(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.startswith(TIMES)} for row in read_complete_lines(path)]


def assert_same_run(run: Path, other: Path) -> None:
    for name in LOGS:
        assert timeless(run / name) == timeless(other / name), name
    name = "policy/model.safetensors"
    assert (run / name).read_bytes() == (other / name).read_bytes()


GUIDE = """
import os, torch

def guide(requests):
    {guide}
    return [" superb acting"] * count
"""
REWARD = """
import os, torch

def reward(prompts, texts):
    values = [float(len(text) + len(prompt.text)) for prompt, text in zip(prompts, texts)]
    {reward}
    return values
"""
QUIET = {"guide": "count = len(requests)", "reward": "pass"}
LOUD = {
    # the guide is called alone; a reward at the same time as the models, whose process it shares
    "guide": "count = len(requests); requests.clear(); {away}; torch.set_default_dtype(torch.float64); "
    "torch.set_num_threads(3)",
    "reward": "prompts.clear(); texts.reverse(); {away}",
    "away": "os.chdir({folder!r}); torch.set_grad_enabled(False); torch.manual_seed(1)",
}  # fmt: skip


@pytest.mark.integration
def test_functions_that_change_what_they_reach_change_nothing_of_a_run(
    tmp_path: Path, module: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, causal_folders: dict[str, Path]
) -> None:
    """All paths of the run are relative, and the functions and the callback move to another folder."""
    home, away = tmp_path / "home", tmp_path / "away"
    home.mkdir()
    away.mkdir()
    shutil.copytree(causal_folders["gpt2"], home / "base")
    monkeypatch.chdir(home)
    Path("rows.jsonl").write_text("".join(json.dumps({"prompt": f"the film {n} is"}) + "\n" for n in range(40)))
    changes = [
        *SMALL[1:], *CHANGES, ("task.name", "prompts"), ("task.options", {}), ("task.data", "rows.jsonl"),
        ("policy", "base"), ("guide.spec", "python:my_guide:guide"), ("reward.path", "python:my_reward:reward"),
    ]  # fmt: skip
    drop = ("model.", "guide.model.", "sft.", "guide.sft.")
    config = small(*[(key, value) for key, value in changes if not key.startswith(drop)])
    moves = LOUD["away"].format(folder=str(away))
    for kind, name in (("quiet", "first"), ("loud", "runs/second")):
        loud = kind == "loud"
        module("my_guide", GUIDE.format(guide=LOUD["guide"].format(away=moves) if loud else QUIET["guide"]))
        module("my_reward", REWARD.format(reward=LOUD["reward"].format(away=moves) if loud else QUIET["reward"]))
        train(
            config, Path(name), Path("stages"), on_progress=(lambda progress: os.chdir(away)) if loud else lambda progress: None
        )
        assert Path.cwd() == home
    assert list(away.iterdir()) == []
    assert_same_run(home / "runs" / "second", home / "first")


@pytest.mark.integration
def test_an_interrupted_run_whose_reward_imports_another_rule_goes_on_by_request_alone(
    tmp_path: Path, module: Callable[[str, str], None], stages: Path
) -> None:
    module("my_rule", "def score(text):\n    return float(len(text))\n")
    module("my_reward", "import my_rule\n\ndef reward(prompts, texts):\n    return [my_rule.score(text) for text in texts]\n")
    config, run = small(*CHANGES, ("reward.path", "python:my_reward:reward"), ("runtime.checkpoint_every", 1)), tmp_path / "run"

    def stop(progress: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, run, stages, on_progress=stop)
    module("my_rule", "def score(text):\n    return -float(len(text))\n")
    with pytest.raises(ConfigError, match=r"holds another run \(the source of reward\.path has changed"):
        train(config, run, stages)
    train(config, run, stages, accept_changes=True)
    history = read_checked_json(run / IDENTITY)["history"]
    assert [entry["after_iterations"] for entry in history] == [0, 1]
    assert "reward.path" in history[1]["changes"][0]


NAN = "def reward(prompts, texts):\n    return [float({value!r}) if len(text) % 2 else 1.0 for text in texts]\n"


@pytest.mark.integration
@pytest.mark.parametrize("value", ["nan", "-inf"])
def test_a_reward_that_is_not_finite_stops_or_is_left_out(
    tmp_path: Path, module: Callable[[str, str], None], stages: Path, value: str
) -> None:
    late = NAN.replace("if len(text) % 2", "if len(text) % 2 and len(texts) > 6")  # not in the probe
    module("my_reward", late.format(value=value))
    changes = [*CHANGES, ("reward.path", "python:my_reward:reward"), ("evaluation.every", 0), ("evaluation.final_prompts", 4)]
    config = small(*changes)
    with pytest.raises(TrainingError, match=r"iteration 0: the .*reward.* is not finite, in the completions ") as stopped:
        train(config, tmp_path / "stopped", stages)
    assert stopped.value.exit_code == 3
    rows = read_complete_lines(tmp_path / "stopped" / "nonfinite.jsonl")
    assert rows
    assert all(len(row["text"]) % 2 for row in rows)
    skipping = small(*changes, ("runtime.on_nonfinite", "skip"), ("runtime.max_skipped", 100))
    trainer = train(skipping, tmp_path / "skipped", stages)
    metrics = read_complete_lines(tmp_path / "skipped" / "metrics.jsonl")
    assert [row["optimizer_steps"] for row in metrics] == [0, 0, 0]
    assert [row["steps_skipped"] for row in metrics] == [trainer.updater.steps_per_iteration] * 3
    assert trainer.shaper.running_stats.count == 0  # nothing of it is left in the scale of rewards


def run_command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["rlgf", *arguments])
    with pytest.raises(SystemExit) as stopped:
        app.main()
    return int(stopped.value.code or 0)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing gets in the way of, with its stages and its config."""
    folder = tmp_path_factory.mktemp("whole")
    config = small(*CHANGES)
    train(config, folder / "run")
    (folder / "config.yaml").write_text(dump(config))
    return folder


def flip_a_bit(file: Path, draws: random.Random) -> None:
    content = bytearray(file.read_bytes())
    bit = draws.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


READ_BY = {  # the files that a command reads
    "evaluate": ("policy/*", "config.yaml", "identity.json"),
    "train": ("checkpoints/*/*", "config.yaml", "identity.json", "metrics.jsonl", "rollouts.jsonl", "stages/*/*"),
}


@pytest.mark.integration
@pytest.mark.parametrize("command", READ_BY)
def test_a_flipped_bit_is_refused_or_made_up_for_by_the_command_line(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    draws = random.Random(command)
    files = sorted({file for pattern in READ_BY[command] for file in (whole / "run").glob(pattern) if file.is_file()})
    for file in draws.sample(files, 8):
        run = tmp_path / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(whole / "run", run)
        name = file.relative_to(whole / "run")
        flip_a_bit(run / name, draws)
        if command == "train":
            (run / "results.json").unlink()
            code = run_command(monkeypatch, "train", str(whole / "config.yaml"), "--out", str(run), "--no-baselines")
        else:
            code = run_command(monkeypatch, "evaluate", str(run))
        told = capsys.readouterr()
        assert "Traceback" not in told.err + told.out, name
        assert code in ((0, 2, 3) if command == "train" else (2, 3)), name
        if code:
            assert "error: " in told.err, name
            continue
        assert "warning: " in told.err, name
        for weights in ("policy/model.safetensors", "best-policy/model.safetensors"):
            assert (run / weights).read_bytes() == (whole / "run" / weights).read_bytes(), name


@pytest.mark.integration
def test_a_policy_without_its_manifest_is_refused_by_the_command_line(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "run", tmp_path / "run")
    (tmp_path / "run" / "policy" / "manifest.json").unlink()
    assert run_command(monkeypatch, "evaluate", str(tmp_path / "run")) in (2, 3)
    told = capsys.readouterr().err.replace("\n", " ")
    assert "manifest.json" in told
    assert "Traceback" not in told


@pytest.mark.integration
def test_a_hangup_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path, whole: Path) -> None:
    """As when the terminal of a real process is closed."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rlgf", "train", str(whole / "config.yaml"), "--out", str(run)]
    command += ["--stages", str(whole / "run" / "stages"), "runtime.threads=1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while not (run / "metrics.jsonl").is_file() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 128 + signal.SIGHUP
        assert process.stderr is not None
        assert "error: interrupted by SIGHUP" in process.stderr.read()
    assert list((run / "checkpoints").iterdir())
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
    assert_same_run(run, whole / "run")


@pytest.mark.integration
@pytest.mark.parametrize("call", range(1, 7))
def test_a_kill_between_a_log_and_the_checkpoint_repeats_and_loses_no_row(tmp_path: Path, whole: Path, call: int) -> None:
    """Each iteration appends its rollouts, then its metrics; every second one writes a checkpoint."""
    run, config = tmp_path / "run", small(*CHANGES)
    process = os.fork()
    if not process:
        _train_and_die_after_append(config, run, whole / "run" / "stages", call)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    train(config, run, whole / "run" / "stages")
    assert_same_run(run, whole / "run")


def _train_and_die_after_append(config: Config, run: Path, stages: Path, call: int) -> None:
    from rlgf.runs import directory

    original, calls = directory.append_rows, list[int]()

    def counted(*arguments: Any) -> None:
        original(*arguments)
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)

    directory.append_rows = counted
    try:
        train(config, run, stages, lambda line: None)
    finally:
        os._exit(70)
