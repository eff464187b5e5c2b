"""What Cython costs: ``ref_walk.c`` beside the same loop written in Cython, line by line."""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from kvmmmu.records import TRANSLATION

_spec = importlib.util.spec_from_file_location("refs", Path(__file__).with_name("refs.py"))
assert _spec is not None and _spec.loader is not None
refs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refs)

N = 1 << 14
SPAN, ROOT = 64 << 20, 0x1000
WRITE_USER = 6


@pytest.mark.parametrize("shape", ["new page", "random"])
@pytest.mark.benchmark(group="the same loop in Cython and in C, 2^14 at once")
def bench_same_loop(
    against: Callable[..., None], compile_c: Callable[[str], ctypes.CDLL], kernels: ModuleType, shape: str
) -> None:
    memory = refs.aligned(1 << 20)
    frames = np.random.default_rng(1).permutation(SPAN // 4096).tolist()
    pairs = [(page * 4096, 0x1000000 + frame * 4096) for page, frame in enumerate(frames)]
    refs.map_pages(memory.view(np.uint64), ROOT, 0x2000, pairs)
    if shape == "new page":
        gvas = np.arange(N, dtype=np.uint64) * np.uint64(4096) % np.uint64(SPAN)
    else:
        gvas = np.random.default_rng(2).integers(0, SPAN, N, np.uint64)
    gvas[::256] += np.uint64(1 << 40)
    paging, areas = refs.Paging.long_mode(ROOT, 46), refs.Memory.of((0, len(memory) - 1, memory.ctypes.data))
    own, other = np.zeros(N, TRANSLATION), np.zeros(N, TRANSLATION)
    library = compile_c("ref_walk.c")
    columns = (refs.pointer(gvas), ctypes.c_size_t(N), ctypes.c_uint64(WRITE_USER), refs.pointer(other))
    addresses = (ctypes.addressof(paging), ctypes.addressof(areas))

    def reference() -> None:
        library.ref_translate(ctypes.byref(paging), ctypes.byref(areas), *columns)

    def work() -> None:
        kernels.same_loop(*addresses, gvas, WRITE_USER, own.ctypes.data)

    reference()
    work()
    assert np.array_equal(own, other)
    assert (own["fault"] == 1).sum() == N // 256
    against(work, items=N, c=reference)
