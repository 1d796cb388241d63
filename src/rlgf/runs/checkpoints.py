"""Checkpoints: safetensors and JSON, with a manifest that is verified on load."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlgf.data.checksums import DamagedError, replace_folder, set_aside, verify_manifest, write_manifest
from rlgf.data.files import write_json
from rlgf.errors import CheckpointError
from rlgf.types import FORMAT_VERSION

NAME = re.compile(r"iteration-([0-9]{6}|[1-9][0-9]{6,})")  # one name for each number
STATE, TENSORS = "state.json", "tensors.safetensors"
IGNORED = (".", "damaged-")  # begin the names of scratch folders and of damaged checkpoints


class Checkpoints:
    """The newest checkpoints of a run, in folders named by the number of iterations done.

    Args:
        folder: holds the checkpoints alone; other names in it are ignored with a warning.
        keep: the number of checkpoints that are kept.
        run: identifies the run, and is written into every checkpoint.
        accepted: the identities of runs whose checkpoints are loaded.
        warn: called with each warning.
    """

    def __init__(self, folder: Path, keep: int, run: str, accepted: Collection[str], warn: Callable[[str], None]) -> None:
        self.folder, self.keep, self.run, self.accepted, self.warn = folder, keep, run, accepted, warn

    def iterations(self) -> list[int]:
        """Return the numbers of iterations after which there is a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(found[1]) for path in self.folder.iterdir() if (found := NAME.fullmatch(path.name)) and path.is_dir())

    def save(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Write the state after `iteration` iterations, and delete the checkpoints beyond `keep`.

        The write is atomic, and flushed to disk before an earlier checkpoint is deleted.
        """
        self.folder.mkdir(exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=self.folder, prefix=".writing-"))
        try:
            save_state(scratch, state)
            write_manifest(scratch, {"iteration": iteration, "run": self.run})
            replace_folder(self._path(iteration), scratch)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        for old in self.iterations()[: -self.keep]:
            shutil.rmtree(self._path(old))
        for path in self.folder.glob(".writing-*"):  # of processes that were killed
            shutil.rmtree(path, ignore_errors=True)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Load the newest whole checkpoint: the number of iterations done and the state.

        Damaged checkpoints and those of other runs are renamed, with a warning. Returns None if
        there is no checkpoint. Only data is loaded, no code.

        Raises:
            CheckpointError: there are checkpoints, and none can be used.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is not a folder: move it away, and run again.")
        self._warn_of_stray_names()
        bad: list[tuple[Path, str]] = []
        for iteration in reversed(self.iterations()):
            path = self._path(iteration)
            try:
                state = self._load(path, iteration)
            except DamagedError as error:
                bad.append((path, str(error)))
                continue
            for damaged, reason in bad:
                aside = set_aside(damaged)
                self.warn(f"{damaged.name} is not used: {reason}; it is {aside.name} now, and {path.name} is loaded")
            return iteration, state
        if bad:
            raise CheckpointError(
                f"no checkpoint in {self.folder} can be used ({bad[0][1]}): restore one, or remove {self.folder} to begin "
                "again."
            )
        return None

    def _load(self, path: Path, iteration: int) -> dict[str, Any]:
        manifest = verify_manifest(path)
        if manifest.get("format_version") != FORMAT_VERSION:
            raise DamagedError(
                f"{path} has format version {manifest.get('format_version')}, and this rlgf reads version {FORMAT_VERSION}"
            )
        if manifest.get("run") not in self.accepted:
            raise DamagedError(f"{path} belongs to another run")
        if manifest.get("iteration") != iteration:
            raise DamagedError(f"{path} holds the state after {manifest.get('iteration')} iterations")
        return load_state(path)

    def _path(self, iteration: int) -> Path:
        return self.folder / f"iteration-{iteration:06d}"

    def _warn_of_stray_names(self) -> None:
        for path in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            if not path.name.startswith(IGNORED) and not (NAME.fullmatch(path.name) and path.is_dir()):
                self.warn(f"{path} is not a checkpoint: ignored")


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists, numbers, strings and tensors to a folder."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[int, torch.Size, torch.dtype, tuple[int, ...]], str] = {}  # tensors that share their memory

    def encode(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            memory = (value.data_ptr(), value.shape, value.dtype, value.stride())
            name = names.setdefault(memory, place) if value.numel() else place
            if name == place:
                tensors[name] = value.detach().cpu().contiguous()
            return {"$tensor": name}
        if isinstance(value, Mapping):
            items = cast("Mapping[Any, Any]", value).items()
            if all(isinstance(key, str) and not key.startswith("$") for key, _ in items):
                return {key: encode(item, f"{place}.{key}" if place else str(key)) for key, item in items}
            return {"$items": [[key, encode(item, f"{place}.{key}")] for key, item in items]}
        if isinstance(value, list | tuple):
            values = [encode(item, f"{place}.{number}") for number, item in enumerate(cast("list[Any]", value))]
            return {"$tuple": values} if isinstance(value, tuple) else values
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{place} is a {type(value).__name__}, which a checkpoint cannot hold")

    encoded = encode(state, "")
    write_json(folder / STATE, encoded)
    save_file(tensors, folder / TENSORS)


def load_state(folder: Path) -> dict[str, Any]:
    """Load a state that `save_state` wrote; raise `DamagedError` if it cannot be read."""

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(item) for item in cast("list[Any]", value)]
        if not isinstance(value, dict):
            return value
        found = cast("dict[str, Any]", value)
        if "$tensor" in found:
            return tensors[found["$tensor"]]
        if "$items" in found:
            return {key: decode(item) for key, item in found["$items"]}
        if "$tuple" in found:
            return tuple(decode(item) for item in found["$tuple"])
        return {key: decode(item) for key, item in found.items()}

    try:
        tensors = load_file(folder / TENSORS)
        return decode(json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DamagedError(f"{folder} cannot be read ({type(error).__name__})") from None
