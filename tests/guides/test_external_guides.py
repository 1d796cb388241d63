"""Whole runs with a guide outside the process: the state after a stop, and resuming."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fault_server
from fault_server import FaultServer
from helpers import guided_metrics
from rlgf.cli.diagnose import check_guide
from rlgf.config.loading import override
from rlgf.config.recipes import imdb_small, quickstart, recipe
from rlgf.config.schema import Config
from rlgf.data.files import read_complete_lines
from rlgf.errors import ConfigError, TrainingError
from rlgf.generation.openai.cache import ResponseCache
from rlgf.models.language_model import LanguageModel
from rlgf.pipeline.final_evaluation import evaluate_baselines
from rlgf.pipeline.prepare import prepare
from rlgf.pipeline.resolve import resolve
from rlgf.pipeline.run import train
from rlgf.pipeline.stage_cache import StageCache
from rlgf.runs.progress import guide_progress
from rlgf.tasks import imdb
from rlgf.trainer import Progress

pytestmark = pytest.mark.server

SMALL = [
    ("task.options", {"slots": 2, "train_prompts": 64, "held_out_prompts": 16}), ("task.max_new_tokens", 5),
    ("task.min_new_tokens", 0), ("model.layers", 1), ("model.width", 16), ("model.heads", 2), ("sft.steps", 3),
    ("sft.batch_size", 8), ("ppo.iterations", 4), ("ppo.completions_per_iteration", 8), ("ppo.minibatch_size", 4),
    ("ppo.epochs", 1),
    ("evaluation.every", 0), ("evaluation.final_prompts", 8), ("runtime.trackers", []), ("guide.endpoint.retry_seconds", 0.0),
    ("algorithm.name", "d2lols"), ("algorithm.options.d2lols.switch_iteration", 2),
]  # fmt: skip


def config(server: FaultServer, *changes: tuple[str, Any]) -> Config:
    return override(quickstart(), [*SMALL, ("guide.spec", f"server:fault-model@{server.url}"), *changes])


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


def kept(tmp_path: Path, name: str = "answers") -> tuple[str, str]:
    return "guide.endpoint.cache", str(tmp_path / f"{name}.sqlite")


def learnt(run: Path) -> list[str]:
    """Return the metrics of a run without those of requests, and its completions."""
    rows = [{k: v for k, v in row.items() if not re.search("^guide_(attempts|succeeded|retried|rows_|prompt|comp)", k)}
            for row in guided_rows(run)]  # fmt: skip
    return [json.dumps(row) for row in [*rows, *read_complete_lines(run / "rollouts.jsonl")]]


def guided_rows(run: Path) -> list[dict[str, Any]]:
    rows = read_complete_lines(run / "metrics.jsonl")
    times = ("seconds", "tokens_per_second", "guide_latency")
    return [{name: value for name, value in row.items() if not name.startswith(times)} for row in rows]


def test_a_key_that_expires_stops_the_run_with_a_checkpoint_and_it_goes_on_with_a_new_one(
    tmp_path: Path, stages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-first-key-123")
    with FaultServer(api_key="sk-first-key-123") as server:
        train(config(server, kept(tmp_path, "whole")), tmp_path / "whole", stages)
    with FaultServer(api_key="sk-first-key-123") as server:
        asked = config(server, kept(tmp_path), ("guide.prefetch", 0))

        def expire(progress: Progress) -> None:
            if progress.iteration == 3:
                server.api_key = "sk-second-key-456"

        with pytest.raises(TrainingError, match=r"rejects requests \(Error code: 401"):
            train(asked, tmp_path / "run", stages, on_progress=expire)
        assert (tmp_path / "run" / "checkpoints" / "iteration-000003").is_dir()
        assert not (tmp_path / "run" / "results.json").exists()
        with pytest.raises(ConfigError, match=r"rejects requests \(Error code: 401"):  # nothing is trained with a wrong key
            train(override(asked, [kept(tmp_path, "none")]), tmp_path / "none", tmp_path / "no-stages")
        assert not list((tmp_path / "no-stages").glob("sft*"))
        monkeypatch.setenv("OPENAI_API_KEY", "sk-second-key-456")
        train(asked, tmp_path / "run", stages)
    assert learnt(tmp_path / "run") == learnt(tmp_path / "whole")
    guided_metrics(tmp_path / "whole")
    written = [path for path in [*tmp_path.rglob("*"), *stages.rglob("*")] if path.is_file()]
    assert len(written) > 20
    assert not [path for path in written if b"sk-" in path.read_bytes()]


def test_a_run_goes_on_at_another_address(tmp_path: Path, stages: Path) -> None:
    with FaultServer() as server:
        first = config(server, kept(tmp_path))
        with pytest.raises(TrainingError, match=r"used up \(12 of guide.endpoint.max_requests=12\)"):
            train(override(first, [("guide.endpoint.max_requests", 12)]), tmp_path / "run", stages)
    with FaultServer() as other:
        train(config(other, kept(tmp_path)), tmp_path / "run", stages)
        with pytest.raises(ConfigError, match="holds another run"):
            train(config(other, kept(tmp_path), ("guide.spec", f"server:other@{other.url}")), tmp_path / "run", stages)
    assert len(read_complete_lines(tmp_path / "run" / "metrics.jsonl")) == 4


def test_runs_that_share_answers_replay_each_as_it_was(tmp_path: Path, stages: Path) -> None:
    """The second finds some of the first's answers, and its replay too; what the first gave up, the second may have got."""

    def flaky(key: str, attempt: int) -> str | None:
        return "503" if attempt == 0 and int(key[:2], 16) % 3 == 0 else None

    changes = [kept(tmp_path), ("guide.endpoint.retries", 0), ("guide.on_failure", "policy"), ("guide.prefetch", 0)]
    with FaultServer(flaky) as server:
        runs = {
            "first": config(server, *changes, ("algorithm.name", "aggrevated")),
            "second": config(server, *changes),
        }
        for name, asked in runs.items():
            train(asked, tmp_path / name, stages)
        counts = {name: guided_rows(tmp_path / name) for name in runs}
        assert sum(row["guide_rows_cached"] for row in counts["second"]) > 0
        assert sum(row["guide_rows_given_up"] for row in counts["first"]) > 0
    for name, asked in runs.items():
        train(override(asked, [("guide.endpoint.offline", True)]), tmp_path / f"{name}-again", stages)
        assert json.dumps(guided_rows(tmp_path / f"{name}-again")) == json.dumps(counts[name])


# --- limits ---------------------------------------------------------------------------------------------------------------


def test_money_counts_over_runs_that_were_killed(tmp_path: Path, stages: Path) -> None:
    """A process that is killed between checkpoints leaves what it has paid behind."""
    prices = [("guide.endpoint.price_input", 1e6), ("guide.endpoint.price_output", 0.0)]
    with FaultServer() as server:
        asked = config(server, kept(tmp_path), *prices, ("guide.prefetch", 0), ("runtime.checkpoint_every", 100))
        changes = [f"{key}={json.dumps(value)}" for key, value in [*SMALL, *prices, kept(tmp_path)]]
        changes += ["guide.prefetch=0", "runtime.checkpoint_every=100", f"guide.spec=server:fault-model@{server.url}"]
        command = [sys.executable, "-m", "rlgf", "train", "quickstart", *changes]
        command += ["--out", str(tmp_path / "run"), "--stages", str(stages)]
        server.delay = 0.05
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            metrics = tmp_path / "run" / "metrics.jsonl"
            while process.poll() is None and not (metrics.is_file() and len(read_complete_lines(metrics)) >= 2):
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            assert process.stderr is not None
            told = process.stderr.read().decode()
        assert metrics.is_file(), told
        assert not (tmp_path / "run" / "checkpoints").exists()
        spent = json.loads((tmp_path / "run" / "guide.json").read_text())
        paid = sum(row["guide_cost"] for row in read_complete_lines(metrics))
        assert spent["cost"] >= paid > 0
        server.delay = 0.0
        with pytest.raises(TrainingError, match=r"guide.endpoint.max_cost"):
            train(override(asked, [("guide.endpoint.max_cost", spent["cost"])]), tmp_path / "run", stages)
        reports: list[Progress] = []
        train(asked, tmp_path / "run", stages, on_progress=reports.append)
    assert reports[-1].guide_usage["cost"] > spent["cost"]
    assert [row["iteration"] for row in guided_rows(tmp_path / "run")] == [0, 1, 2, 3]


def test_limits_count_texts_to_distil_over_runs_that_were_stopped(tmp_path: Path) -> None:
    """The same command asks nothing more until the limit is raised."""
    with FaultServer() as server:
        asked = config(server, kept(tmp_path), ("distill.num_completions", 16), ("distill.steps", 2), ("algorithm.name", "ppo"))
        limited = override(asked, [("guide.endpoint.max_requests", 12)])
        for _ in range(2):
            with pytest.raises(TrainingError, match=r"used up \(12 of guide.endpoint.max_requests=12\)"):
                train(limited, tmp_path / "run", tmp_path / "stages")
            assert server.asked - 1 == 12  # one finds out how it can be asked
        train(override(limited, [("guide.endpoint.max_requests", 100)]), tmp_path / "run", tmp_path / "stages")
        spent = json.loads((tmp_path / "run" / "guide.json").read_text())
        assert spent["begun"] == spent["attempts"] == server.asked - 1 == 2 + 16  # two of the probe


def test_interrupted_it_asks_nothing_more_and_goes_on_later(tmp_path: Path, stages: Path) -> None:
    with FaultServer(delay=0.3) as server:
        changes = [f"{key}={json.dumps(value)}" for key, value in [*SMALL, kept(tmp_path)]]
        changes += ["guide.prefetch=0", "guide.endpoint.concurrency=2", f"guide.spec=server:fault-model@{server.url}"]
        command = [sys.executable, "-m", "rlgf", "train", "quickstart", *changes]
        command += ["--out", str(tmp_path / "run"), "--stages", str(stages)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while process.poll() is None and server.asked < 6:  # four of the probe
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            before = server.asked
            process.wait(20)
            assert process.stderr is not None
            told = process.stderr.read().decode()
        assert process.returncode == 130, told
        assert "waiting for requests in flight, 60 s at most" in told
        assert f"interrupted by SIGINT; {tmp_path / 'run'} holds a checkpoint after 0 of" in told
        assert told.index("waiting for requests in flight") < told.index("interrupted by")
        assert "Traceback" not in told
        assert server.asked <= before + 2
        asked, server.delay = server.asked, 0.0
        again = [kept(tmp_path), ("guide.prefetch", 0), ("guide.endpoint.concurrency", 2)]
        train(config(server, *again), tmp_path / "run", stages)
        with FaultServer() as fresh:
            train(config(fresh, kept(tmp_path, "whole")), tmp_path / "whole", stages)
            assert server.asked == fresh.asked >= asked  # nothing is asked twice
    assert learnt(tmp_path / "run") == learnt(tmp_path / "whole")


# --- secrets --------------------------------------------------------------------------------------------------------------

SECRETS = {
    "OPENAI_API_KEY": "sk-planted-key-0123456789", "PLANTED_HEADER": "Bearer planted/header+1",
    "PLANTED_BODY": "planted-body-2",
    "PLANTED_PATH": "planted-path-3", "PLANTED_JUDGE": "planted-judge-4",
}  # fmt: skip
TRACES = (b"planted-key", b"planted/header", b"planted-body", b"planted-path", b"planted-judge", b"planted%2Fheader")


def test_no_file_and_no_output_of_a_run_holds_a_secret(tmp_path: Path, stages: Path) -> None:
    """Every field that is passed on names a variable; the servers get the values, and echo them when they complain."""
    complains = False

    def complaint(body: dict[str, Any]) -> str | None:
        return f"I do not like {json.dumps([*SECRETS.values(), body])} at /{SECRETS['PLANTED_PATH']}/v1" if complains else None

    prefix = f"/{SECRETS['PLANTED_PATH']}"
    with FaultServer(api_key=SECRETS["OPENAI_API_KEY"], complaint=complaint, prefix=prefix) as server:
        address = f"http://127.0.0.1:{server.port}/$PLANTED_PATH/v1"
        settings: list[tuple[str, Any]] = [
            *SMALL, ("guide.spec", f"server:fault-model@{address}"), ("judge.spec", f"server:fault-model@{address}"),
            ("guide.endpoint.extra_headers", {"X-Proxy": "$PLANTED_HEADER"}), ("judge.endpoint.retry_seconds", 0.0),
            ("guide.endpoint.extra_body", {"list": [{"api_key": "$PLANTED_BODY"}], "user": "${PLANTED_BODY}"}),
            ("judge.endpoint.extra_headers", {"Authorization": "Bearer $OPENAI_API_KEY", "X-Api-Key": "$PLANTED_JUDGE"}),
            ("judge.endpoint.extra_body", {"metadata": {"token": ["$PLANTED_JUDGE"]}}), ("runtime.trackers", ["tensorboard"]),
            ("guide.prefetch", 0), ("evaluation.baselines", []),
        ]  # fmt: skip
        command = [sys.executable, "-m", "rlgf", "train", "quickstart"]
        command += [f"{key}={json.dumps(value)}" for key, value in settings]
        outputs = b""
        for name, fails in (("whole", False), ("refused", True)):
            complains = fails
            ran = subprocess.run(
                [*command, "--out", str(tmp_path / name), "--stages", str(tmp_path / f"stages-{name}")],
                env={**os.environ, **SECRETS}, capture_output=True, check=False,
            )  # fmt: skip
            outputs += ran.stdout + ran.stderr
            assert (ran.returncode == 0) != fails, ran.stderr.decode()
            assert b"Traceback" not in ran.stderr
        assert b"I do not like" in outputs
        bodies = [request["body"] for request in server.requests]
        headers = [request["headers"] for request in server.requests]
    assert any(body.get("list") == [{"api_key": SECRETS["PLANTED_BODY"]}] for body in bodies)
    assert any(body.get("metadata") == {"token": [SECRETS["PLANTED_JUDGE"]]} for body in bodies)
    assert {header.get("x-proxy") for header in headers} == {SECRETS["PLANTED_HEADER"], None}
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    kinds = {path.name if path.suffix != ".0" else "events" for path in files}
    assert {
        "config.yaml",
        "results.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "guide-responses.sqlite",
        "judge-responses.sqlite",
    } <= kinds
    assert b"$PLANTED_BODY" in files[tmp_path / "whole" / "config.yaml"]
    for trace in TRACES:
        assert trace not in outputs
        assert [path for path, content in files.items() if trace in content] == []


# --- people ---------------------------------------------------------------------------------------------------------------


def test_progress_tells_requests_latency_and_cost(tmp_path: Path, stages: Path) -> None:
    lines: list[str] = []
    with FaultServer() as server:
        prices = [("guide.endpoint.price_input", 1.0), ("guide.endpoint.price_output", 2.0), ("ppo.iterations", 1)]
        asked = config(server, kept(tmp_path), *prices)

        def watch(step: Progress) -> None:
            lines.append(guide_progress(step.metrics, step.guide_usage))

        train(asked, tmp_path / "run", stages, on_progress=watch)
        train(asked, tmp_path / "again", stages, on_progress=watch)
    assert re.fullmatch(r" · guide \d requests, 0\.\d\d s each, cost \d\.\d+e?-?\d* so far", lines[0])
    assert re.fullmatch(r" · guide 0 requests, \d completions from the cache, cost 0 so far", lines[1])
    assert guide_progress({"score": 1.0}, {}) == ""


def test_a_guide_that_fails_for_some_texts_can_be_evaluated(tmp_path: Path, stages: Path) -> None:
    with FaultServer(lambda key, attempt: "503" if int(key[:2], 16) % 2 else None) as server:
        asked = config(server, kept(tmp_path), ("guide.on_failure", "policy"), ("guide.endpoint.retries", 0))
        found = evaluate_baselines(prepare(asked, stages), resolve(asked).policy, StageCache(stages, print))
    assert 0 < found["guide"]["evaluation"]["completions"] < 8 == found["sft"]["evaluation"]["completions"]


class Terminal:
    """A run at a terminal of its own, for a person to type into."""

    def __init__(self, command: list[str]) -> None:
        self.process, self.ours = pty.fork()
        if self.process == 0:
            os.execv(command[0], command)  # in the child
        self.shown = ""

    def until(self, words: str) -> None:
        """Read on until these words are shown."""
        end = time.monotonic() + 60
        while words not in self.shown:
            if not select.select([self.ours], [], [], max(0.0, end - time.monotonic()))[0]:
                os.kill(self.process, signal.SIGKILL)
                pytest.fail(f"{words!r} is not shown, but {self.shown!r}")
            self.shown += os.read(self.ours, 4096).decode()
        self.shown = self.shown.partition(words)[2]

    def type(self, line: str) -> None:
        os.write(self.ours, line.encode() + b"\n")

    def interrupt(self) -> int:
        """Press Ctrl-C and wait for the end: once more where nothing comes of it, as a person does.

        `input` of CPython loses one that comes between its last look at signals and its read (3 of 3,000 here).
        """
        for _ in range(4):
            os.kill(self.process, signal.SIGINT)
            if (code := self.ended(15)) is not None:
                return code
        os.kill(self.process, signal.SIGKILL)
        pytest.fail(f"four interrupts did not end it: {self.shown!r}")

    def ended(self, seconds: float) -> int | None:
        """The exit code; none where it has not ended within these seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None


def test_a_person_guides_at_a_terminal_leaves_and_goes_on(tmp_path: Path, stages: Path) -> None:
    small = [("ppo.iterations", 2), ("ppo.completions_per_iteration", 2), ("ppo.minibatch_size", 2), ("algorithm.name",
    "ppo_pp"),
             ("algorithm.options.ppo_pp.beta", 1.0), ("guide.spec", "human")]  # fmt: skip
    of_d2lols = "algorithm.options.d2lols.switch_iteration"  # which PPO++ does not read
    settings = [*((key, value) for key, value in SMALL if key != of_d2lols), *small, kept(tmp_path)]
    changes = [f"{key}={json.dumps(value)}" for key, value in settings]
    command = [sys.executable, "-m", "rlgf", "train", "quickstart", *changes]
    command += ["--out", str(tmp_path / "run"), "--stages", str(stages)]
    terminal = Terminal(command)
    terminal.until("[1/2] review of :")  # the first text of the run: nobody is asked to write for nothing
    terminal.until("> ")
    terminal.type("undo")
    terminal.until("Nothing to undo")
    terminal.type("wrong plot")
    terminal.until("[2/2]")
    terminal.type("undo")
    terminal.until("[1/2]")
    terminal.type("great plot")
    terminal.until("[2/2]")
    terminal.type("skip")
    terminal.until("1/2 iterations")
    terminal.until("[1/2]")
    terminal.type("superb cast superb cast")
    terminal.until("[2/2]")
    terminal.until("> ")
    assert terminal.interrupt() == 130
    terminal = Terminal(command)
    terminal.until("[1/1]")  # three of four were answered
    terminal.type("fine music")
    terminal.until("results.json")
    assert terminal.ended(60) == 0
    texts = [row["guide_completion"] for row in read_complete_lines(tmp_path / "run" / "rollouts.jsonl")]
    assert texts == [" great plot", "", " superb cast superb cast", " fine music"]


def test_a_person_is_not_asked_offline(tmp_path: Path, stages: Path) -> None:
    asked = override(quickstart(), [*SMALL, ("guide.spec", "human"), ("guide.endpoint.offline", True), kept(tmp_path)])
    with pytest.raises(TrainingError, match="completions are not in"):
        train(asked, tmp_path / "run", stages)
    assert len(ResponseCache(tmp_path / "responses.sqlite")) == 0


# --- rlgf check guide -----------------------------------------------------------------------------------------------------


def checked(spec: str, folder: Path, *changes: tuple[str, Any]) -> list[tuple[str, str]]:
    asked = override(imdb_small(), [("guide.spec", spec), ("task.max_new_tokens", 9), ("task.min_new_tokens", 0), *changes])
    return [(found.level, found.text) for found in check_guide(asked, "The film", " was", folder, print)]


def test_a_check_asks_a_server_in_every_way_and_tells_what_it_costs(tmp_path: Path) -> None:
    prices = [("guide.endpoint.price_input", 2.0), ("guide.endpoint.price_output", 8.0)]
    with FaultServer(paths=(fault_server.CHAT,)) as server:
        spec = f"server:m@{server.url}"
        found = checked(spec, tmp_path, *prices)
        texts = [text for _, text in found]
        assert found[0][0] == "warning"
        assert "completion: generates nothing (Error code: 404" in texts[0]
        body = server.requests[1]["body"]  # what cannot begin a text is not asked to finish one
        assert body["messages"][0]["content"] == imdb.INSTRUCTION.replace("{text}", "The film")
        assert body["max_tokens"] == 9
        for mode in ("assistant", "continue_final_message", "prefix", "instruction"):
            said = [text for text in texts if text.startswith(f"guide.continuation={mode}: ")]
            assert re.search(r"starts a completion, \d\.\d\d s: ' \w+", said[0])
            assert re.search(r"continues ' was', \d\.\d\d s: ' \w+", said[1])
            assert said[2].endswith("serves PPO, PPO++, AggreVaTeD, LOLS, D2LOLS, GRPO, RLOO, Guided GRPO")
        bills = re.findall(r"(\w+): billed (\d+) \+ (\d+) tokens: (\d\.\d+) per thousand", " ".join(texts))
        assert [bill[0] for bill in bills] == ["rollins", "rollouts"] * 4
        for _, read, written, price in bills:
            assert float(price) == pytest.approx((int(read) * 2 + int(written) * 8) / 1000, abs=1e-4)
        assert int(bills[1][1]) == int(bills[0][1]) + 1  # the prefix is one word
        assert "not tried" in texts[-1]
        assert any("price unknown" in text for _, text in checked(spec, tmp_path))
        assert checked(spec, tmp_path, ("guide.continuation", "none"))[1][1].endswith(
            "serves PPO, PPO++, GRPO, RLOO, Guided GRPO"
        )
    with FaultServer(api_key="another") as server:
        assert {level for level, _ in checked(f"server:m@{server.url}", tmp_path)} == {"error"}


CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", [True, False])
def test_a_check_sends_a_conversation_of_the_data_as_messages(template: bool, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(CHAT_TEMPLATE)
    with (tmp_path / "chat.jsonl").open("w") as file:
        for number in range(20):
            turns = [("system", "Be kind."), ("user", f"count {number} clouds"), ("assistant", "There are several clouds.")]
            file.write(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n")
    changes = {"task.data": str(tmp_path / "chat.jsonl"), "task.max_new_tokens": 9}
    changes |= {"task.options.chat_template": str(tmp_path / "template.jinja")} if template else {}
    with FaultServer(paths=(fault_server.CHAT,)) as server:
        asked = override(recipe("prompts"), {**changes, "guide.spec": f"server:m@{server.url}"})
        found = check_guide(asked, None, None, tmp_path, print, with_data=True)
        sent = [request["body"]["messages"] for request in server.requests if "messages" in request["body"]]
    assert found[0].text.startswith("asked with the messages [{'role': 'system', 'content': 'Be kind.'}")
    assert [message["role"] for message in sent[0]][:2] == ["system", "user"]
    assert not any("<|" in str(message["content"]) for messages in sent for message in messages)
    assert any(message == {"role": "assistant", "content": "There are"} for messages in sent for message in messages)


def test_a_check_tries_functions_and_models_and_knows_what_others_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new_tiny_model: Callable[..., LanguageModel]
) -> None:
    (tmp_path / "mine_to_check.py").write_text(
        "def whole(requests): return [' and so on'] * len(requests)\n"
        "def begins(requests): return [' and so on'] * len(requests)\n"
        "begins.can_continue = False\n"
        "def bad(requests): return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    found = {name: checked(f"python:mine_to_check:{name}", tmp_path) for name in ("whole", "begins", "bad")}
    called = "called with a list of requests such as prompt.text='The film'"
    said = [called, "starts a completion", called, "continues ' was'", "serves PPO"]
    assert [text.split(",")[0] for _, text in found["whole"]] == said
    said = [called, "starts a completion", "serves PPO"]
    assert [text.split(",")[0] for _, text in found["begins"]] == said
    assert found["begins"][-1][1] == "serves PPO, PPO++, GRPO, RLOO, Guided GRPO"
    assert found["bad"][0][1].startswith(called)
    assert found["bad"][1][0] == "error"
    assert checked("references", tmp_path)[0][1] == "serves PPO, PPO++, GRPO, RLOO, Guided GRPO; it cannot continue a prefix"
    with pytest.raises(ConfigError, match="holds no run"):
        checked("run:nowhere", tmp_path)
    new_tiny_model("llama").save(tmp_path / "model")
    found["model"] = checked(f"model:{tmp_path / 'model'}", tmp_path)
    said = ["a model with a context of 64 tokens", "starts a completion", "continues ' was'", "serves PPO"]
    assert [text.split(",")[0] for _, text in found["model"]] == said
