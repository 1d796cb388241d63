"""Report whether every dependency has a wheel for each declared Python: `make wheels`.

pip resolves the requirements of pyproject.toml for each version, without installing or building
anything. What only exists as a source distribution is listed; of the library itself nothing may be,
of its extras it is reported.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

PYPROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
LOCAL = ("dev", "docs", "release")  # extras for work on rlgf


def main() -> int:
    """Resolve for each Python and print a line per failure; return 1 if the library has one."""
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    failed = False
    for version in versions:
        count, error = resolve(PROJECT["dependencies"], version)
        failed |= error is not None
        print(f"Python {version}: {f'{count} packages, all as wheels' if error is None else error}")
        for extra, requirements in PROJECT["optional-dependencies"].items():
            others = [requirement for requirement in requirements if not requirement.startswith("rlgf[")]
            if extra in LOCAL:
                continue
            for requirement in others:
                _, error = resolve([requirement], version)
                if error is not None:
                    print(f"  extra {extra}: {requirement}: {error}")
    return int(failed)


def resolve(requirements: list[str], version: str) -> tuple[int, str | None]:
    """Return the number of packages that requirements resolve to, and the error if one has no wheel."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check", "--ignore-installed",
            "--only-binary=:all:", "--python-version", version, "--target", folder, "--report", str(report), *requirements,
        ]  # fmt: skip
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            lines = [line for line in found.stderr.splitlines() if line.startswith("ERROR")]
            return 0, (lines or [found.stderr.strip()])[-1].removeprefix("ERROR: ")
        return len(json.loads(report.read_text(encoding="utf-8"))["install"]), None


if __name__ == "__main__":
    sys.exit(main())
