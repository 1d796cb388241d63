"""`rlgf env` describes the machine and the software, and tells nothing about its user."""

import getpass
import json
import socket
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from rlgf import __version__
from rlgf.cli.app import app
from rlgf.errors import ConfigError
from rlgf.kernels import dispatch
from rlgf.runs import machine
from rlgf.text_metrics import jars


@pytest.fixture(autouse=True)
def without_java(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Starting Java takes a second, and not every machine has it."""
    monkeypatch.setattr(machine.JAVA, "start", lambda: None)
    monkeypatch.setattr(machine.JAVA, "version", "21.0.1")
    yield
    dispatch.select("auto")


def environment() -> dict[str, Any]:
    ran = CliRunner().invoke(app, ["env", "--json", "-"])
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


def test_every_entry_has_a_line() -> None:
    ran = CliRunner().invoke(app, ["env"])
    lines = dict(line.split(maxsplit=1) for line in ran.stdout.splitlines())
    assert lines["rlgf"] == __version__
    assert lines["torch"] == version("torch")  # of the distribution: torch.__version__ may name the build as well
    assert lines["java"] == "21.0.1"
    assert lines["devices"].startswith("cpu (")
    assert "HF_HUB_OFFLINE" in lines["offline"]  # as the tests set it
    assert {"python", "transformers", "datasets", "peft", "rlgf_native", "platform", "processor", "cores", "threads"} < set(
        lines
    )


def test_json_is_printed_or_written(tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["env", "--json", str(tmp_path / "env.json")]).stdout.startswith("rlgf")
    assert json.loads((tmp_path / "env.json").read_text()) == environment()


def test_what_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "OPTIONAL", ("rlgf", "no_such_package"))
    assert environment()["versions"] == {**environment()["versions"], "rlgf": __version__, "no_such_package": None}
    assert "no_such_package not installed" in CliRunner().invoke(app, ["env"]).stdout


def test_offline_flags_are_read_as_the_hub_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "yes")
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "0")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    assert environment()["offline"] == {"HF_HUB_OFFLINE": True, "HF_DATASETS_OFFLINE": False, "TRANSFORMERS_OFFLINE": False}


def test_every_cuda_device_has_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="NVIDIA H200", total_memory=139 * 2**30)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    assert [device["name"] for device in environment()["devices"]] == ["cpu", "cuda:0 NVIDIA H200", "cuda:1 NVIDIA H200"]
    assert environment()["devices"][2]["memory_gib"] == 139.0


def test_the_jars_of_spice_are_found_without_naming_their_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(jars.VARIABLE, raising=False)
    assert environment()["spice_jars"].startswith("not found: run `rlgf download spice`")
    for folder, where in (
        (tmp_path / "mine", "found by RLGF_CORENLP"),
        (jars.cache_folder() / "corenlp", "found in the cache folder"),
    ):
        folder.mkdir(parents=True)
        for jar in jars.JARS:
            (folder / jar.name).touch()
        monkeypatch.setenv(jars.VARIABLE, str(folder))
        assert environment()["spice_jars"] == where


def test_reasons_are_given_without_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ConfigError("Java died while it started; the last it said: /home/alice/jdk/bin/java: no such file")

    monkeypatch.setattr(machine.JAVA, "start", fail)
    monkeypatch.setattr(dispatch, "unavailable_reason", lambda: "~/env/lib/kernels.so cannot be loaded: see https://host/a/b")
    found = environment()
    assert found["java"] == "Java died while it started; the last it said: java: no such file"
    assert found["kernels"] == "torch (kernels.so cannot be loaded: see https://host/a/b)"


def test_nothing_tells_who_ran_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = json.dumps(environment())
    assert not [word for word in (str(Path.home()), socket.gethostname(), "hf_secret") if word in text]
    assert f"/{getpass.getuser()}/" not in text
