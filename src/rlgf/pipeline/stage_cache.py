"""The stages on disk: folders named by a fingerprint of all their inputs."""

import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlgf.data.checksums import (
    MANIFEST,
    DamagedError,
    content_identity,
    fingerprint,
    replace_folder,
    set_aside,
    verify_manifest,
    write_manifest,
)
from rlgf.data.files import read_json, require_format, require_valid_path, write_json
from rlgf.data.scratch import scratch_folder, stage_lock
from rlgf.errors import ConfigError
from rlgf.types import FORMAT_VERSION

Report = Callable[[str], None]


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
        require_valid_path(at or self.folder, "--stages" if at is None else "--out")
        return build_at(at or self.folder / f"{name}-{fingerprint(inputs)}", name, inputs, build, self.report)

    def identity(self, path: str) -> Any:
        """Return the identity of a model: the name of a stage here, otherwise its fingerprint."""
        return Path(path).name if Path(path).parent == self.folder else content_identity(path)


def build_at(
    target: Path, name: str, inputs: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]], report: Report
) -> Path:
    """Build or reuse a stage in exactly this folder; wait while another process builds it.

    A damaged stage is renamed and built again. Raises `ConfigError` if the folder holds anything
    else.
    """
    identity = fingerprint(inputs)
    with suppress(DamagedError):  # it is renamed below, by the one process that has the lock
        if _is_there(target, identity):
            report(f"{name}: reusing {target.name}")
            return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with stage_lock(target, report):
        try:
            is_there = _is_there(target, identity)  # another process may have built it
        except DamagedError as error:
            report(f"warning: {target.name} is damaged ({error}): it is {set_aside(target).name} now, and is made again")
            is_there = False
        if is_there:
            report(f"{name}: reusing {target.name}")
            return target
        if target.exists() and any(target.iterdir()):
            raise ConfigError(f"{target} is not empty and holds no '{name}' stage: choose another --out.")
        report(f"{name}: making {target.name}")
        with scratch_folder(target, identity) as scratch:
            _write_stage(scratch, name, inputs, build(scratch))
            if _is_there(target, identity):  # by a machine that does not see the lock
                shutil.rmtree(scratch)
            else:
                replace_folder(target, scratch)
    return target


def _is_there(target: Path, identity: str) -> bool:
    """Return whether a folder holds the stage; raise if it is damaged or another one."""
    if not any((target / file).is_file() for file in (MANIFEST, "stage.json")):
        return False
    verify_manifest(target)
    found = read_json(target / "stage.json")
    require_format(found, target / "stage.json")
    if found.get("fingerprint") != identity:
        raise ConfigError(f"{target} holds a stage made from other settings: choose another --out or remove it.")
    return True


def _write_stage(folder: Path, name: str, inputs: Mapping[str, Any], metrics: Mapping[str, Any]) -> None:
    """Write the record and the manifest of a stage."""
    identity = fingerprint(inputs)
    write_json(
        folder / "stage.json",
        {
            "format_version": FORMAT_VERSION,
            "stage": name,
            "fingerprint": identity,
            "inputs": json.loads(json.dumps(inputs, default=str)),
            "metrics": metrics,
        },
    )
    write_manifest(folder, {"stage": name, "fingerprint": identity})


def no_report(line: str) -> None:
    """Ignore the line."""
