"""A profile of one iteration, on demand: what takes the time, and a trace to look into."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch._C._profiler import _ExperimentalConfig  # pyright: ignore[reportPrivateUsage]
from torch.profiler import ProfilerActivity, profile

from rlgf.data import write_atomically

T = TypeVar("T")
SHOWN = 40  # operations in the table
NAMED = 5  # operations in the metrics


def profiled(step: Callable[[], T], folder: Path) -> tuple[T, dict[str, float]]:
    """Do a step under torch's profiler; returns what it returns, and the share of time of the operations that take most.

    Leaves `trace.json` (for chrome://tracing or ui.perfetto.dev) and `operations.txt` in `folder`. Time is an operation's own,
    on the device where there is one; the profiler itself makes the step slower.
    """
    folder.mkdir(parents=True, exist_ok=True)
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True)) as seen:
        result = step()
    seen.export_chrome_trace(str(folder / "trace.json"))
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    averages: Any = seen.key_averages()
    write_atomically(folder / "operations.txt", averages.table(sort_by=key, row_limit=SHOWN, max_name_column_width=60))
    times = {str(row.key): float(getattr(row, key)) for row in averages}
    total = max(sum(times.values()), 1e-9)
    longest = sorted(times, key=lambda name: -times[name])[:NAMED]
    return result, {name: times[name] / total for name in longest}
