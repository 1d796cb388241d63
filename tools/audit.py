"""Audit the locked packages for known vulnerabilities with pip-audit: `python tools/audit.py`.

pip-audit has an environment of its own, build/audit, made on first use. It asks a service of PyPI
about each package of the lock file and torch. Where it cannot be installed or reach that service,
this prints *not audited* with the reason and succeeds, as there is no result. The exit status is
1 if a package has a known vulnerability.
"""

import json
import subprocess
import sys
import venv
from collections.abc import Sequence
from typing import Any

from lock import ROOT, lock_file, torch_version

ENVIRONMENT = ROOT / "build" / "audit"
TIMEOUT = 300  # seconds


def main() -> int:
    """Audit, and print the findings or why there are none."""
    requirements = locked_requirements(lock_file().read_text(encoding="utf-8"))
    report, reason = audit(requirements)
    if report is None:
        print(f"not audited: {reason}")
        return 0
    lines = vulnerabilities(report)
    print(
        "\n".join([*lines, f"audited {len(report['dependencies'])} of {len(requirements)} packages: {len(lines)} vulnerable"])
    )
    return int(bool(lines))


def locked_requirements(text: str) -> list[str]:
    """Return the packages of a lock file with their versions, and torch."""
    pinned = [line.removesuffix("\\").strip() for line in text.splitlines() if "==" in line and not line.startswith("#")]
    return [*pinned, f"torch=={torch_version()}"]


def audit(requirements: Sequence[str]) -> tuple[dict[str, Any] | None, str]:
    """Return pip-audit's report, or None and the reason why there is none."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.is_file():
        venv.create(ENVIRONMENT, with_pip=True)
    installed = run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "pip-audit"])
    if installed.returncode:
        return None, f"pip-audit cannot be installed ({last_line(installed)})"
    listed, found = ENVIRONMENT / "requirements.txt", ENVIRONMENT / "report.json"
    listed.write_text("\n".join(requirements) + "\n", encoding="utf-8")
    found.unlink(missing_ok=True)
    command = [str(python), "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json"]
    done = run([*command, "-o", str(found), "-r", str(listed)])
    try:
        return json.loads(found.read_text(encoding="utf-8")), ""
    except (OSError, ValueError):
        return None, f"pip-audit cannot reach its service ({last_line(done)})"


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command; one that takes too long has failed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {TIMEOUT} s")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the kind of error in the last line that a command printed, without addresses."""
    lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit status {done.returncode}"]
    return " ".join(word for word in lines[-1].split() if "/" not in word)[:160]


def vulnerabilities(report: dict[str, Any]) -> list[str]:
    """Return a line for each package with known vulnerabilities."""
    return [
        f"{row['name']} {row['version']}: {', '.join(found['id'] for found in row['vulns'])}"
        for row in report["dependencies"]
        if row.get("vulns")
    ]


if __name__ == "__main__":
    sys.exit(main())
