"""A profile of one iteration: the longest operations, and a trace."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._C._profiler import _ExperimentalConfig  # pyright: ignore[reportPrivateUsage]
from torch.profiler import ProfilerActivity, profile

from rlgf.data.files import write_file

T = TypeVar("T")
TABLE_ROWS = 40  # rows of the table of operations
NUM_METRICS = 5  # operations in the metrics


def run_with_profiler(step: Callable[[], T], folder: Path) -> tuple[T, dict[str, float]]:
    """Run a step under torch's profiler.

    Returns the step's result, and the fraction of time of each of the longest operations. Writes
    `trace.json` (for chrome://tracing or ui.perfetto.dev) and `operations.txt` to `folder`. Time is
    an operation's self time, on the GPU if there is one. The profiler itself slows the step down.
    """
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True)) as profiler:
        result = step()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    averages: Any = profiler.key_averages()
    write_file(folder / "operations.txt", averages.table(sort_by=key, row_limit=TABLE_ROWS, max_name_column_width=60))
    times = {str(row.key): float(getattr(row, key)) for row in averages}
    total = max(sum(times.values()), 1e-9)
    longest = sorted(times, key=lambda name: -times[name])[:NUM_METRICS]
    return result, {name: times[name] / total for name in longest}
