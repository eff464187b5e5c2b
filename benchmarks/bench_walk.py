"""Batches through the guest's tables and the host's below them, beside a plain C loop."""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.records import TRANSLATION

_spec = importlib.util.spec_from_file_location("refs", Path(__file__).with_name("refs.py"))
assert _spec is not None and _spec.loader is not None
refs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refs)

N = 1 << 16
SPAN = 64 << 20
ROOT = 0x1000
WRITE, USER = 2, 4


def addresses(shape: str) -> np.ndarray:  # type: ignore[type-arg]
    """Offsets into the span: 64 accesses to a page, a new page each, or at random; 1 in 256 is not mapped."""
    step = {"64 a page": 64, "new page": 4096}
    if shape in step:
        gvas = np.arange(N, dtype=np.uint64) * np.uint64(step[shape]) % np.uint64(SPAN)
    else:
        gvas = np.random.default_rng(2).integers(0, SPAN, N, np.uint64)
    gvas[::256] += np.uint64(1 << 40)
    return gvas


@pytest.mark.parametrize("shape", ["new page", "random"])
@pytest.mark.benchmark(group="walk in two dimensions (NPT), 2^16 at once")
def bench_nested(against: Callable[..., None], compile_c: Callable[[str], ctypes.CDLL], shape: str) -> None:
    memory = refs.aligned(1 << 20)
    frames = np.random.default_rng(1).permutation(SPAN // 4096).tolist()
    words = memory.view(np.uint64)
    refs.map_pages(words, ROOT, 0x2000, [(page * 4096, 0x1000000 + f * 4096) for page, f in enumerate(frames)])
    host_root = 0x80000
    guest_pages = [(gpa, gpa) for gpa in range(0, 0x80000, 4096)]
    refs.map_pages(words, host_root, host_root + 4096, guest_pages + [(0x1000000 + f * 4096,) * 2 for f in frames])
    host = km.HostCpu(maxphyaddr=46, vendor="amd")
    paging = km.Paging(
        **refs.LONG_MODE,
        cr3=ROOT,
        cpu=km.GuestCpu(maxphyaddr=46),
        memory=memory,
        nested=km.NptTables(host_root, cpu=host),
    )
    gvas = addresses(shape)
    own, other = np.zeros(N, TRANSLATION), np.zeros(N, TRANSLATION)
    library = compile_c("ref_walk.c")
    guest_paging, host_paging = refs.Paging.long_mode(ROOT, 46), refs.Paging.long_mode(host_root, 46)
    areas = refs.Memory.of((0, len(memory) - 1, memory.ctypes.data))
    arguments = (*map(ctypes.byref, (guest_paging, host_paging, areas)), refs.pointer(gvas), ctypes.c_size_t(N))

    def reference() -> None:
        library.ref_translate2(*arguments, ctypes.c_uint64(WRITE | USER), refs.pointer(other))

    def work() -> None:
        paging.translate_into(gvas, own, "w", 3, False, False, False)

    reference()
    work()
    assert np.array_equal(own, other)
    assert (own["fault"] == 0).sum() == N - N // 256
    against(work, items=N, c=reference)
