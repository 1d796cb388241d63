"""The processor of this machine, to choose the libraries for matrix products."""

import platform
import re
from functools import cache
from pathlib import Path


@cache
def processor() -> str:
    """Return the system's description of the processor.

    It holds the lines on which machine code and speed depend.
    """
    told = ("vendor_id", "cpu family", "model name", "flags", "Features", "isa", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(told)}))


@cache
def is_intel() -> bool:
    """Return whether the system reports an Intel processor."""
    return "GenuineIntel" in processor()


@cache
def has_full_width_avx512() -> bool:
    """Return whether this is AMD's Zen 5 (family 26) or later, with AVX-512.

    Intel's library uses half of the width of its units.
    """
    family = re.search(r"^cpu family\s*: (\d+)", processor(), re.MULTILINE)
    return "AuthenticAMD" in processor() and "avx512f" in processor() and family is not None and int(family[1]) >= 26
