"""The lock file and the audit: what is in it, that it agrees with constraints.txt, what is said when nothing can be audited."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "lock").glob("*.txt"))
ENTRY = re.compile(r"([a-z0-9-]+)==(\S+) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)")


@pytest.fixture
def lock(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("lock")


@pytest.fixture
def audit(lock: ModuleType) -> ModuleType:
    return importlib.import_module("audit")


def test_every_line_of_a_lock_file_is_a_version_with_a_hash_or_says_for_what_it_is() -> None:
    assert FILES
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        assert lines[0].startswith(f"# Platform: {path.stem.removesuffix('-build')} ")
        assert lines[1].startswith("# Index: PyPI")
        entries = "".join(match.group(0) for match in ENTRY.finditer(text))
        assert text == "".join(f"{line}\n" for line in lines if line.startswith("#")) + entries
        assert "://" not in text
        assert "\ntorch==" not in text


def test_the_lock_file_has_the_versions_of_the_constraints(lock: ModuleType) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = {lock.normalize(name): version for name, _, version in (line.partition("==") for line in lines) if version}
    for path in FILES:
        if not path.stem.endswith("-build"):
            locked = {match.group(1): match.group(2) for match in ENTRY.finditer(path.read_text(encoding="utf-8"))}
            assert {name: version for name, version in locked.items() if name in tested} == {
                name: tested[name] for name in locked if name in tested
            }
            assert len(locked) > 60
            assert {"transformers", "pydantic", "pytest", "ruff"} <= locked.keys() & tested.keys()


def test_pips_report_becomes_entries_without_the_project_and_torch(lock: ModuleType) -> None:
    def item(name: str, **info: Any) -> dict[str, Any]:
        return {"metadata": {"name": name, "version": "1.0"}, "download_info": info}

    hashed = {"archive_info": {"hashes": {"sha256": "ab" * 32}}}
    report = {"install": [item("rlgf", dir_info={}), item("torch", **hashed), item("Ruamel.YAML_x", **hashed)]}
    assert lock.packages_of(report) == {"ruamel-yaml-x": ("1.0", "ab" * 32)}
    assert lock.entry("ruamel-yaml-x", "1.0", "ab" * 32) == f"ruamel-yaml-x==1.0 \\\n    --hash=sha256:{'ab' * 32}\n"
    assert f"# Platform: {lock.platform_name()} " in lock.header()


def test_a_platform_without_a_lock_file_is_told_so(lock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "platform_name", lambda: "cpython-9.9-abacus")
    with pytest.raises(SystemExit, match=r"no lock file is for cpython-9\.9-abacus \(there is cpython-.*\): `make lock`"):
        lock.install()


def test_packages_are_installed_by_hash_and_torch_by_version(lock: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(lock, "platform_name", lambda: FILES[0].stem.removesuffix("-build"))
    monkeypatch.setattr(lock, "pip", lambda *arguments: commands.append([*arguments]))
    lock.install()
    assert [("--require-hashes" in command, command[-1].endswith("-build.txt")) for command in commands[:2]] == [
        (True, True), (True, False),
    ]  # fmt: skip
    assert commands[2][-1] == f"torch=={lock.torch_version()}"
    assert all("--no-build-isolation" in command for command in (*commands[:2], commands[3]))


def test_what_cannot_be_audited_is_called_so(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(audit, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(audit, "lock_file", lambda: FILES[0])

    def fail(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nConnectionError: no route to https://host/path\n")

    monkeypatch.setattr(audit, "run", fail)
    assert audit.main() == 0
    assert capsys.readouterr().out == "not audited: pip-audit cannot be installed (ConnectionError: no route to)\n"
    answers = iter([subprocess.CompletedProcess([], 0, "", ""), fail([])])
    monkeypatch.setattr(audit, "run", lambda command: next(answers))
    assert audit.main() == 0
    assert capsys.readouterr().out.startswith("not audited: pip-audit cannot reach its service (ConnectionError")


@pytest.mark.parametrize(("ids", "status"), [([], 0), (["CVE-1"], 1)])
def test_findings_are_listed_and_fail(
    audit: ModuleType,
    ids: list[str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(audit, "ENVIRONMENT", tmp_path)
    monkeypatch.setattr(audit, "lock_file", lambda: FILES[0])
    report = {"dependencies": [{"name": "pip", "version": "1", "vulns": [{"id": name} for name in ids]}]}

    def answer(command: list[str]) -> subprocess.CompletedProcess[str]:
        if "pip_audit" not in command:
            return subprocess.CompletedProcess(command, 0, "", "")
        (tmp_path / "report.json").write_text(json.dumps(report))
        return subprocess.CompletedProcess(command, len(ids), "", "")

    monkeypatch.setattr(audit, "run", answer)
    assert audit.main() == status
    out = capsys.readouterr().out
    assert "audited 1 of" in out
    assert ("pip 1: CVE-1" in out) == bool(ids)
    assert f"torch=={importlib.import_module('lock').torch_version()}" in (tmp_path / "requirements.txt").read_text()


def test_a_command_that_takes_too_long_has_failed(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "TIMEOUT", 0.1)
    done = audit.run([sys.executable, "-c", "import time; time.sleep(9)"])
    assert (done.returncode, audit.last_line(done)) == (1, "no answer within 0.1 s")
