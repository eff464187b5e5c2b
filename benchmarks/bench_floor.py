"""The machine's own limit: dependent loads, and independent ones side by side, over tables of three sizes."""

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

N = 100_000
LINE = 8  # words: each element has a cache line to itself
SIZES = {"L2, 140 KiB": 140 << 10, "L3, 2 MiB": 2 << 20, "DRAM, 134 MB": 134_000_000}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.benchmark(group="one load of memory's own, without a walk")
def bench_floor(against: Callable[..., None], compile_c: Callable[[str], ctypes.CDLL], quick: bool, size: str) -> None:
    if quick and size.startswith("DRAM"):
        pytest.skip("large tables take long to set up")
    random = np.random.default_rng(8)
    order = random.permutation(SIZES[size] // 8 // LINE).astype(np.uint64) * np.uint64(LINE)
    links = np.zeros(SIZES[size] // 8, np.uint64)
    links[order] = np.roll(order, -1)  # one ring through all lines
    starts = order[:: len(order) // 10][:10].copy()
    library = compile_c("ref_floor.c")
    for name in ("ref_dependent", "ref_parallel"):
        getattr(library, name).restype = ctypes.c_uint64
    table = ctypes.c_void_p(links.ctypes.data)

    def dependent() -> None:
        library.ref_dependent(table, ctypes.c_size_t(N))

    def parallel() -> None:
        library.ref_parallel(table, ctypes.c_void_p(starts.ctypes.data), ctypes.c_size_t(N))

    against(parallel, items=N, dependent=dependent)
