"""Print the requirements of an extra, to install them without the package itself."""

import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extra: str) -> list[str]:
    """Return the requirements of an extra."""
    return tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"][extra]


if __name__ == "__main__":
    print(*requirements(sys.argv[1]))
