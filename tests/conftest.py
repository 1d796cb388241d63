"""Shared fixtures: one thread, no network, tiny language models, and real data."""

import os

# as the command line: threads that wait take no processor from others
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.update(
    HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1", TOKENIZERS_PARALLELISM="false", WANDB_MODE="disabled",
)  # fmt: skip

import functools
import gc
import gzip
import itertools
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

# pytest-xdist's controller reads this file as its workers do, and runs no test: torch, which takes seconds to import, is
# imported by the fixtures that need it.
if TYPE_CHECKING:
    from helpers import FinishedComparison, FinishedRun
    from rlgf.models.language_model import LanguageModel

REPOSITORY = Path(__file__).resolve().parent.parent
LOCAL_HOSTS = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "")

gc.disable()  # until all tests are collected: a third of the time of importing torch and transformers went into it
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in jobs of a script: what the tests start shall be interruptible
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
settings.register_profile("fast", max_examples=40, deadline=None, derandomize=True, database=None)
settings.load_profile("fast")


def pytest_collection_finish() -> None:
    """Collect garbage again, but not among all that was imported."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)  # a tenth of the suite's time went into collecting small garbage
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def set_threads() -> Callable[[int], None]:
    """Numbers and times of tests shall not depend on the cores of the machine."""
    import torch

    torch.set_num_threads(1)
    return torch.set_num_threads


@pytest.fixture(autouse=True)
def one_thread(set_threads: Callable[[int], None]) -> Iterator[None]:
    """The command line takes all cores; the test after it shall not."""
    yield
    set_threads(1)


@pytest.fixture(scope="session", autouse=True)
def built_once() -> Iterator[None]:
    """The command line is built once, not for each test that runs a command."""
    import typer.main

    patch = pytest.MonkeyPatch()
    patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def drawn_report() -> Callable[..., list[str]]:
    """What `rlgf.train` does when it has finished."""
    from rlgf.reports import report

    return report.finish_report


@pytest.fixture(autouse=True)
def quick_report(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rlgf.train` draws no figures, which takes longer than so small a run, but in tests with `drawn_report`."""
    run = sys.modules.get("rlgf.pipeline.run")
    if run is not None and "drawn_report" not in request.fixturenames:
        monkeypatch.setattr(run, "finish_report", lambda folder, results: [])


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Connections that leave this machine are refused, whoever tries."""

    def guarded(original: Callable[..., Any]) -> Callable[..., Any]:
        def connect(self: socket.socket, address: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6) and str(address[0]) not in LOCAL_HOSTS:
                raise ConnectionRefusedError(f"tests may not use the network, but something connects to {address!r}")
            return original(self, address)

        return connect

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded(socket.socket.connect))
    patch.setattr(socket.socket, "connect_ex", guarded(socket.socket.connect_ex))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """The task toy_reviews's tokenizer: 41 words, one token each; pad, bos and eos are the same token."""
    from rlgf.config.sections import TaskConfig
    from rlgf.tasks import toy_reviews

    return toy_reviews.tokenizer(TaskConfig())


@pytest.fixture(scope="session")
def new_tiny_model(word_tokenizer: Any) -> "Callable[..., LanguageModel]":
    """A maker of small random models, `new_tiny_model("llama", seed=3)`: for tests that change what they are given."""
    from rlgf.config.sections import ModelConfig
    from rlgf.models.loading import new_language_model

    def make(architecture: str, seed: int = 0, **shape: Any) -> "LanguageModel":
        values: dict[str, Any] = {"layers": 2, "width": 32, "heads": 2, "max_length": 64, "init_std": 0.3, **shape}
        language_model = new_language_model(ModelConfig(architecture=architecture, **values), word_tokenizer, seed)
        language_model.model.requires_grad_(False).eval()
        return language_model

    return make


@pytest.fixture(scope="session")
def tiny_models(new_tiny_model: "Callable[..., LanguageModel]") -> "dict[str, LanguageModel]":
    """A random model of each architecture, shared by all tests: read, never changed."""
    return {"gpt2": new_tiny_model("gpt2"), "llama": new_tiny_model("llama")}


@pytest.fixture(params=["gpt2", "llama"])
def tiny_model(request: pytest.FixtureRequest, tiny_models: "dict[str, LanguageModel]") -> "LanguageModel":
    """Each of the shared tiny models in turn."""
    return tiny_models[request.param]


@pytest.fixture(scope="session")
def pair_tokenizer() -> Any:
    """A byte-level tokenizer of the words in `helpers.PAIRS`, with learned merges."""
    from helpers import PAIR_WORDS
    from rlgf.pipeline.stages import train_tokenizer

    return train_tokenizer([" ".join(PAIR_WORDS)] * 3, 300)


@pytest.fixture(scope="session")
def causal_folders(pair_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small language model of each architecture in a folder: read, never changed."""
    from rlgf.config.sections import ModelConfig
    from rlgf.models.loading import new_language_model

    folders = {architecture: tmp_path_factory.mktemp(architecture) for architecture in ("gpt2", "llama")}
    for architecture, folder in folders.items():
        shape = ModelConfig(architecture=architecture, layers=2, width=32, heads=4, max_length=48, init_std=0.2)
        new_language_model(shape, pair_tokenizer, 0).save(folder)
    return folders


@pytest.fixture(params=["gpt2", "llama"])
def causal_folder(request: pytest.FixtureRequest, causal_folders: dict[str, Path]) -> Path:
    """Each of those folders in turn."""
    return causal_folders[request.param]


@pytest.fixture(scope="session")
def toy_folder(word_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of the task toy_reviews's words with two end tokens, in a folder: read, never changed."""
    from rlgf.config.sections import ModelConfig
    from rlgf.models.loading import new_language_model

    made = new_language_model(ModelConfig(layers=1, width=16, heads=2, max_length=64), word_tokenizer, 0)
    made.model.generation_config.eos_token_id = [made.eos_token_id, 7]
    folder = tmp_path_factory.mktemp("toy") / "base"
    made.save(folder)
    return folder


@pytest.fixture(scope="session")
def toy_adapter(toy_folder: Path) -> Path:
    """An adapter of another tool on that model: read, never changed."""
    from helpers import save_peft_adapter

    return save_peft_adapter(toy_folder, toy_folder.parent / "peft")


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of another vocabulary in a folder: read, never changed."""
    from rlgf.config.sections import ModelConfig
    from rlgf.models.loading import new_language_model
    from rlgf.pipeline.stages import train_tokenizer

    folder = tmp_path_factory.mktemp("other")
    new_language_model(ModelConfig(layers=1, width=8, heads=1), train_tokenizer(["other words"] * 9, 260), 0).save(folder)
    return folder


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of stages that all tests share: those that one test makes are reused by the next."""
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="session")
def finished_run(stages: Path, tmp_path_factory: pytest.TempPathFactory) -> "Callable[[str], FinishedRun]":
    """A maker of finished runs of `helpers.small`, one for each algorithm: read, never changed."""
    from helpers import train_finished_run

    @functools.cache
    def run(algorithm: str) -> "FinishedRun":
        return train_finished_run(algorithm, tmp_path_factory.mktemp(algorithm) / "run", stages)

    return run


@pytest.fixture(scope="session")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> "FinishedComparison":
    """A finished comparison: read, never changed."""
    from helpers import run_small_comparison

    return run_small_comparison(tmp_path_factory.mktemp("comparison"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data: `data` in the folder that RLGF_SHARED names, by default `shared` beside the repository."""
    folder = Path(os.environ.get("RLGF_SHARED") or REPOSITORY.parent / "shared") / "data"
    if not folder.is_dir():
        reason = f"the real data is not there ({folder}): set RLGF_SHARED to the folder that holds `data`"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def reviews(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few of the real reviews, of both labels."""
    folder = tmp_path_factory.mktemp("reviews")
    for split, step, end in (("train", 250, None), ("test", 250, None), ("unsup", 1, 60)):
        with gzip.open(shared_data / "imdb" / f"{split}.jsonl.gz", "rt") as file:
            (folder / f"{split}.jsonl").write_text("".join(itertools.islice(file, 0, end, step)))
    return folder
