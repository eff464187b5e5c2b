"""The one extension and the packages; all metadata stands in pyproject.toml."""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup

# -O0 for quick edit-test rounds: KVMMMU_CFLAGS=-O0 python setup.py build_ext -i
CFLAGS = os.environ.get("KVMMMU_CFLAGS", "-O3 -fno-plt -fvisibility=hidden -fwrapv -g0").split()

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
    )
)
