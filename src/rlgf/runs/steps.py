"""The last step of a supervised stage, kept when a signal stops it."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlgf.data.checksums import DamagedError, replace_folder, verify_manifest, write_manifest
from rlgf.data.scratch import STEP, target_of
from rlgf.errors import Interrupted
from rlgf.runs.checkpoints import load_state, save_state


class StepStore:
    """A context manager that keeps the step of a training in a stage's scratch folder.

    Leaving it by a signal writes the state that the training captures, unless the signal ended a
    step in the middle. Leaving it without an error deletes the state.
    """

    def __init__(self, scratch: Path, report: Callable[[str], None]) -> None:
        self.folder, self.report = scratch / STEP, report
        self.capture: Callable[[], Mapping[str, Any]] | None = None

    def load(self) -> dict[str, Any] | None:
        """Load the state of an interrupted training, or return None."""
        if not self.folder.is_dir():
            return None
        try:
            verify_manifest(self.folder)
            return load_state(self.folder)
        except DamagedError as error:
            self.report(f"warning: the step of an interrupted training is damaged ({error}): it begins again")
            return None

    def __enter__(self) -> Self:
        """Return the store."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Write the captured state after a signal; delete it at the end."""
        if isinstance(error, Interrupted) and not error.lost and self.capture is not None:
            scratch, state = self.folder.with_name(f"{STEP}-writing"), self.capture()
            scratch.mkdir()
            save_state(scratch, state)
            write_manifest(scratch, {})
            replace_folder(self.folder, scratch)
            stage = target_of(self.folder.parent)
            error.message = f"step {state['step']} of the stage {stage} is kept: the same command goes on from there."
        elif error is None:
            shutil.rmtree(self.folder, ignore_errors=True)
