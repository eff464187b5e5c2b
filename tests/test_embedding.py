"""The doors for embedders, tried from outside: a wheel, a fresh environment, the examples built against it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from kvmmmu._version import __version__

IGNORED = ("build", "dist", "*.egg-info", "__pycache__", "*.so", ".git", ".venv", ".*_cache", ".hypothesis", "shared")


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Standard output of a command; its errors are shown when it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built in a copy of its tree (-O0: it is not timed here)."""
    copy = tmp_path_factory.mktemp("wheel") / "kvmmmu"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*IGNORED))
    command = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist", ".")
    run(sys.executable, *command, cwd=copy, KVMMMU_CFLAGS="-O0 -fvisibility=hidden -fwrapv -g0")
    (built,) = (copy / "dist").glob("kvmmmu-*.whl")
    return built


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel and what an extension is built with."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", wheel, "cython>=3.3.1,<3.4", "setuptools>=77", cwd=folder)
    where = run(python, "-c", "import kvmmmu; print(kvmmmu.__file__, kvmmmu.__version__)", cwd=folder)
    assert str(folder) in where and where.split()[1] == __version__
    return python


def test_the_wheel_carries_the_contract_and_not_the_engine(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"__init__.pxd", "_core.pxd", "_core.pyi", "py.typed", "bits/mmio.pxd", "bits/guest_walk.pxd"}
    wanted |= {"include/kvmmmu/capi.h", "include/kvmmmu/bits.h", "include/kvmmmu/atomics.h"}
    assert {f"kvmmmu/{name}" for name in wanted} <= names
    # `kvmmmu bench` compiles its yardsticks on the spot: they are the only sources.
    sources = {name for name in names if re.search(r"engine/.*\.pxd$|\.pyx$|\.c$", name)}
    assert {name for name in sources if not name.startswith("kvmmmu/benchmarks/")} == set()
    assert "kvmmmu/benchmarks/ref_walk.c" in sources


@pytest.mark.parametrize("mmu", ["shadow", "ept", "npt"])
def test_a_c_program_runs_a_guest_through_the_table(mmu: str, root: Path, python: Path, tmp_path: Path) -> None:
    example = tmp_path / "embed_c"
    shutil.copytree(root / "examples" / "embed_c", example, ignore=shutil.ignore_patterns(*IGNORED))
    assert "Python.h" not in re.sub(r"/\*.*?\*/", "", (example / "engine.c").read_text(), flags=re.S)
    run(python, "build.py", cwd=example)
    library = sysconfig.get_config_var("LIBDIR") or ""
    out = run("./embed_c", python, ".", mmu, "1000", cwd=example, LD_LIBRARY_PATH=library)
    assert out.startswith("uart: hello from the guest\n")
    totals = re.search(r"accesses (\d+), exits (\d+), guest walks by KVM (\d+)", out)
    assert totals is not None
    accesses, exits, walks = map(int, totals.groups())
    assert accesses == 1000 + len("hello from the guest")
    # Each character leaves through the UART; memory is mapped once and then costs nothing.
    assert len("hello from the guest") < exits < 700
    assert (walks > 0) == (mmu == "shadow")


def test_a_cython_module_uses_the_machine_and_the_kernels(root: Path, python: Path, tmp_path: Path) -> None:
    example = tmp_path / "embed_cython"
    shutil.copytree(root / "examples" / "embed_cython", example, ignore=shutil.ignore_patterns(*IGNORED, "*.c"))
    run(python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", ".", cwd=example)
    out = run(python, "run.py", cwd=tmp_path / "embed_cython")
    lines = re.findall(r"(\d+) entries: (\d+) hits, (\d+) misses, (\d+) MMIO, (\d+) faults", out)
    numbers = [tuple(map(int, line)) for line in lines]
    assert [entries for entries, *_ in numbers] == [16, 64, 256]
    assert all(hits + misses == 200_000 and mmio == 4000 and faults == 0 for _, hits, misses, mmio, faults in numbers)
    assert numbers[0][1] < numbers[1][1] < numbers[2][1]
    assert "(1, (1040384, 5))" in out


def test_the_tour_ends_well(root: Path, python: Path, tmp_path: Path) -> None:
    out = run(python, root / "examples" / "tour.py", cwd=tmp_path)
    assert "{'mmio_slow': 2, 'mmio_spte_hit': 1, 'mmio_cache_hit': 1}" in out
    assert out.count("AccessResult(OK") == 3
    assert out.count("AccessResult(MMIO") == 4
