"""The device of a run: chosen, named, or refused in one sentence."""

import pytest
import torch

from helpers import small
from rlgf.errors import ConfigError
from rlgf.pipeline.resolve import resolve
from rlgf.runs.machine import choose_device, describe_machine, describe_runtime


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch find two GPUs, which nothing is computed on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA H200 {device}")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch find no accelerator."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.usefixtures("two_gpus")
def test_the_gpu_is_the_default_where_there_is_one() -> None:
    assert choose_device() == "cuda"
    assert choose_device("cpu") == "cpu"
    assert choose_device("cuda:1") == "cuda:1"
    config = small()
    assert config.runtime.device == "auto"
    run = resolve(config)
    assert run.trainer.runtime.device == run.policy.machine.device == run.reward.device == "cuda"
    assert run.config.runtime.device == "auto"  # what is written to the run's folder: it may go on elsewhere
    assert describe_machine("cuda:1")["device"] == "NVIDIA H200 cuda:1"
    assert describe_runtime("cuda", "bf16").startswith("cuda (NVIDIA H200 cuda), bf16, ")


@pytest.mark.usefixtures("no_gpu")
def test_without_one_it_is_the_processor() -> None:
    assert choose_device() == resolve(small()).trainer.runtime.device == "cpu"
    torch.set_num_threads(1)
    assert describe_runtime("auto", "fp32") == "cpu, fp32, 1 thread"


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("name", ["cuda", "cuda:7", "mps", "xpu", "meta", "privateuseone:3"])
def test_a_device_that_is_not_there_is_one_sentence(name: str) -> None:
    for call in (lambda: choose_device(name), lambda: resolve(small(("runtime.device", name)))):
        with pytest.raises(ConfigError, match=rf"device is '{name}', and torch .* finds no such device.*choose from cpu,"):
            call()
    with pytest.raises(ConfigError, match="choose auto, cpu, cuda or cuda:0"):
        choose_device("gpu")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_too_many_is_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="choose from cpu, cuda:0, cuda:1"):
        choose_device("cuda:7")
