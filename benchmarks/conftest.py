"""What every benchmark needs: C reference loops compiled on the spot, and ratios beside the times."""

import ctypes
import importlib.util
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import kvmmmu

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def compile_c(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """Compile a C file of this directory with gcc -O3 and load it."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.fail("benchmarks need a C compiler (gcc or cc) for their reference loops")
    folder = tmp_path_factory.mktemp("reference")
    loaded: dict[str, ctypes.CDLL] = {}

    def compile_one(name: str) -> ctypes.CDLL:
        if name not in loaded:
            out = folder / f"{Path(name).stem}.so"
            flags = ["-O3", "-fwrapv", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
            subprocess.run([compiler, *flags, str(HERE / name), "-o", str(out)], check=True)
            loaded[name] = ctypes.CDLL(str(out))
        return loaded[name]

    return compile_one


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """``kernels.pyx``, built against kvmmmu as any dependant is."""
    from Cython.Build import cythonize
    from setuptools import Distribution, Extension

    folder = tmp_path_factory.mktemp("kernels")
    shutil.copy(HERE / "kernels.pyx", folder)
    extension = Extension(
        "kernels",
        [str(folder / "kernels.pyx")],
        include_dirs=[kvmmmu.get_include()],
        extra_compile_args=["-O3", "-fwrapv", "-g0"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the build tools
        modules = cythonize([extension], include_path=[str(Path(kvmmmu.__file__).parent.parent)], quiet=True)
        build = Distribution({"ext_modules": modules}).get_command_obj("build_ext")
        build.build_lib = build.build_temp = str(folder)
        build.ensure_finalized()
        build.run()
    (built,) = folder.glob("kernels*.so")
    spec = importlib.util.spec_from_file_location("kernels", built)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def repeats(work: Callable[[], object]) -> int:
    """How many calls one sample takes, so that the clock's own cost and grain do not show."""
    number = 1
    while True:
        began = time.thread_time()
        for _ in range(number):
            work()
        if time.thread_time() - began > 50e-6 or number >= 1 << 12:
            return number
        number *= 4


def best_of(contestants: dict[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, float]:
    """Shortest CPU time of one call of each, called in turn: on a shared machine the minimum is what repeats."""
    best = dict.fromkeys(contestants, float("inf"))
    number = {name: repeats(work) for name, work in contestants.items()}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, work in contestants.items():
            calls = range(number[name])
            began = time.thread_time()
            for _ in calls:
                work()
            best[name] = min(best[name], (time.thread_time() - began) / len(calls))
    return best


@pytest.fixture
def against(benchmark) -> Callable[..., None]:  # type: ignore[no-untyped-def]
    """Time ``work`` and put rates and ratios against the named peers, measured in the same process, beside it."""

    def run(work: Callable[[], object], *, items: int, **peers: Callable[[], object]) -> None:
        benchmark.extra_info["items"] = items
        if benchmark.enabled:
            best = best_of({"": work, **peers})
            benchmark.extra_info["items_per_second"] = round(items / best[""])
            for name in peers:
                benchmark.extra_info[f"time_over_{name}"] = round(best[""] / best[name], 3)
        else:
            for peer in peers.values():
                peer()
        benchmark(work)

    return run
