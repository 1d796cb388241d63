"""The stages on disk: folders named by a fingerprint of all their inputs."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlgf.data.files import read_json, require_format, write_json
from rlgf.errors import ConfigError
from rlgf.types import FORMAT_VERSION

Report = Callable[[str], None]


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Return a short hash of all inputs of a stage."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()[:12]


def source_fingerprint(source: str | None) -> Any:
    """Return the identity of a data source or model.

    For a local file or folder it is the name and content hash of every file, otherwise the name.
    Files over 256 MB are identified by size and modification time instead of their content.
    """
    path = Path(source).expanduser() if source else None
    if path is None or not path.exists():
        return source
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(file.name, _content_fingerprint(file)) for file in files]


def _content_fingerprint(file: Path) -> str:
    status = file.stat()
    if status.st_size > 2**28:
        return f"{status.st_size} {status.st_mtime_ns}"
    return _content_hash(str(file), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _content_hash(file: str, size: int, time: int) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]


@dataclass(frozen=True)
class StageCache:
    """The folder that holds the stages, and the function that reports their progress."""

    folder: Path
    report: Report

    def build(
        self, name: str, inputs: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]], at: Path | None = None
    ) -> Path:
        """Return the folder of a stage; build it if it is missing.

        Args:
            name: the stage's name.
            inputs: all that its result depends on; their fingerprint names the folder.
            build: writes to a folder and returns metrics.
            at: the exact folder, instead.

        Raises:
            ConfigError: `at` holds anything else.
        """
        return build_at(at or self.folder / f"{name}-{fingerprint(inputs)}", name, inputs, build, self.report)

    def identity(self, path: str) -> Any:
        """Return the identity of a model: the name of a stage here, otherwise its fingerprint."""
        return Path(path).name if Path(path).parent == self.folder else source_fingerprint(path)


def build_at(
    target: Path, name: str, inputs: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]], report: Report
) -> Path:
    """Build or reuse a stage in exactly this folder.

    Raises `ConfigError` if the folder holds anything else.
    """
    identity = fingerprint(inputs)
    record = target / "stage.json"
    if record.is_file():
        found = read_json(record)
        require_format(found, record)
        if found.get("fingerprint") != identity:
            raise ConfigError(f"{target} holds a stage made from other settings: choose another --out or remove it.")
        report(f"{name}: reusing {target.name}")
        return target
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty and holds no '{name}' stage: choose another --out.")
    target.parent.mkdir(parents=True, exist_ok=True)
    report(f"{name}: making {target.name}")
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{name}-"))
    try:
        metrics = build(scratch)
        write_json(
            scratch / "stage.json",
            {
                "format_version": FORMAT_VERSION,
                "stage": name,
                "fingerprint": identity,
                "inputs": json.loads(json.dumps(inputs, default=str)),
                "metrics": metrics,
            },
        )
        if target.exists():
            target.rmdir()
        os.chmod(scratch, 0o755)
        os.rename(scratch, target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return target


def no_report(line: str) -> None:
    """Ignore the line."""
