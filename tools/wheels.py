"""Report whether every dependency has a wheel for each declared Python: `make wheels`.

uv resolves the requirements of pyproject.toml for each version, without building anything. Of the
library itself everything must have a wheel; an extra that needs a source distribution is reported.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

PYPROJECT = tomllib.loads((Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
LOCAL = ("dev", "docs", "release")  # extras for work on rlgf
PLATFORM = "x86_64-manylinux_2_28"


def main() -> int:
    """Resolve for each Python; print packages without a wheel; return 1 if one is required."""
    versions = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)]
    failed = False
    for version in versions:
        count, error = resolve(PROJECT["dependencies"], version)
        failed |= error is not None
        print(f"Python {version}: {f'{count} packages, all as wheels' if error is None else error}", flush=True)
        for extra, requirements in PROJECT["optional-dependencies"].items():
            if extra in LOCAL:
                continue
            for requirement in requirements:
                if not requirement.startswith("rlgf["):
                    _, error = resolve([requirement], version)
                    if error is not None:
                        print(f"  extra {extra}: {requirement}: {error}", flush=True)
    return int(failed)


def resolve(requirements: list[str], version: str) -> tuple[int, str | None]:
    """Return the number of required packages, and the error if one has no wheel."""
    command = [
        str(Path(sys.executable).with_name("uv")), "pip", "compile", "--quiet", "--only-binary", ":all:", "--no-header",
        "--no-annotate", "--python-version", version, "--python-platform", PLATFORM, "-",
    ]  # fmt: skip
    found = subprocess.run(command, input="\n".join(requirements), capture_output=True, text=True, check=False)
    if found.returncode:
        reason = re.search(r"Because (.*?)(,|$)", " ".join(found.stderr.split()))
        return 0, reason[1] if reason else found.stderr.strip()
    return len(found.stdout.splitlines()), None


if __name__ == "__main__":
    sys.exit(main())
