"""Faults that install a leaf, slot lookups, and what goes over many shadow pages at once, beside plain C."""

from __future__ import annotations

import ctypes
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import kvmmmu as km
from kvmmmu.records import ACCESS

_spec = importlib.util.spec_from_file_location("refs", Path(__file__).with_name("refs.py"))
assert _spec is not None and _spec.loader is not None
refs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(refs)

ROOT, GVA, GPA = 0x1000, 1 << 30, 8 << 20
RAM = 64 << 20
N = 256
APART = 8 * 4096  # the window that is mapped ahead of a fault holds nothing else
REPEAT = 50
ROUNDS = 15
WRITE, USER, GUEST_FINAL = 2, 4, 1 << 32


@pytest.fixture(scope="module")
def machine_kernels(build_pyx: Callable[[str], ModuleType]) -> ModuleType:
    return build_pyx("fault_kernels")


def rounds(benchmark: Any, ratios: bool) -> int:
    return ROUNDS if benchmark.enabled or ratios else 1


class Guest:
    """Tables of 256 pages; the leaves KVM builds for them come and go."""

    def __init__(self, mmu: str) -> None:
        self.vm = km.VM(mmu)  # type: ignore[arg-type]
        self.ram = refs.aligned(RAM)
        pairs = [(GVA + n * APART, GPA + n * APART) for n in range(N)]
        refs.map_pages(self.ram.view(np.uint64), ROOT, 0x2000, pairs)
        self.vm.memslots.create(gpa=0, memory=self.ram)
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_sregs(**refs.LONG_MODE, cr3=ROOT)
        self.gvas, self.gpas = (np.array(column, np.uint64) for column in zip(*pairs, strict=True))


@pytest.mark.parametrize("mmu", ["ept", "npt", "shadow"])
@pytest.mark.benchmark(group="a fault that installs a leaf, tables warm, events off")
def bench_install(
    benchmark: Any,
    request: pytest.FixtureRequest,
    record: Callable[..., None],
    compile_c: Callable[[str], ctypes.CDLL],
    machine_kernels: ModuleType,
    mmu: str,
) -> None:
    """Beside one walk of the guest's tables in C."""
    guest = Guest(mmu)
    library = compile_c("ref_walk.c")
    address, code = (guest.gvas, WRITE | USER) if mmu == "shadow" else (guest.gpas, WRITE | USER | GUEST_FINAL)
    out = np.zeros(N * 48, np.uint8)
    paging, areas = refs.Paging.long_mode(ROOT, 40), refs.Memory.of((0, RAM - 1, guest.ram.ctypes.data))
    arguments = (ctypes.byref(paging), ctypes.byref(areas), refs.pointer(guest.gvas), ctypes.c_size_t(N))

    def walks() -> float:
        began = time.thread_time()
        for _ in range(REPEAT):
            library.ref_translate(*arguments, ctypes.c_uint64(WRITE | USER), refs.pointer(out))
        return (time.thread_time() - began) / REPEAT

    def installs() -> float:
        return float(machine_kernels.installs(guest.vcpu, address, code, REPEAT)) / REPEAT

    before = guest.vm.stats["pf_fixed"]
    installs(), walks()
    assert guest.vm.stats["pf_fixed"] - before == (REPEAT + 1) * N
    guest.vm.check()
    samples: dict[str, list[float]] = {"": [], "walk": []}
    for _ in range(rounds(benchmark, bool(request.config.getoption("--ratios")))):
        samples[""].append(installs())
        samples["walk"].append(walks())
    record(samples, items=N)
    benchmark.pedantic(installs, rounds=1)


@pytest.mark.parametrize("traffic", ["hit", "miss", "local"])
@pytest.mark.parametrize("slots", [8, 32, 512, 32764])
@pytest.mark.benchmark(group="slot of a gfn, 2^14 at once")
def bench_slot(
    benchmark: Any,
    request: pytest.FixtureRequest,
    record: Callable[..., None],
    compile_c: Callable[[str], ctypes.CDLL],
    machine_kernels: ModuleType,
    slots: int,
    traffic: str,
) -> None:
    """Beside a binary search of an array of structs."""
    vm, memory = km.VM("ept"), refs.aligned(4096)
    for n in range(slots):
        vm.memslots.create(gpa=n << 13, memory=memory)
    vcpu = vm.create_vcpu()
    table = np.zeros((slots, 16), np.uint64)
    table[:, 0], table[:, 1] = np.arange(slots) * 2, 1
    chosen = np.random.default_rng(1).integers(0, slots, 1 << 14).astype(np.uint64)
    if traffic == "local":
        chosen = np.repeat(chosen, 10)[: 1 << 14]
    gfns = chosen * np.uint64(2) + np.uint64(traffic == "miss")
    library = compile_c("ref_slots.c")
    library.ref_slots.restype = ctypes.c_size_t
    arguments = refs.pointer(table), ctypes.c_size_t(slots), refs.pointer(gfns), ctypes.c_size_t(len(gfns))
    samples: dict[str, list[float]] = {"": [], "binary": []}
    for _ in range(rounds(benchmark, bool(request.config.getoption("--ratios"))) + 1):
        seconds, found = machine_kernels.lookups(vcpu, gfns)
        samples[""].append(seconds)
        began = time.thread_time()
        assert library.ref_slots(*arguments) == found == (0 if traffic == "miss" else len(gfns))
        samples["binary"].append(time.thread_time() - began)
    record({name: values[1:] for name, values in samples.items()}, items=len(gfns))
    benchmark.pedantic(machine_kernels.lookups, (vcpu, gfns), rounds=1)
    vm.close()


class Touched:
    """A machine without paging whose every page was written, 4 KiB at a time."""

    def __init__(self, mmu: str, pages: int) -> None:
        self.vm = km.VM(mmu)  # type: ignore[arg-type]
        self.pages = pages
        self.slot = self.vm.memslots.create(gpa=0, memory=refs.aligned(pages * 4096), log_dirty=True)
        self.vcpu = self.vm.create_vcpu()
        self.gpas: npt.NDArray[np.uint64] = np.arange(pages, dtype=np.uint64) * np.uint64(4096)
        self.kinds, self.out = np.ones(pages, np.uint8), np.empty(pages, ACCESS)
        self.write()

    def write(self) -> None:
        self.vcpu.access_into(self.gpas, self.kinds, self.out, 0, 1)
        assert (self.out["outcome"] == km.Outcome.OK).all()

    def clear(self) -> None:
        bits = self.vm.get_dirty_log(self.slot)
        assert np.unpackbits(bits.view(np.uint8)).sum() == self.pages
        self.vm.clear_dirty_log(self.slot, bits)

    def zap(self) -> None:
        self.vm.memslots.delete(self.slot)


@pytest.mark.parametrize("mmu", ["ept", "shadow"])
@pytest.mark.parametrize("what", ["clear", "zap"])
@pytest.mark.benchmark(group="over many pages at once: dirty log cleared, everything zapped; a page each")
def bench_many(
    benchmark: Any, request: pytest.FixtureRequest, record: Callable[..., None], quick: bool, mmu: str, what: str
) -> None:
    """1 GiB beside a quarter of it: a page must not cost more because there are more."""
    gib = 1 << (14 if quick else 18)
    samples: dict[str, list[float]] = {"": [], "quarter": []}
    for _ in range(3 if benchmark.enabled or request.config.getoption("--ratios") else 1):
        for name, pages in (("", gib), ("quarter", gib // 4)):
            machine = Touched(mmu, pages)
            machine.vm.set_manual_dirty_protect()
            began = time.thread_time()
            machine.clear() if what == "clear" else machine.zap()
            samples[name].append((time.thread_time() - began) * (4 if name else 1))
            machine.vm.close()
    record(samples, items=gib)
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("pages", [512, 64])
@pytest.mark.benchmark(group="an unsync page synchronised, by its present entries")
def bench_sync(
    benchmark: Any,
    request: pytest.FixtureRequest,
    record: Callable[..., None],
    machine_kernels: ModuleType,
    pages: int,
) -> None:
    """Beside reading as many guest entries and sptes in NumPy: both are columns of 512 words."""
    vm, ram = km.VM("shadow"), refs.aligned(RAM)
    words = ram.view(np.uint64)
    refs.map_pages(words, ROOT, 0x2000, [(GVA + n * 4096, GPA + n * 4096) for n in range(pages)])
    vm.memslots.create(gpa=0, memory=ram)
    vcpu = vm.create_vcpu()
    vcpu.set_sregs(**refs.LONG_MODE, cr3=ROOT)
    for n in range(pages):
        assert vcpu.access(GVA + n * 4096, "w", cpl=3).ok
    table = words[0x4000 // 8 : 0x4000 // 8 + 512]
    shadow = table.copy()
    samples: dict[str, list[float]] = {"": [], "compare": []}
    for _ in range(rounds(benchmark, bool(request.config.getoption("--ratios")))):
        samples[""].append(float(machine_kernels.syncs(vcpu, GVA, REPEAT)) / REPEAT)
        began = time.thread_time()
        for _ in range(REPEAT):
            (table ^ shadow).any()
        samples["compare"].append((time.thread_time() - began) / REPEAT)
    record(samples, items=pages)
    vm.check()
    benchmark.pedantic(machine_kernels.syncs, (vcpu, GVA, REPEAT), rounds=1)
