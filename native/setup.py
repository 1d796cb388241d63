"""Build of the kernels: one shared library that holds each kernel once per variant."""

import os
import platform
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FLAGS = ["-O3", "-fno-math-errno", "-fopenmp", "-fPIC", "-fno-lto"]
VECTOR_SOURCES = ["csrc/attention.c", "csrc/elementwise.c"]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]

BASELINE = ("baseline", ["csrc/dispatch.c"], [])
if platform.machine() in ("x86_64", "AMD64"):
    UNITS = [
        BASELINE,
        ("avx2", VECTOR_SOURCES, AVX2),
        ("avx512", [*VECTOR_SOURCES, "csrc/matmul.c", "csrc/amx.c"], AVX512),
    ]
else:
    UNITS = [BASELINE, ("generic", VECTOR_SOURCES, [])]


class BuildKernels(build_ext):
    """The build of a library that is loaded with ctypes, from sources with their own flags."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path of the library, which does not depend on the version of Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile the sources of each variant with its flags and link them."""
        objects: list[str] = []
        for variant, sources, flags in UNITS:
            objects += self.compiler.compile(
                sources,
                output_dir=os.path.join(self.build_temp, variant),
                macros=[("VARIANT", variant)],
                extra_postargs=[*FLAGS, *flags],
            )
        self.compiler.link_shared_object(objects, self.get_ext_fullpath(ext.name), libraries=["m"], extra_postargs=["-fopenmp"])


SOURCES = sorted({source for _, sources, _ in UNITS for source in sources})
# elsewhere the package installs without its library, and `unavailable_reason` says why
EXTENSIONS = [Extension("rlgf_native.libkernels", SOURCES)] if sys.platform == "linux" else []

setup(ext_modules=EXTENSIONS, cmdclass={"build_ext": BuildKernels})
