"""The run directory, a stable contract (docs/run-directory.md): config, metrics, rollouts, checkpoints, policy, results."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlgf.config import GUIDE_REACHING, JUDGE_REACHING, Config, dump, flatten, from_dict, read_yaml, to_dict
from rlgf.data import read_json, write_atomically, write_json
from rlgf.errors import UserError
from rlgf.guides.server import without_address
from rlgf.tokens import Codec
from rlgf.types import Origin, Rollout


class RunDirectory:
    """One run on disk. Opening it for a config continues the run it holds, or refuses another's."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        existing = folder / "config.yaml"
        if existing.is_file():
            _refuse_other(folder, from_dict(read_yaml(existing), str(existing)), config)
        elif folder.exists() and (not folder.is_dir() or any(p.name != "stages" for p in folder.iterdir())):
            raise UserError(f"{folder} holds something that is not a run: choose another --out.")

    def create(self, config: Config) -> None:
        """Make the folder and write the complete config."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / "config.yaml", dump(config))
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written ({error.strerror}): choose another --out.") from None

    @property
    def results(self) -> dict[str, Any] | None:
        """The final evaluation, once the run is complete."""
        path = self.folder / "results.json"
        return read_json(path) if path.is_file() else None

    def save_checkpoint(self, iteration: int, state: Mapping[str, Any]) -> None:
        """Keep the state after `iteration` iterations, and only that; the folder appears complete or not at all."""
        parent = self.folder / "checkpoints"
        parent.mkdir(exist_ok=True)
        target = parent / f"iteration-{iteration:06d}"
        scratch = Path(tempfile.mkdtemp(dir=parent, prefix=".writing-"))
        torch.save(dict(state), scratch / "state.pt")
        os.chmod(scratch, 0o755)
        if target.exists():
            shutil.rmtree(target)
        os.rename(scratch, target)
        for old in parent.iterdir():
            if old != target:
                shutil.rmtree(old)

    def load_checkpoint(self) -> tuple[int, dict[str, Any]] | None:
        """The last checkpoint: iterations done and the state; None where there is none. Tensors only, no code is loaded."""
        folders = sorted((self.folder / "checkpoints").glob("iteration-*"))
        if not folders:
            return None
        state: dict[str, Any] = torch.load(folders[-1] / "state.pt", weights_only=True, map_location="cpu")
        return int(folders[-1].name.split("-")[1]), state

    def save_spending(self, state: Mapping[str, Any]) -> None:
        """Keep what the guide was asked and paid so far; written after every iteration and whenever a run ends."""
        write_json(self.folder / "guide.json", state)

    def load_spending(self) -> dict[str, Any]:
        """What was kept of it; empty where there is nothing."""
        path = self.folder / "guide.json"
        return read_json(path) if path.is_file() else {}

    def forget_after(self, iteration: int) -> None:
        """Drop logged lines of iterations that will be run again."""
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            path = self.folder / name
            if path.is_file():
                kept = [row for row in read_complete_lines(path) if row["iteration"] < iteration]
                write_atomically(path, "".join(to_line(row) for row in kept))

    def log(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append objects to a JSON-lines file."""
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.write("".join(to_line(row) for row in rows))

    def outlook(self, config: Config) -> str:
        """What the same command will do with a run that was interrupted."""
        done = sorted((self.folder / "checkpoints").glob("iteration-*"))
        if done:
            reached = f"{int(done[-1].name.split('-')[1])} of {config.ppo.iterations} iterations"
            return f"{self.folder} holds a checkpoint after {reached}: the same command goes on from there."
        return (
            f"there is no checkpoint in {self.folder} yet (runtime.checkpoint_every={config.runtime.checkpoint_every}): the "
            "same command begins the training again, with the stages and the guide's answers that are there."
        )

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write the final evaluation: from now on the run counts as complete."""
        write_json(self.folder / "results.json", json_safe(results))


def to_line(row: Mapping[str, Any]) -> str:
    """An object as a line of JSON; numbers that are not finite become null."""
    return json.dumps(json_safe(row), ensure_ascii=False) + "\n"


def json_safe(value: Any) -> Any:
    """The value with NaN and infinities as None, as strict JSON demands."""
    if isinstance(value, Mapping):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_complete_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that may have been cut off in its last line."""
    rows: list[dict[str, Any]] = []
    # not splitlines(), which also splits at characters that JSON leaves as they are (U+0085, U+2028)
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            if line:
                rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def identity(config: Config) -> dict[str, Any]:
    """What makes a run the run it is: every setting but the machine's, and how a guide and a judge are reached."""
    speakers = {"guide.spec": without_address(config.guide.spec), "judge.spec": without_address(config.judge.spec or "")}
    values = {**flatten(to_dict(config)), **speakers}
    reaching = {*(f"guide.{name}" for name in GUIDE_REACHING), *(f"judge.{name}" for name in JUDGE_REACHING)}
    return {key: value for key, value in values.items() if not key.startswith("runtime.") and key not in reaching}


def _refuse_other(folder: Path, old: Config, new: Config) -> None:
    before, after = identity(old), identity(new)
    missing = object()
    keys = [*after, *(key for key in before if key not in after)]
    differing = [key for key in keys if before.get(key, missing) != after.get(key, missing)]
    if differing:
        key = differing[0]
        raise UserError(
            f"{folder} holds another run ({key} is {before.get(key)!r} there, {after.get(key)!r} here): choose another --out."
        )


def require_writable(folder: Path, option: str = "--out") -> None:
    """Make a folder; raise if it cannot be made, or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another {option}.") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder} cannot be written to: choose another {option}.")


def require_space(folder: Path, needed: int) -> None:
    """Raise if the disk under `folder` has less than `needed` bytes."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"the disk under {folder} has {free / 1e6:,.0f} MB free, and the run needs about {needed / 1e6:,.0f} MB: "
            "make room or choose another --out."
        )


def rollout_rows(rollout: Rollout, scores: Sequence[float], iteration: int, codec: Codec) -> list[dict[str, Any]]:
    """A rollout as JSON objects: the text, in spans by author, its switch point, its score, and what a text guide wrote."""
    rows: list[dict[str, Any]] = []
    for i, prompt in enumerate(rollout.prompts):
        rows.append(
            {
                "iteration": iteration,
                "index": int(rollout.index[i]),
                "phase": int(rollout.phase[i]),
                "prompt": prompt.text,
                "text": rollout.texts[i],
                "spans": spans(rollout, i, codec),
                "switch": int(rollout.switch[i]),
                "finisher": Origin(int(rollout.finisher[i])).name.lower(),
                "finished": bool(rollout.finished[i]),
                "score": scores[i],
                "guide_text": rollout.guide_texts[i] if rollout.guide_texts else None,
            }
        )
    return rows


def spans(rollout: Rollout, row: int, codec: Codec) -> list[dict[str, Any]]:
    """Runs of tokens by one author, in order, with the text each adds."""
    length, start = int(rollout.lengths[row]), int(rollout.prompt_lengths[row])
    ids, origin = rollout.ids[row, :length].tolist(), rollout.origin[row, :length].tolist()
    prompt, found, done = ids[:start], list[dict[str, Any]](), ""
    at = start
    while at < length:
        end = at
        while end < length and origin[end] == origin[at]:
            end += 1
        whole = codec.texts([prompt], [ids[start:end]])[0]
        found.append({"author": Origin(origin[at]).name.lower(), "tokens": end - at, "text": whole[len(done) :]})
        done, at = whole, end
    return found
