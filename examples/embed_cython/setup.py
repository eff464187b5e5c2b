"""Builds against the installed kvmmmu: its ``.pxd`` files for Cython, its headers for C."""

from Cython.Build import cythonize
from setuptools import Extension, setup

import kvmmmu

setup(
    ext_modules=cythonize(
        [Extension("tlbsim", ["tlbsim.pyx"], include_dirs=[kvmmmu.get_include()])],
        compiler_directives={"language_level": 3},
    )
)
