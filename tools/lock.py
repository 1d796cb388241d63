"""Lock the development environment: every package with its hash, for one platform.

`python tools/lock.py write` resolves `.[dev]` under constraints.txt with pip, for the Python and
the platform that run it, and writes `lock/PLATFORM.txt`; `install` installs from it into the
environment of the Python that runs it (`make setup LOCKED=1`); `name` prints the file's name.

Torch is outside the file: its builds (CPU, CUDA) come from several indexes and have hashes and
requirements of their own, so it is installed by its version alone. What builds packages from source
is in `lock/PLATFORM-build.txt` and installed first, so that pip needs no isolated builds, whose
downloads have no hashes.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER, CONSTRAINTS = ROOT / "lock", ROOT / "constraints.txt"
BUILD = ("hatchling>=1.27", "editables", "setuptools>=77", "wheel")  # of rlgf, of native/ and of packages without wheels
OUTSIDE = ("torch",)
OWN = ("rlgf",)


def main() -> int:
    """Write, name or install the lock file of the running Python."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=("write", "install", "name"))
    action = parser.parse_args().action
    if action == "name":
        print(lock_file().relative_to(ROOT))
    elif action == "write":
        write()
    else:
        install()
    return 0


def platform_name() -> str:
    """Return the name of the running Python and its platform, as in 'cpython-3.11-linux-x86_64'."""
    version = ".".join(platform.python_version_tuple()[:2])
    return f"{platform.python_implementation().lower()}-{version}-{sysconfig.get_platform()}"


def lock_file(part: str = "") -> Path:
    """Return the path of the lock file of this platform; `part` is '' or '-build'."""
    return FOLDER / f"{platform_name()}{part}.txt"


def write() -> None:
    """Resolve the requirements with pip and write both files."""
    FOLDER.mkdir(exist_ok=True)
    for part, requirements in (("", ["-c", str(CONSTRAINTS), f"{ROOT}[dev]"]), ("-build", ["-c", str(CONSTRAINTS), *BUILD])):
        found = resolve(requirements)
        lock_file(part).write_text(header() + "".join(entry(name, *found[name]) for name in sorted(found)), encoding="utf-8")
        print(f"{lock_file(part).relative_to(ROOT)}: {len(found)} packages")


def resolve(requirements: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Return the version and the SHA-256 of every package that pip would install."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run([*command, *requirements], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"lock: pip could not resolve the requirements: {done.stderr.strip().splitlines()[-1:]}")
    return packages_of(json.loads(done.stdout))


def packages_of(report: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the version and the SHA-256 of each package in one of pip's reports.

    Neither the project itself nor torch is in it.
    """
    found: dict[str, tuple[str, str]] = {}
    for item in report["install"]:
        name = normalize(item["metadata"]["name"])
        if name not in (*OUTSIDE, *OWN):
            found[name] = item["metadata"]["version"], item["download_info"]["archive_info"]["hashes"]["sha256"]
    return found


def normalize(name: str) -> str:
    """Return a package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def header() -> str:
    """Return the first lines of a lock file: platform, index and how it was made."""
    return (
        f"# Platform: {platform_name()} (other platforms have other wheels, and other hashes).\n"
        "# Index: PyPI, or a mirror of it with the same files. Torch is not in this file (tools/lock.py says why).\n"
        "# Made by `make lock` from pyproject.toml and constraints.txt; installed by `make setup LOCKED=1`.\n"
    )


def entry(name: str, version: str, digest: str) -> str:
    """Return the lines of a package."""
    return f"{name}=={version} \\\n    --hash=sha256:{digest}\n"


def torch_version() -> str:
    """Return the version of torch in constraints.txt."""
    found = re.search(r"^torch==(\S+)$", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None:
        sys.exit("lock: constraints.txt has no line torch==VERSION: add it.")
    return found[1]


def install() -> None:
    """Install build tools, torch, all packages and the project into this Python's environment."""
    for part in ("-build", ""):
        if not lock_file(part).is_file():
            known = ", ".join(sorted(path.stem for path in FOLDER.glob("*.txt") if not path.stem.endswith("-build")))
            sys.exit(f"lock: no lock file is for {platform_name()} (there is {known}): `make lock`, or `make setup` alone.")
    hashed = ("--no-deps", "--require-hashes", "--no-build-isolation")
    pip(*hashed, "-r", str(lock_file("-build")))
    pip(*hashed, "-r", str(lock_file()))
    pip("-c", str(CONSTRAINTS), f"torch=={torch_version()}")  # whatever its build needs besides comes with it
    pip("--no-deps", "--no-build-isolation", "-e", str(ROOT))


def pip(*arguments: str) -> None:
    """Run `pip install`; exit if it fails."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    if code := subprocess.run(command).returncode:
        sys.exit(code)


if __name__ == "__main__":
    sys.exit(main())
