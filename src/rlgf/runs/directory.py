"""The run directory, a stable contract (docs/run-directory.md).

It has the config, metrics, rollouts, checkpoints, policy and results.
"""

import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlgf.config.base import flatten, to_dict
from rlgf.config.loading import dump
from rlgf.config.schema import Config
from rlgf.config.sections import GUIDE_CONNECTION_FIELDS, JUDGE_CONNECTION_FIELDS
from rlgf.data.checksums import (
    DamagedError,
    fingerprint,
    read_checked_json,
    replace_folder,
    write_checked_json,
    write_manifest,
)
from rlgf.data.files import json_safe, require_format, require_valid_path, write_file
from rlgf.data.lock import LOCK, FolderLock
from rlgf.errors import ConfigError, DataError, Interrupted
from rlgf.generation.openai.client import without_address
from rlgf.runs.checkpoints import Checkpoints
from rlgf.runs.identity import IDENTITY, find_differences, find_setting_differences, read_history, with_contents
from rlgf.runs.logs import (
    amend_row,
    append_rows,
    copy_beside,
    drop_lines_after,
    flush_to_disk,
    has_evaluation,
    iteration_of,
    lacks_checkpoint,
    missing_iterations,
    read_rows,
)
from rlgf.types import FORMAT_VERSION
from rlgf.untrusted_text import shorten

BEFORE_CONFIG = ("stages", IDENTITY, LOCK)  # what a folder holds before the run's config is written
METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"
SECONDS = "seconds"  # a number in every line of the metrics


def ignore(line: str) -> None:
    """Ignore the line."""


class RunDirectory:
    """A run on disk.

    Opening it with a config resumes the run in it, or raises if that is a different run.

    Args:
        folder: the folder of the run.
        config: the config of the run.
        accept_changes: go on with another config, data, code or libraries than the run began with;
            the changes are recorded in `identity.json`.
        warn: called with each warning.

    Raises:
        ConfigError: the folder holds something else, or a run with other settings.
        DataError: the run's config or identity is damaged.
    """

    def __init__(
        self, folder: Path, config: Config, accept_changes: bool = False, warn: Callable[[str], None] = ignore
    ) -> None:
        self.folder, self.config, self.accept_changes, self.warn = folder, config, accept_changes, warn
        self.history: list[dict[str, Any]] = []  # the identities that the run had, oldest first
        self.config_checksums: list[str] = []  # of the last config.yaml and of the one before
        self.identity: dict[str, Any] | None = None
        self.lock = FolderLock(folder, "trains", warn)
        self._open()

    def _open(self) -> None:
        """Read the identity of the run in the folder, and compare its settings."""
        require_valid_path(self.folder, "--out")
        folder, config = self.folder, self.config
        existing = folder / "config.yaml"
        for name in ("config.yaml", IDENTITY, "results.json", METRICS, ROLLOUTS, "evaluation.jsonl", "guide.json"):
            if (path := folder / name).is_dir():
                raise ConfigError(f"{path} is a folder, and a run has a file there: move it away, or choose another --out.")
        if existing.is_file():
            if not existing.read_bytes().startswith(b"format_version:"):
                raise ConfigError(
                    f"{folder} holds a run of an rlgf before format version {FORMAT_VERSION}: choose another --out."
                )
            self.history, self.config_checksums = read_history(folder)
            # the content of files, which takes longer, is compared by `check_identity`
            self._require_same(find_setting_differences(self.history[-1]["identity"], identifying_settings(config)))
        elif folder.exists() and (not folder.is_dir() or any(not _precedes_config(path.name) for path in folder.iterdir())):
            raise ConfigError(f"{folder} holds something that is not a run: choose another --out.")

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the run's lock in the block, so that no other process trains it.

        Raises:
            ConfigError: another process trains it, or it cannot have checkpoints.
        """
        with self.lock.held():
            self._open()  # another process may have trained it since
            if self.history and self.identity is not None:
                self._require_same(find_differences(self.history[-1]["identity"], self.identity))
            if self.checkpoints.folder.exists() and not self.checkpoints.folder.is_dir():
                raise ConfigError(f"{self.checkpoints.folder} is not a folder, and checkpoints belong there: move it away.")
            yield

    def check_available(self) -> None:
        """Raise `ConfigError` if the folder is in use or not writable; create nothing."""
        if self.folder.is_dir():
            require_writable(self.folder)
            with self.lock.held():
                return
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(f"{self.folder} cannot be made in {place}: choose another --out.")

    def check_identity(self) -> None:
        """Compare everything that affects the run's numbers with its recorded identity.

        Raises:
            ConfigError: it differs, and changes are not accepted.
        """
        self.identity = with_contents(identifying_settings(self.config))
        if self.history:
            self._require_same(find_differences(self.history[-1]["identity"], self.identity))

    def _require_same(self, differences: Sequence[str]) -> None:
        """Raise unless there are no differences, or they are accepted or a longer run."""
        if not differences or self.accept_changes:
            return
        old, new = self.history[-1]["identity"].get("ppo.iterations"), self.config.ppo.iterations
        longer = [phrase for phrase in differences if not phrase.startswith("ppo.iterations is ")] == []
        if longer and isinstance(old, int) and new > old:
            if self.config.ppo.schedule == "constant":
                return
            raise ConfigError(
                f"{self.folder} cannot be trained from {old} to {new} iterations: with ppo.schedule={self.config.ppo.schedule} "
                "its learning rates depend on the number of iterations; choose another --out, or pass --accept-changes."
            )
        raise ConfigError(
            f"{self.folder} holds another run ({'; '.join(differences[:3])}): choose another --out, go on with the change by "
            "--accept-changes, which is recorded, or begin again with --overwrite."
        )

    @property
    def runs(self) -> list[str]:
        """Return the recorded identities of the run, oldest first."""
        found = [entry["fingerprint"] for entry in self.history]
        return found or [fingerprint(identifying_settings(self.config))]

    def create(self, config: Config) -> None:
        """Create the folder and write the complete config and the run's identity."""
        if self.identity is None:
            self.check_identity()
        assert self.identity is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = dump(config)
            self._record_identity(text)
            write_file(self.folder / "config.yaml", text)
        except OSError as error:
            raise ConfigError(f"{self.folder} cannot be written ({error.strerror}): choose another --out.") from None

    def _record_identity(self, text: str) -> None:
        """Add the present identity to the history if it is new, and write the history."""
        assert self.identity is not None
        own = fingerprint(self.identity)
        if not self.history or self.history[-1]["fingerprint"] != own:
            before = self.history[-1]["identity"] if self.history else {}
            changes = find_differences(before, self.identity) if self.history else []
            done = self.checkpoints.iterations()
            self._set_results_aside(before.get("ppo.iterations"))
            self.history.append(
                {
                    "fingerprint": own,
                    "after_iterations": done[-1] if done else 0,
                    "changes": changes,
                    "identity": self.identity,
                }
            )
        # two, as the config is written after this file
        self.config_checksums = [*self.config_checksums[-1:], hashlib.sha256(text.encode()).hexdigest()]
        write_checked_json(
            self.folder / IDENTITY,
            {"format_version": FORMAT_VERSION, "config_sha256": self.config_checksums, "history": self.history},
        )

    def _set_results_aside(self, iterations: int | None) -> None:
        """Rename the results of a finished run that is now continued.

        The evaluation of its last iteration is dropped unless a longer run would have had it.
        """
        path, every = self.folder / "results.json", self.config.evaluation.every
        if iterations is None or not path.is_file():
            return
        path.rename(self.folder / f"results-after-{iterations}-iterations.json")
        if every and iterations % every:
            self.amend_metrics(iterations - 1, lambda row: {key: row[key] for key in row if key != "evaluation"})

    @property
    def results(self) -> dict[str, Any] | None:
        """Return the final evaluation, or None until the run is complete.

        Results of fewer iterations, or from before an accepted change, do not count.
        """
        path = self.folder / "results.json"
        if not path.is_file() or not self.history:
            return None
        last = self.history[-1]
        changed = self.identity is not None and fingerprint(self.identity) != last["fingerprint"]
        if changed or last["identity"].get("ppo.iterations") != self.config.ppo.iterations:
            return None
        return read_results(path)

    @property
    def checkpoints(self) -> Checkpoints:
        """Return the checkpoints of the run."""
        keep = self.config.runtime.keep_checkpoints
        return Checkpoints(self.folder / "checkpoints", keep, self.runs[-1], self.runs, self.warn)

    def save_checkpoint(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Write the state after `iteration` iterations as the newest checkpoint.

        The logs are flushed to disk before it counts.
        """
        self.lock.check()
        for name in (METRICS, ROLLOUTS):
            flush_to_disk(self.folder / name)
        self.checkpoints.save(iteration, state)

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """Load the newest whole checkpoint: the number of iterations done and the state.

        Returns None if there is none; raises `CheckpointError` if none can be used.
        """
        return self.checkpoints.load()

    def save_model(self, name: str, save: Callable[[Path], None]) -> None:
        """Write a model and its manifest to a folder in the run."""
        self.lock.check()
        for killed in self.folder.glob(f".{name}-*"):  # scratch of a process that was killed
            shutil.rmtree(killed)
        scratch = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{name}-"))
        try:
            save(scratch)
            write_manifest(scratch, {"run": self.runs[-1]})
            replace_folder(self.folder / name, scratch)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise

    def save_guide_usage(self, state: Mapping[str, Any]) -> None:
        """Write the guide's usage and cost so far.

        This is done after every iteration and whenever a run ends.
        """
        self.lock.check()
        write_checked_json(self.folder / "guide.json", state)

    def load_guide_usage(self) -> dict[str, Any]:
        """Load the saved guide usage, or an empty dict."""
        path = self.folder / "guide.json"
        try:
            return read_checked_json(path) if path.is_file() else {}
        except DamagedError as error:
            raise DataError(
                f"{error}: restore it, or remove it to count the guide's usage from 0 again (limits are per run)."
            ) from None

    def drop_lines_after(self, iteration: int) -> None:
        """Drop logged lines of iterations that will run again, those from `iteration` on.

        Damaged lines are kept in other files (`rlgf.runs.logs`), with a warning; so are whole ones
        of iterations that had a checkpoint which is missing now.
        """
        if lacks_checkpoint(self.folder / METRICS, SECONDS, iteration, self.config.runtime.checkpoint_every):
            kept = [copy_beside(self.folder / name).name for name in (METRICS, ROLLOUTS) if (self.folder / name).is_file()]
            self.warn(
                f"{self.checkpoints.folder} has no checkpoint of later iterations that {self.folder / METRICS} has: the run "
                f"goes on after {iteration} iterations, and copies of the logs are in {' and '.join(kept)}"
            )
        for name in (METRICS, ROLLOUTS):
            found = drop_lines_after(self.folder / name, iteration, self.warn, SECONDS if name == METRICS else None)
            if missing := missing_iterations(found, iteration):
                self.warn(
                    f"{self.folder / name} lacks the lines of iterations {missing} (from 0): they were damaged or removed"
                )

    def log(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append objects to a JSON Lines file, each with a checksum."""
        self.lock.check()
        append_rows(self.folder / name, rows)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Load the metrics of all iterations, with a warning of damaged lines."""
        path = self.folder / METRICS
        rows = read_rows(path, self.warn) if path.is_file() else []
        return [row for row in rows if iteration_of(row, SECONDS) is not None]

    def amend_metrics(self, iteration: int, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Replace the logged metrics of an iteration (counted from 0) by `change` of them."""
        if (self.folder / METRICS).is_file():
            amend_row(self.folder / METRICS, iteration, change, self.warn)

    def interruption(self, error: KeyboardInterrupt) -> Interrupted:
        """Build the error of an interrupted run: what is lost, and how to resume."""
        if not isinstance(error, Interrupted):
            error = Interrupted(signal.SIGINT)
        if error.message:  # of a stage
            return error
        saved = self.checkpoints.iterations()
        kept = saved[-1] if saved else 0
        before = max([kept, *(row["iteration"] + 1 for row in self.read_metrics())]) - kept
        lost = [error.lost] * bool(error.lost)
        lost += [f"{before:,} finished iteration{'s' * (before > 1)} before it"] * bool(before)
        message = f"lost: {' and '.join(lost)}; " if lost else ""
        reached = f"{kept} of {self.config.ppo.iterations} iterations"
        message += (
            f"{self.folder} holds a checkpoint after {reached}: the same command resumes from there."
            if saved
            else f"there is no checkpoint in {self.folder} yet: the same command starts the training again, with the stages "
            "and the guide's responses that are there."
        )
        return Interrupted(error.number, message, error.lost)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the final evaluation; this marks the run as complete."""
        self.lock.check()
        write_checked_json(self.folder / "results.json", {"format_version": FORMAT_VERSION, **json_safe(results)})


def _precedes_config(name: str) -> bool:
    """Return whether a file may exist in a run's folder before `config.yaml` does."""
    return name in BEFORE_CONFIG or name.startswith((f".{IDENTITY}.", ".config.yaml."))  # scratch of a killed process


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


def verify_run(folder: Path) -> None:
    """Raise `DataError` if the config of a run is damaged."""
    read_history(folder)


def read_results(path: Path) -> dict[str, Any]:
    """Load the results of a run; raise `DataError` if they are damaged."""
    try:
        found = read_checked_json(path)
    except DamagedError as error:
        raise DataError(f"{error}: restore it, or remove it to evaluate the run again.") from None
    require_format(found, path)
    if not has_evaluation(found):
        raise DataError(f"{path} has no evaluation of numbers: restore it, or remove it to evaluate the run again.")
    return found


def require_writable(folder: Path, option: str = "--out") -> None:
    """Create a folder; raise if it cannot be created or written to."""
    require_valid_path(folder, option)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        cause = "a link to what does not exist" if folder.is_symlink() else error.strerror
        raise ConfigError(f"{shorten(str(folder), 120)} cannot be created ({cause}): choose another {option}.") from None
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{folder} cannot be written to: choose another {option}.")
