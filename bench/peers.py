"""The peers' environments: each in a separate folder, created if it does not exist."""

import subprocess
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

TORCH = "torch==2.13.0"
TRL = "trl==1.12.0"
TRIL = "tril==0.2.1"
# The packages that TRIL imports, of TRIL's time where newer ones break it. Its own list also has DeepSpeed, not needed here.
TRIL_NEEDS = (
    "transformers==4.35.2", "accelerate==0.24.1", "peft==0.5.0", "datasets==2.14.7", "bitsandbytes==0.41.3",
    "numpy==1.26.4", "pandas==2.1.4", "pyarrow==14.0.2", "scipy==1.17.1", "hydra-core==1.3.8", "spacy==3.7.5",
    "nltk==3.10.4", "rouge==1.0.1", "gem-metrics-fork==0.1.dev0", "jpype1==1.7.1", "shortuuid==1.0.13",
    "jsonlines==4.0.0", "rich==15.0.0", "wandb==0.31.0",
)  # fmt: skip


def trl(folder: Path) -> str:
    """Return the interpreter of TRL's environment."""
    return environment(folder / "bench-trl", [[TORCH], [TORCH, TRL]], {"torch": TORCH, "trl": TRL})


def tril(folder: Path) -> str:
    """Return the interpreter of TRIL's environment."""
    installs = [[TORCH], [TORCH, *TRIL_NEEDS], ["--no-deps", TRIL]]
    return environment(folder / "bench-tril", installs, {"torch": TORCH, "tril": TRIL})


def environment(folder: Path, installs: Sequence[Sequence[str]], wanted: dict[str, str]) -> str:
    """Return the interpreter in `folder`, created with these calls of pip unless it matches.

    torch is installed first, with its exact version: an open range would download gigabytes.
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


PEERS: dict[str, Callable[[Path], str]] = {"trl": trl, "tril": tril}
