"""The machine and the software versions of a result."""

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rlgf.errors import ConfigError
from rlgf.kernels import dispatch
from rlgf.text_metrics import jars
from rlgf.text_metrics.java import JAVA
from rlgf.untrusted_text import shorten

OPTIONAL = ("datasets", "peft", "bitsandbytes", "openai", "rlgf_native")
THREADS_VARIABLE = "OMP_NUM_THREADS"
MAX_THREADS = 1024  # as of runtime.threads
AUTO = "auto"  # the value of runtime.device that chooses
OFFLINE_FLAGS = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
FOLDERS = re.compile(r"(?<![\w:/])~?/(?:[^\s/'\"]+/)+")  # of an absolute path: a user's name may be in it


def describe_machine(device: str = AUTO) -> dict[str, Any]:
    """Return a description of the machine, the device in use and the software versions."""
    return {
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": _device_name(choose_device(device)),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": dispatch.describe(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("rlgf", "torch", "transformers")},
    }


def choose_num_threads(configured: int = 0) -> tuple[int, str]:
    """Return the number of threads of a process on a CPU, and the reason.

    It is `configured` (runtime.threads), else OMP_NUM_THREADS, else the number of cores.

    Raises:
        ConfigError: OMP_NUM_THREADS is not a whole number from 1 to 1,024.
    """
    if configured:
        return configured, "runtime.threads"
    if requested := os.environ.get(THREADS_VARIABLE, "").strip():
        outermost = requested.split(",")[0].strip()  # the others are of nested regions
        if not outermost.isascii() or not outermost.isdigit() or not 1 <= int(outermost[:20]) <= MAX_THREADS:
            raise ConfigError(
                f"{THREADS_VARIABLE} is {requested[:40]!r}, but must be a whole number from 1 to {MAX_THREADS:,}: fix or "
                "unset it."
            )
        return int(outermost), THREADS_VARIABLE
    return len(os.sched_getaffinity(0)), "all cores"


def choose_device(configured: str = AUTO) -> str:
    """Return the device of a run: `configured` (runtime.device), otherwise a GPU if available.

    Only CUDA and ROCm are chosen; other accelerators, which were not tried, are used if named.

    Raises:
        ConfigError: torch has no such device here.
    """
    if configured == AUTO:
        return "cuda" if torch.cuda.is_available() else "cpu"
    shown = shorten(configured, 40)
    try:
        device = torch.device(configured)
    except RuntimeError:
        raise ConfigError(f"runtime.device is '{shown}': choose auto, cpu, cuda or cuda:0.") from None
    if device.type != "cpu" and (device.index or 0) >= _count_devices(device.type):
        known = ", ".join(["cpu", *(f"cuda:{number}" for number in range(_count_devices("cuda")))])
        raise ConfigError(
            f"runtime.device is '{shown}', and torch {torch.__version__} finds no such device on this machine: choose from "
            f"{known}, or leave runtime.device out."
        )
    return configured


def _count_devices(kind: str) -> int:
    """Return the number of devices of a kind that torch finds."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module: Any = getattr(torch, kind, None)
    return int(module.device_count()) if hasattr(module, "device_count") and module.is_available() else 0


def _device_name(device: str) -> str:
    """Return the product name of a GPU, or the device itself."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def describe_runtime(device: str, precision: str) -> str:
    """Return the device, precision and number of threads of this process in words."""
    chosen = choose_device(device)
    name = chosen if chosen == _device_name(chosen) else f"{chosen} ({_device_name(chosen)})"
    return f"{name}, {precision}, {describe_threads(torch.get_num_threads())}"


def describe_threads(number: int) -> str:
    """Describe the number of threads, and whether waiting threads sleep."""
    sleeping = number > 1 and os.environ.get("OMP_WAIT_POLICY", "").strip().upper() == "PASSIVE"
    return f"{number} thread{'s' * (number > 1)}{', which sleep while they wait' * sleeping}"


def describe_environment() -> dict[str, Any]:
    """Return the machine, versions, devices, kernels and Java, for a bug report.

    Neither secrets nor names of users, hosts and folders are in it. `memory_gib` is in units of
    2**30 bytes; a version is None if the package is not installed.
    """
    machine = describe_machine()
    return {
        "versions": {
            **{name: machine[name] for name in ("rlgf", "python", "torch", "transformers")},
            **{name: _version(name) for name in OPTIONAL},
            "cuda": torch.version.cuda,
        },
        "platform": f"{platform.system()} {platform.release()}",
        "processor": f"{_processor_name()} ({machine['processor']}, {machine['cpu_capability']})",
        "cores": len(os.sched_getaffinity(0)),
        "threads": machine["threads"],
        "devices": _devices(),
        "kernels": _without_folders(machine["kernels"]),
        "java": _without_folders(_java()),
        "spice_jars": _spice_jars(),
        "offline": {name: os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in OFFLINE_FLAGS},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor_name() -> str:
    """Return the processor's name, or 'unknown'."""
    try:
        found = re.search(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or "unknown"


def _devices() -> list[dict[str, Any]]:
    """Return the name and the memory of the CPU and of every CUDA device."""
    memory = {"cpu": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory[f"cuda:{number} {properties.name}"] = properties.total_memory
    return [{"name": name, "memory_gib": round(size / 2**30, 1)} for name, size in memory.items()]


def _java() -> str:
    """Start Java and return its version, or why METEOR and SPICE cannot use it."""
    try:
        JAVA.start()
    except ConfigError as error:
        return str(error)
    return JAVA.version


def _spice_jars() -> str:
    """Return where the jars of SPICE were found, or that they are missing."""
    try:
        folder = jars.find()[0].parent
    except ConfigError:
        return f"not found: run `rlgf download spice`, or set {jars.VARIABLE}"
    return "found in the cache folder" if folder.is_relative_to(jars.cache_folder()) else f"found by {jars.VARIABLE}"


def _without_folders(text: str) -> str:
    """Return the text with absolute paths shortened to their last part."""
    return FOLDERS.sub("", text)
