"""The peers' environments: each in a folder of its own, made when it is not there."""

import subprocess
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

TORCH = "torch==2.13.0"
TRL = "trl==1.12.0"


def trl(folder: Path) -> str:
    """The interpreter of TRL's environment."""
    return environment(folder / "bench-trl", [[TORCH], [TORCH, TRL]], {"torch": TORCH, "trl": TRL})


def environment(folder: Path, installs: Sequence[Sequence[str]], wanted: dict[str, str]) -> str:
    """The interpreter of the environment in `folder`, made by these calls of pip unless it has what is wanted.

    torch comes first and exact: an open range would pull gigabytes.
    """
    python = folder / "bin" / "python"
    probe = f"import importlib.metadata as m; print(*(m.version(name).split('+')[0] for name in {list(wanted)}))"
    if python.exists():
        found = subprocess.run([str(python), "-c", probe], capture_output=True, text=True).stdout.split()
        if found == [requirement.split("==")[1] for requirement in wanted.values()]:
            return str(python)
    print(f"making the environment {folder} ...", flush=True)
    venv.create(folder, with_pip=True, clear=True)
    for arguments in installs:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *arguments], check=True)
    return str(python)


PEERS: dict[str, Callable[[Path], str]] = {"trl": trl}
