"""A real vLLM as the guide, on CPU, driven by token ids: `make test-vllm` sets up its environment, and RLGF_VLLM is its bin.

It serves a tiny Llama with random weights and a byte-level tokenizer, which the policy, a GPT-2, shares.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from helpers import guide_changes, guide_config, guided_metrics, small_imdb
from rlgf.cli.diagnose import check_guide
from rlgf.config.schema import Config
from rlgf.config.sections import ModelConfig
from rlgf.data.files import read_complete_lines
from rlgf.errors import ConfigError
from rlgf.generation.openai.cache import ResponseCache
from rlgf.generation.openai.token_ids import TokenIdSetup, connect_by_token_ids
from rlgf.guides.base import CompletionRequest, query_guide
from rlgf.guides.remote import RemoteGuide
from rlgf.models.loading import load_tokenizer, new_language_model
from rlgf.pipeline.run import train
from rlgf.pipeline.stages import train_tokenizer
from rlgf.types import Prompt

pytestmark = pytest.mark.vllm

SECONDS_TO_START = 300
CHAT_TEMPLATE = (  # the last message of the assistant is left open where it is to be continued
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)
PROMPT = "The film begins in a quiet town where"


@dataclass
class Served:
    """A running vLLM, the policy that shares its tokenizer, and one that does not."""

    url: str
    guide: Path
    policy: Path
    stranger: Path

    @property
    def spec(self) -> str:
        return f"server:{self.guide}@{self.url}"


@pytest.fixture(scope="module")
def served(reviews: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    binaries = os.environ.get("RLGF_VLLM")
    if not binaries:
        pytest.fail("RLGF_VLLM does not name the bin folder of an environment with vLLM: use `make test-vllm`")
    folder = tmp_path_factory.mktemp("vllm")
    texts = [row["text"] for row in read_complete_lines(reviews / "unsup.jsonl")]
    tokenizer, other = train_tokenizer(texts, 500), train_tokenizer(texts[:20], 400)
    llama = ModelConfig(None, "llama", layers=2, width=128, heads=2, max_length=256, init_std=0.2)
    small = ModelConfig(None, "gpt2", layers=1, width=16, heads=2, max_length=64)
    for name, shape, reads in (("guide", llama, tokenizer), ("policy", small, tokenizer), ("stranger", small, other)):
        new_language_model(shape, reads, seed=5).save(folder / name)
    (folder / "template.jinja").write_text(CHAT_TEMPLATE)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    command = [str(Path(binaries) / "vllm"), "serve", str(folder / "guide"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16"]
    command += ["--chat-template", str(folder / "template.jinja")]
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    log = folder / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env={**os.environ, **quiet}, start_new_session=True
        )
    try:
        _wait(process, port, log)
        yield Served(f"http://127.0.0.1:{port}/v1", folder / "guide", folder / "policy", folder / "stranger")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + SECONDS_TO_START
    while True:
        if process.poll() is not None or time.monotonic() > end:
            pytest.fail(f"vLLM did not start:\n{log.read_text(errors='replace')[-3000:]}")
        try:
            with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)


def remote(served: Served, folder: Path, policy: Path | None = None, longest: int = 64, **options: Any) -> RemoteGuide:
    config = guide_config(spec=served.spec, continuation="token_ids", **options)
    tokenizer, cache = load_tokenizer(str(policy or served.policy)), ResponseCache(folder / "responses.sqlite")
    tokens = TokenIdSetup(tokenizer, (int(tokenizer.eos_token_id),), longest)
    return RemoteGuide(connect_by_token_ids(served.spec, config, tokens, cache, lambda line: None), config, cache)


def requests(guide: Served, count: int, budget: int = 20, minimum: int = 0, prefix: str = "") -> list[CompletionRequest]:
    tokenizer = load_tokenizer(str(guide.policy))
    ids, begun = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (PROMPT, prefix))
    return [CompletionRequest(Prompt(PROMPT), ids, prefix, begun, budget, minimum, index, 0) for index in range(count)]


def test_it_agrees_on_tokens_and_keeps_to_lengths(served: Served, tmp_path: Path) -> None:
    guide = remote(served, tmp_path)
    assert guide.capabilities.exact_length
    texts = query_guide(guide, requests(served, 24, prefix=" nobody"))
    end = int(load_tokenizer(str(served.policy)).eos_token_id)
    for text in texts:
        assert text.ids is not None
        assert (text.ids[-1] == end) == text.finished
        assert len(text.ids) == 20 or text.finished
    assert any(text.finished for text in texts)
    assert {len(text.ids or ()) for text in query_guide(guide, requests(served, 24, 7, 7))} == {7}
    assert not any(end in (text.ids or ()) for text in query_guide(guide, requests(served, 24, 7, 7)))


def test_a_seed_means_the_same_text_whatever_else_is_asked(served: Served, tmp_path: Path) -> None:
    together = query_guide(remote(served, tmp_path / "a", concurrency=16), requests(served, 24))
    alone = query_guide(remote(served, tmp_path / "b", concurrency=1), requests(served, 24)[::-1])[::-1]
    assert together == alone
    assert len({text.ids for text in together}) == 24


def test_other_tokens_and_too_short_a_context_are_refused(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its tokens of .* the policy's"):
        remote(served, tmp_path, served.stranger)
    with pytest.raises(ConfigError, match="has a context of 256 tokens, but a prompt and its completion can have 257"):
        remote(served, tmp_path, longest=257)


def test_a_check_tells_all_its_ways(served: Served, reviews: Path, tmp_path: Path) -> None:
    config = small_imdb(reviews, ("policy", str(served.policy)), ("guide.spec", served.spec))
    findings = check_guide(config, PROMPT, " nobody", tmp_path, lambda line: None)
    for mode in ("completion", "continue_final_message", "instruction", "token_ids"):
        said = [finding.text for finding in findings if finding.text.startswith(f"guide.continuation={mode}: ")]
        assert any("continues ' nobody'" in text for text in said), said
        assert any("serves PPO, PPO++, AggreVaTeD, LOLS, D2LOLS" in text for text in said), said
    assert findings[-1].text == "guide.continuation=token_ids: respects min_tokens"


# --- training -----------------------------------------------------------------------------------------------------------


def config(served: Served, reviews: Path, cache: Path, algorithm: str, minimum: int, **guide: Any) -> Config:
    settings = {"spec": served.spec, "continuation": "token_ids", "cache": str(cache), **guide}
    changes = [("algorithm.name", algorithm), ("policy", str(served.policy)), ("task.min_new_tokens", minimum)]
    return small_imdb(reviews, *changes, *guide_changes(**settings))


@pytest.mark.parametrize(("algorithm", "minimum"), [("ppo_pp", 10), ("ppo_pp", 0), ("aggrevated", 0), ("d2lols", 10)])
def test_it_guides_a_run_and_the_run_replays_without_it(
    served: Served, reviews: Path, tmp_path: Path, algorithm: str, minimum: int
) -> None:
    cache, stages = tmp_path / "responses.sqlite", tmp_path / "stages"
    train(config(served, reviews, cache, algorithm, minimum), tmp_path / "run", stages)
    metrics, texts = guided_metrics(tmp_path / "run"), read_complete_lines(tmp_path / "run" / "rollouts.jsonl")
    authors = [[span["origin"] for span in row["spans"]] for row in texts]
    assert algorithm == "aggrevated" or any(row[0] == "guide" for row in authors)
    assert algorithm == "ppo_pp" or any(row[-1] == "guide" for row in authors)
    assert all(row["guide_completion"] is None for row in texts)  # it speaks the policy's tokens
    assert sum(row["guide_completions_truncated"] for row in metrics) == 0
    if algorithm == "ppo_pp" and minimum:  # only what stands before the switch was written
        counts = {name: sum(row[name] for row in metrics) for name in metrics[0] if name.endswith("_tokens")}
        assert counts["guide_completion_tokens"] == counts["guide_tokens"] + counts["discarded_tokens"]
        assert counts["discarded_tokens"] == 0
    assert sum(row["switches_moved"] for row in metrics) == 0  # token ids may end inside a character
    nowhere = Served("http://127.0.0.1:9/v1", served.guide, served.policy, served.stranger)
    train(config(nowhere, reviews, cache, algorithm, minimum, offline=True), tmp_path / "again", stages)
    assert guided_metrics(tmp_path / "again") == metrics
    assert read_complete_lines(tmp_path / "again" / "rollouts.jsonl") == texts
