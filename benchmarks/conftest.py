"""What every benchmark needs: C reference loops compiled on the spot, and ratios beside the times."""

import ctypes
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

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


def best_of(contestants: dict[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, float]:
    """Shortest time of one call of each, called in turn: on a shared machine the minimum is what repeats."""
    best = dict.fromkeys(contestants, float("inf"))
    for work in contestants.values():
        work()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, work in contestants.items():
            began = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - began)
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
