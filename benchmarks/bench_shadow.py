"""The lockless walk of KVM's tables, compiled by ``cimport``, beside the same loop in plain C."""

import ctypes
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

N = 1 << 16
SPAN = 64 << 20
MMU_PRESENT, PRESENT = 1 << 11, 7


def arena() -> np.ndarray:  # type: ignore[type-arg]
    """Four levels over 64 MiB, the pages of the arena in random order; one leaf in 64 is empty."""
    random = np.random.default_rng(4)
    leaves = SPAN >> 21
    pages = np.zeros((leaves + 4, 512), np.uint64)
    order = (random.permutation(leaves) + 4).astype(np.uint64)
    link = np.uint64(MMU_PRESENT | PRESENT)
    twelve = np.uint64(12)
    pages[1, 0], pages[2, 0] = np.uint64(2 << 12) | link, np.uint64(3 << 12) | link
    pages[3, :leaves] = (order << twelve) | link
    pages[4:] = (random.integers(1, 1 << 30, (leaves, 512), np.uint64) << twelve) | link
    pages[4:].reshape(-1)[::64] = 0
    return pages.reshape(-1)


@pytest.mark.benchmark(group="lockless shadow walk, 2^16 at once")
def bench_shadow_walk(
    against: Callable[..., None], compile_c: Callable[[str], ctypes.CDLL], kernels: ModuleType
) -> None:
    sptes = arena()
    address = np.random.default_rng(5).integers(0, SPAN, N, np.uint64)
    own, other = np.zeros(N, np.uint64), np.zeros(N, np.uint64)
    own_level, other_level = np.zeros(N, np.uint8), np.zeros(N, np.uint8)
    library = compile_c("ref_shadow.c")
    columns = (ctypes.c_void_p(array.ctypes.data) for array in (address, other, other_level))
    arguments = (ctypes.c_void_p(sptes.ctypes.data), ctypes.c_uint64(1), 4, *columns, ctypes.c_size_t(N))

    def reference() -> None:
        library.ref_shadow(*arguments)

    def work() -> None:
        kernels.shadow_walks(sptes, 1, 4, address, own, own_level)

    reference()
    work()
    assert np.array_equal(own, other) and np.array_equal(own_level, other_level)
    assert 0 < (own == 0).sum() < N // 32
    against(work, items=N, c=reference)
