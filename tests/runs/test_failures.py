"""Errors of files and memory become one sentence, others stay as they are."""

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from rlgf.data.files import write_json
from rlgf.errors import ConfigError, TrainingError
from rlgf.runs.failures import HINTS, as_sentences


@contextmanager
def limited_files(size: int) -> Iterator[None]:
    """Let the system refuse files that grow beyond a size, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@as_sentences()
def write_with_safetensors(folder: Path) -> None:
    save_file({"weights": torch.zeros(10_000)}, folder / "weights.safetensors")


@as_sentences()
def write_with_torch(folder: Path) -> None:
    torch.save({"weights": torch.zeros(10_000)}, folder / "state.pt")


@as_sentences()
def write_with_tokenizers(folder: Path) -> None:
    Tokenizer(models.WordLevel({f"word{n}": n for n in range(1000)}, unk_token="word0")).save(str(folder / "tokenizer.json"))


@as_sentences()
def write_json_file(folder: Path) -> None:
    write_json(folder / "results.json", list(range(5000)))


@pytest.mark.parametrize("write", [write_with_safetensors, write_with_torch, write_with_tokenizers, write_json_file])
def test_every_writer_that_hits_a_limit_ends_in_one_sentence(tmp_path: Path, write: object) -> None:
    assert callable(write)
    with limited_files(4096), pytest.raises(TrainingError, match=r"^[^\n]* cannot be used \(.*\): .* finished work is kept\.$"):
        write(tmp_path)


@pytest.mark.parametrize("number", HINTS)
def test_an_error_of_the_system_names_the_file_and_how_to_go_on(number: int) -> None:
    error = OSError(number, os.strerror(number), "runs/mine/metrics.jsonl")
    words = re.escape(
        f"runs/mine/metrics.jsonl cannot be used ({os.strerror(number)}): {HINTS[number]}, and run the same command"
    )
    with pytest.raises(TrainingError, match=f"^{words}") as caught, as_sentences():
        raise error
    assert caught.value.__cause__ is error
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 4000 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("unable to mmap 99 bytes from file <model.safetensors>: Cannot allocate memory (12)"),
    ],
)
def test_memory_that_runs_out_is_one_sentence(error: Exception) -> None:
    with pytest.raises(TrainingError, match=r"^memory ran out: .* finished work is kept\.$"), as_sentences():
        raise error


@pytest.mark.parametrize(
    "error",
    [ValueError("a bug"), RuntimeError("shapes differ"), BrokenPipeError(errno.EPIPE, "closed"), ConfigError("a setting")],
)
def test_other_errors_stay_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, as_sentences():
        raise error
    assert caught.value is error
