"""The one extension and the packages; all metadata stands in pyproject.toml."""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup

# The engine is inline functions in one unit. GCC stops inlining once a unit has grown by 40 %, in whatever order it
# meets them, and left half of an access's path as calls; clang says that the option is unused, and goes on.
FAST = "-O3 --param inline-unit-growth=100 -fno-plt -fvisibility=hidden -fwrapv -g0"
# -O0 for quick edit-test rounds: KVMMMU_CFLAGS=-O0 python setup.py build_ext -i
CFLAGS = os.environ.get("KVMMMU_CFLAGS", FAST).split()

core = Extension(
    "kvmmmu._core",
    ["kvmmmu/_core.pyx"],
    include_dirs=["kvmmmu/include"],
    extra_compile_args=[] if sys.platform == "win32" else CFLAGS,
)

setup(
    # `kvmmmu bench` runs the benchmarks of an installed package too, from the same files.
    packages=[*find_packages(include=["kvmmmu", "kvmmmu.*"]), "kvmmmu.benchmarks"],
    package_dir={"kvmmmu.benchmarks": "benchmarks"},
    ext_modules=cythonize(
        [core],
        build_dir="build/cython",
        annotate=bool(os.environ.get("KVMMMU_ANNOTATE")),
        compiler_directives={
            "language_level": 3,
            "embedsignature": True,
            "embedsignature.format": "python",
            "freethreading_compatible": True,
        },
    ),
)
