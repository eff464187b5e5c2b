"""An MMIO access by how its fault is served, beside what it costs without any cache, in plain C."""

import ctypes
import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.records import ACCESS

_spec = importlib.util.spec_from_file_location("refs", Path(__file__).with_name("refs.py"))
assert _spec is not None and _spec.loader is not None
refs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refs)

N = 1 << 14
PAGES = 256
SLOTS = 32
ROOT = 0x1000
RAM = 1 << 20
DEVICE_GVA, DEVICE_GPA = 1 << 30, 0xFE000000
SERVED = {"vCPU cache": "mmio_cache_hit", "mmio spte": "mmio_spte_hit", "slow path": "mmio_slow"}


class Slot(ctypes.Structure):
    _fields_ = [("base_gfn", ctypes.c_uint64), ("npages", ctypes.c_uint64), ("memory", ctypes.c_void_p)]


class Guest:
    """32 slots, 256 device pages, and addresses that make every access be served in one way."""

    def __init__(self, mmu: str, served: str) -> None:
        # Without mmio sptes each change of page takes the slow path; the vCPU's record holds one page only.
        scheme = "off" if served == "slow path" else "generation"
        self.vm = km.VM(mmu, mmio_scheme=scheme)  # type: ignore[arg-type]
        self.ram = refs.aligned(RAM)
        pages = [(DEVICE_GVA + n * 4096, DEVICE_GPA + n * 4096) for n in range(PAGES)]
        refs.map_pages(self.ram.view(np.uint64), ROOT, 0x2000, pages)
        self.vm.memslots.create(gpa=0, memory=self.ram)
        for n in range(1, SLOTS):
            self.vm.memslots.create(gpa=n << 24, memory=refs.aligned(4096))
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_sregs(**refs.LONG_MODE, cr3=ROOT)
        step = 0 if served == "vCPU cache" else 4096
        self.gvas = DEVICE_GVA + np.arange(N, dtype=np.uint64) % np.uint64(PAGES) * np.uint64(step)
        self.kinds = np.ones(N, np.uint8)
        self.out = np.zeros(N, ACCESS)

    def work(self) -> None:
        self.vcpu.access_into(self.gvas, self.kinds, self.out, 0, 4)


@pytest.mark.parametrize("mmu", ["shadow", "ept", "npt"])
@pytest.mark.parametrize("served", SERVED)
@pytest.mark.benchmark(group="MMIO accesses, 2^14 at once")
def bench_mmio(against: Callable[..., None], compile_c: Callable[[str], ctypes.CDLL], mmu: str, served: str) -> None:
    guest = Guest(mmu, served)
    library = compile_c("ref_mmio.c")
    slots = (Slot * SLOTS)(*(Slot(n << 12, 1 if n else RAM // 4096, None) for n in range(SLOTS)))
    paging = refs.Paging.long_mode(ROOT, 40)
    areas = refs.Memory.of((0, RAM - 1, guest.ram.ctypes.data))
    arguments = (ctypes.byref(paging), ctypes.byref(areas), slots, ctypes.c_size_t(SLOTS), refs.pointer(guest.gvas))
    library.ref_mmio.restype = ctypes.c_size_t

    def reference() -> None:
        assert library.ref_mmio(*arguments, ctypes.c_size_t(N), ctypes.c_uint64(2)) == N

    guest.work()
    before = guest.vm.stats[SERVED[served]]
    guest.work()
    assert guest.vm.stats[SERVED[served]] - before >= N - 1
    assert (guest.out["outcome"] == km.Outcome.MMIO).all()
    assert np.array_equal(guest.out["mmio_gpa"][:, 0], guest.gvas + np.uint64(DEVICE_GPA - DEVICE_GVA))
    against(guest.work, items=N, c=reference)
