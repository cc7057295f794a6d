"""Compiles ``_ext/*.pyx`` as ``orchestra._ext.*``; all metadata lives in pyproject.toml.

Switches, each an environment variable set to 1:

=====================  ==========================================================
``ORCHESTRA_DEBUG``    -O0 -g, assertions on, bounds and overflow checks in Cython
``ORCHESTRA_TRACE``    line tracing for coverage; the C then lies beside the .pyx
``ORCHESTRA_ANNOTATE`` an HTML page per module under build/cython
``ORCHESTRA_SANITIZE`` AddressSanitizer and UndefinedBehaviorSanitizer
=====================  ==========================================================
"""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

MODULES = ("heap", "gcra", "wrr", "codec", "step", "wire")


def switch(name: str) -> bool:
    return os.environ.get(f"ORCHESTRA_{name}", "0") not in ("", "0")


debug, trace, sanitize = switch("DEBUG"), switch("TRACE"), switch("SANITIZE")
checked = debug or trace or sanitize

compile_args: list[str] = []
link_args: list[str] = []
macros: list[tuple[str, str | None]] = []
if sys.platform != "win32":
    compile_args += ["-O0", "-g", "-UNDEBUG"] if debug else ["-O3"]
    compile_args += ["-Wall", "-Wno-unused-function", "-Wno-unreachable-code"]
    if sanitize:
        flags = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
        compile_args += flags
        link_args += flags
if trace:
    macros += [("CYTHON_TRACE", "1"), ("CYTHON_TRACE_NOGIL", "1"), ("CYTHON_USE_SYS_MONITORING", "0")]

setup(
    ext_modules=cythonize(
        [
            Extension(
                f"orchestra._ext.{name}",
                [f"_ext/{name}.pyx"],
                define_macros=macros,
                extra_compile_args=compile_args,
                extra_link_args=link_args,
            )
            for name in MODULES
        ],
        # A trace build needs the C next to its source, or coverage cannot map lines. The others have folders of their
        # own: Cython compares times only, and would take the C of one mode for that of another.
        build_dir=None if trace else "build/cython-checked" if checked else "build/cython",
        annotate=switch("ANNOTATE"),
        force=trace or switch("ANNOTATE"),
        compiler_directives={
            "language_level": "3",
            "embedsignature": True,
            "boundscheck": checked,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": checked,
            "linetrace": trace,
        },
    )
)
