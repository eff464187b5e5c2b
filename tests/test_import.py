"""What importing the package costs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmmmu import _core

SCRIPT = """
import sys
import kvmmmu
print(*sorted({name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""


def test_importing_kvmmmu_imports_numpy_and_nothing_else_from_outside() -> None:
    # The package under test, not an uncompiled checkout that happens to be the working directory.
    environment = {**os.environ, "PYTHONPATH": str(Path(_core.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True
    )
    # The last is what every Cython extension brings along.
    outside = set(done.stdout.split()) - {"kvmmmu", "__main__", "cython_runtime"}
    # Names that begin with an underscore are site hooks of the environment (editable installs, virtualenv).
    assert {name for name in outside if not name.startswith(("_", "sitecustomize"))} <= {"numpy"}


@pytest.mark.parametrize("kernel", ["", "walk", "ring"])
def test_a_kernel_that_exists_can_be_chosen_without_a_word(kernel: str) -> None:
    assert imported_with(kernel) == ""


def test_a_kernel_that_does_not_exist_is_warned_of_and_ignored() -> None:
    assert "RuntimeWarning: KVMMMU_KERNEL is 'rnig' and ignored; allowed are 'walk', 'ring'" in imported_with("rnig")


def imported_with(kernel: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(Path(_core.__file__).parents[1]), "KVMMMU_KERNEL": kernel}
    done = subprocess.run(
        [sys.executable, "-P", "-c", "import kvmmmu"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stderr
