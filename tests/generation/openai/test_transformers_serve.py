"""A real server as the guide: transformers' own, with a small real model whose tokenizer is not the policy's.

What `transformers serve` 5.23 makes of a request: it samples only where the model's generation config says so, whatever the
temperature, so one is sent along; it takes a seed when a request arrives, not when its text is written, so draws are repeated
only if one request is under way at a time.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from helpers import guide_changes, guide_config, guided_metrics, small_imdb
from rlgf.config.schema import Config
from rlgf.config.sections import GuideConfig
from rlgf.data.files import read_complete_lines
from rlgf.errors import TrainingError
from rlgf.generation.openai.cache import ResponseCache
from rlgf.generation.openai.client import Server, connect
from rlgf.guides.base import CompletionRequest, query_guide
from rlgf.guides.remote import RemoteGuide
from rlgf.pipeline.run import train
from rlgf.types import Prompt

SECONDS_TO_START = 180
SAMPLES = {"generation_config": json.dumps({"do_sample": True})}
# the model brings no chat template
TEMPLATE = {"chat_template_kwargs": {"chat_template": "{% for message in messages %}{{ message.content }}{% endfor %}"}}


class Serve:
    """`transformers serve MODEL` on a port of its own, which stays the same over restarts."""

    def __init__(self, model: Path, log: Path) -> None:
        self.model, self.log = model, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def spec(self) -> str:
        return f"server:{self.model}@http://127.0.0.1:{self.port}/v1"

    def start(self) -> None:
        """Begin to start; `wait` until it serves."""
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(self.model)]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--device", "cpu"]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)

    def wait(self) -> None:
        end = time.monotonic() + SECONDS_TO_START
        while True:
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"transformers serve did not start:\n{self.log.read_text(errors='replace')[-3000:]}")
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (URLError, OSError):
                time.sleep(0.2)

    def kill(self) -> None:
        """With -9, and whatever it has started."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def served(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    server = Serve(shared_data / "stories260k" / "hf", tmp_path_factory.mktemp("serve") / "log.txt")
    server.start()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def remote(spec: str, folder: Path, **options: Any) -> RemoteGuide:
    config = guide_config(spec=spec, **{"concurrency": 1, "retry_seconds": 0.1, "extra_body": SAMPLES, **options})
    cache = ResponseCache(folder / "responses.sqlite")
    return RemoteGuide(connect(spec, config, cache, lambda line: None), config, cache)


def requests(count: int = 3, seed: int = 0) -> list[CompletionRequest]:
    prompt = Prompt("Once upon a time there was a little girl.")
    return [CompletionRequest(prompt, [1], " She liked to", [2], 8, 0, i, seed) for i in range(count)]


class RefusalError(Exception):
    """An exception as the client raises it, with the attributes that are read."""

    def __init__(self, body: Any) -> None:
        super().__init__("Error code: 422")
        self.status_code, self.body = 422, body


def test_the_reason_for_a_refusal_is_shown_wherever_the_server_puts_it() -> None:
    server = Server("server:m@http://127.0.0.1:9/v1", GuideConfig(), "completion")
    told = {"detail": "no field 'n'"}, {"detail": [{"msg": "no field 'n'"}]}, "no", None
    reasons = [str(server._status_failure(RefusalError(body))) for body in told]  # pyright: ignore[reportPrivateUsage]
    assert reasons == ["Error code: 422 - no field 'n'", *["Error code: 422"] * 3]


@pytest.mark.server
@pytest.mark.parametrize("mode", ["auto", "instruction"])
def test_it_answers_in_both_ways_and_honours_the_seed(served: Serve, tmp_path: Path, mode: str) -> None:
    options: dict[str, Any] = {"continuation": mode, "extra_body": SAMPLES | (TEMPLATE if mode == "instruction" else {})}
    guide = remote(served.spec, tmp_path / "one", **options)
    assert guide.server.mode == ("completion" if mode == "auto" else mode)
    texts = query_guide(guide, requests())
    assert all(text.text.strip() and not text.finished for text in texts)  # this model never ends by itself
    assert len({text.text for text in texts}) == 3
    counts = guide.pop_metrics()
    assert counts["guide_succeeded"] == 3
    assert counts["guide_completion_tokens"] == 3 * 12  # 1.5 times the budget
    assert counts["guide_prompt_tokens"] > 3 * 10
    assert query_guide(remote(served.spec, tmp_path / "two", **options), requests()) == texts
    assert query_guide(remote(served.spec, tmp_path / "three", **options), requests(seed=1)) != texts


@pytest.mark.server
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "another"}, "is pinned to"),
        ({"continuation": "continue_final_message"}, "Unexpected fields in the request"),
        ({"extra_body": {"top_k": 5}, "continuation": "completion"}, "'top_k'"),
    ],
)
def test_what_it_refuses_stops_at_once(served: Serve, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    options = {"continuation": "completion", **change}
    model = options.pop("model", served.model)
    guide = remote(f"server:{model}@{served.spec.partition('@')[2]}", tmp_path, **options)
    with pytest.raises(TrainingError, match=words):
        query_guide(guide, requests(1))
    assert guide.state()["attempts"] == 1


# --- training -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stages")


def config(spec: str, reviews: Path, cache: Path, algorithm: str, **guide: Any) -> Config:
    # one request at a time, or seeds mean nothing
    settings = {"spec": spec, "cache": str(cache), "extra_body": SAMPLES, "concurrency": 1, **guide}
    return small_imdb(reviews, ("algorithm.name", algorithm), *guide_changes(**settings))


def comparable(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics without how often had to be asked."""
    return [{name: value for name, value in row.items() if name not in ("guide_attempts", "guide_retried")} for row in rows]


@pytest.mark.server
@pytest.mark.parametrize("algorithm", ["ppo_pp", "aggrevated", "d2lols"])
def test_it_guides_a_run_and_the_run_replays_without_it(
    served: Serve, reviews: Path, stages: Path, tmp_path: Path, algorithm: str
) -> None:
    cache = tmp_path / "responses.sqlite"
    lines: list[str] = []
    train(config(served.spec, reviews, cache, algorithm), tmp_path / "run", stages, lines.append)
    assert not any("no text completion" in line for line in lines)
    metrics = guided_metrics(tmp_path / "run")
    texts = read_complete_lines(tmp_path / "run" / "rollouts.jsonl")
    authors = [[span["origin"] for span in row["spans"]] for row in texts]
    if algorithm != "aggrevated":
        assert any(row[0] == "guide" for row in authors)
    if algorithm != "ppo_pp":
        assert any(row[-1] == "guide" for row in authors)
    assert any(row["guide_completion"] for row in texts)

    nowhere = f"server:{served.model}@http://127.0.0.1:9/v1"
    train(config(nowhere, reviews, cache, algorithm, offline=True), tmp_path / "again", stages)
    assert guided_metrics(tmp_path / "again") == metrics
    assert read_complete_lines(tmp_path / "again" / "rollouts.jsonl") == texts


@pytest.mark.server
def test_killed_and_restarted_during_a_run_it_changes_nothing(
    served: Serve, reviews: Path, stages: Path, tmp_path: Path
) -> None:
    train(config(served.spec, reviews, tmp_path / "whole.sqlite", "ppo_pp"), tmp_path / "whole", stages)
    cache, over = tmp_path / "broken.sqlite", threading.Event()

    def restart() -> None:
        answers = ResponseCache(cache)
        while len(answers) < 8:  # how to ask, two of the probe, and some of the first iteration, each with what it took
            if over.wait(0.005):
                return
        served.kill()
        served.start()

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        patient = config(served.spec, reviews, cache, "ppo_pp", on_failure="wait", retries=0, retry_seconds=0.5)
        train(patient, tmp_path / "broken", stages)
    finally:
        over.set()
        thread.join()
    whole, broken = guided_metrics(tmp_path / "whole"), guided_metrics(tmp_path / "broken")
    assert sum(row["guide_retried"] for row in broken) > 0
    assert comparable(broken) == comparable(whole)
