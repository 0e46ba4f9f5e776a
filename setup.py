"""Builds the optional C++ extension `rskernels._C` against the torch that is installed.

`python setup.py build_ext --inplace` is incremental (ninja, objects kept under build/). The package
works without the extension, so nothing that goes wrong here stops an install: without a compiler,
without torch, or when compiling fails, one line says what is missing and the plain-PyTorch reference
serves every operator. RSKERNELS_REQUIRE_EXT=1 turns these lines into errors (for CI and packagers).
"""

import logging
import os
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("RSKERNELS_REQUIRE_EXT", "") not in ("", "0")


def give_up(reason: str) -> None:
    """One line on stderr, or an error where the extension is required."""
    line = f"rskernels: extension not built, the plain-PyTorch reference will serve: {reason}"
    if REQUIRED:
        sys.exit(f"{line} (RSKERNELS_REQUIRE_EXT is set)")
    print(line, file=sys.stderr, flush=True)


def find_compiler() -> str | None:
    """The C++ compiler torch will call: $CXX, or the first of the usual names on PATH."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((name for name in names if shutil.which(name)), None)


def extension_arguments() -> dict:
    """What setup() needs to build the extension, or nothing when it cannot be built."""
    if sys.platform == "win32":
        give_up("its vector code is written for GCC and clang, not for Microsoft's compiler; WSL has both")
        return {}
    compiler = find_compiler()
    if compiler is None:
        missing = os.environ.get("CXX") or "c++, g++ or clang++"
        give_up(f"no C++ compiler ({missing}) on PATH; install one and run pip install again")
        return {}
    os.environ.setdefault("CXX", compiler)
    # Without ninja torch compiles one file at a time; pip's is beside this Python, which need not be on PATH.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])
    # Its warnings are about CUDA, which this extension does not use.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        give_up(f"torch cannot be imported ({error}); install torch, then pip install --no-build-isolation")
        return {}

    class OptionalBuild(BuildExtension):
        """setuptools' optional=True survives neither a missing compiler nor ninja's errors."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                last_line = str(error).strip().splitlines()[-1:] or [type(error).__name__]
                give_up(f"compiling failed, see the compiler's messages above ({last_line[0]})")
                for extension in self.extensions:  # a stale build must not pass for this one
                    for path in (self.get_ext_fullpath(extension.name), *ROOT.glob("rskernels/_C*.so")):
                        Path(path).unlink(missing_ok=True)
                self.extensions = []

    # Paths relative to this file, as setuptools wants them in an sdist.
    sources = ["csrc/module.cpp", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/cpu/*.cpp"))]
    # Without OpenMP switched on, at::parallel_for's inline half runs everything on one thread.
    # No -march=native: instruction sets are chosen at run time (csrc/cpu/isa.h).
    # GCC's own AVX-512 header trips -Wmaybe-uninitialized.
    # -g0: Python's own flags ask for debugging symbols, which cost a third of the compile time.
    flags = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized"]
    extension = CppExtension(
        "rskernels._C",
        sources,
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h")],
        extra_compile_args={"cxx": flags},
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}


setup(**extension_arguments())
