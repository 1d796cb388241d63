"""The run directory, a stable contract (docs/run-directory.md).

It has the config, metrics, rollouts, checkpoints, policy and results.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from rlgf.config.flatten import flatten, to_dict
from rlgf.config.loading import dump, from_dict, read_yaml
from rlgf.config.schema import Config
from rlgf.config.sections import GUIDE_CONNECTION_FIELDS, JUDGE_CONNECTION_FIELDS
from rlgf.data.files import json_safe, read_complete_lines, read_json, require_format, to_line, write_file, write_json
from rlgf.errors import CheckpointError, ConfigError
from rlgf.generation.openai.client import without_address
from rlgf.types import FORMAT_VERSION


class RunDirectory:
    """A run on disk.

    Opening it with a config resumes the run in it, or raises if that is a different run.
    """

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        existing = folder / "config.yaml"
        if existing.is_file():
            if not existing.read_text(encoding="utf-8").startswith("format_version:"):
                raise ConfigError(
                    f"{folder} holds a run of an rlgf before format version {FORMAT_VERSION}: choose another --out."
                )
            _require_same_run(folder, from_dict(read_yaml(existing), str(existing)), config)
        elif folder.exists() and (not folder.is_dir() or any(p.name != "stages" for p in folder.iterdir())):
            raise ConfigError(f"{folder} holds something that is not a run: choose another --out.")

    def create(self, config: Config) -> None:
        """Create the folder and write the complete config."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_file(self.folder / "config.yaml", dump(config))
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be written ({error.strerror}): choose another --out.") from None

    @property
    def results(self) -> dict[str, Any] | None:
        """Return the final evaluation, or None until the run is complete."""
        path = self.folder / "results.json"
        if not path.is_file():
            return None
        found = read_json(path)
        require_format(found, path)
        return found

    def save_checkpoint(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Write the state after `iteration` iterations as the only checkpoint.

        The write is atomic. Earlier checkpoints are deleted.
        """
        parent = self.folder / "checkpoints"
        parent.mkdir(exist_ok=True)
        target = parent / f"iteration-{iteration:06d}"
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=".writing-"))
        torch.save({"format_version": FORMAT_VERSION, **state}, temporary / "state.pt")
        os.chmod(temporary, 0o755)
        if target.exists():
            shutil.rmtree(target)
        os.rename(temporary, target)
        for old in parent.iterdir():
            if old != target:
                shutil.rmtree(old)

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """Load the last checkpoint: the number of iterations done and the state.

        Returns None if there is none. Only tensors are loaded, no code.
        """
        folders = sorted((self.folder / "checkpoints").glob("iteration-*"))
        if not folders:
            return None
        path = folders[-1] / "state.pt"
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises many types for a damaged file
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}): remove {folders[-1]} to begin again, or restore it."
            ) from None
        if state.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {state.get('format_version')}, and this rlgf reads version {FORMAT_VERSION}: "
                "choose another --out, or use the version of rlgf that wrote it."
            )
        return int(folders[-1].name.split("-")[1]), state

    def save_guide_usage(self, state: Mapping[str, Any]) -> None:
        """Write the guide's usage and cost so far.

        This is done after every iteration and whenever a run ends.
        """
        write_json(self.folder / "guide.json", state)

    def load_guide_usage(self) -> dict[str, Any]:
        """Load the saved guide usage, or an empty dict."""
        path = self.folder / "guide.json"
        return read_json(path) if path.is_file() else {}

    def drop_lines_after(self, iteration: int) -> None:
        """Drop logged lines of iterations that will run again, those from `iteration` on."""
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            path = self.folder / name
            if path.is_file():
                kept = [row for row in read_complete_lines(path) if row["iteration"] < iteration]
                write_file(path, "".join(to_line(row) for row in kept))

    def log(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append objects to a JSON Lines file."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write("".join(to_line(row) for row in rows))

    def resume_hint(self, config: Config) -> str:
        """Return how the same command will resume an interrupted run."""
        done = sorted((self.folder / "checkpoints").glob("iteration-*"))
        if done:
            reached = f"{int(done[-1].name.split('-')[1])} of {config.ppo.iterations} iterations"
            return f"{self.folder} holds a checkpoint after {reached}: the same command resumes from there."
        return (
            f"there is no checkpoint in {self.folder} yet (runtime.checkpoint_every={config.runtime.checkpoint_every}): the "
            "same command starts the training again, with the stages and the guide's responses that are there."
        )

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the final evaluation; this marks the run as complete."""
        write_json(self.folder / "results.json", {"format_version": FORMAT_VERSION, **json_safe(results)})


def identifying_settings(config: Config) -> dict[str, Any]:
    """Return the settings that identify a run.

    These are all settings except the machine's and those of connections to a guide or a judge.
    """
    specs = {
        "guide.spec": without_address(config.guide.spec),
        "judge.spec": without_address(config.judge.spec or "", "judge"),
    }
    values = {**flatten(to_dict(config)), **specs}
    reaching = {*(f"guide.{name}" for name in GUIDE_CONNECTION_FIELDS), *(f"judge.{name}" for name in JUDGE_CONNECTION_FIELDS)}
    return {key: value for key, value in values.items() if not key.startswith("runtime.") and key not in reaching}


def _require_same_run(folder: Path, old: Config, new: Config) -> None:
    before, after = identifying_settings(old), identifying_settings(new)
    missing = object()
    keys = [*after, *(key for key in before if key not in after)]
    differing = [key for key in keys if before.get(key, missing) != after.get(key, missing)]
    if differing:
        key = differing[0]
        raise ConfigError(
            f"{folder} holds another run ({key} is {before.get(key)!r} there, {after.get(key)!r} here): choose another --out."
        )


def require_writable(folder: Path, option: str = "--out") -> None:
    """Create a folder; raise if it cannot be created or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be created ({error.strerror}): choose another {option}.") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} cannot be written to: choose another {option}.")


def require_space(folder: Path, needed: int) -> None:
    """Raise if the disk of `folder` has fewer than `needed` bytes free."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"the disk under {folder} has {free / 1e6:,.0f} MB free, and the run needs about {needed / 1e6:,.0f} MB: "
            "free some space or choose another --out."
        )
