"""A repeated MMIO fault by how it is served and how many slots there are, beside what it costs without a cache.

The handler is called from a compiled loop (``mmio_kernels.pyx``), as an embedder's engine does.  Slots and device pages
take turns in the guest's address space, so that no search is predictable, and pages are met in random order: a guest
that maps 64 MiB of device pages.
"""

import importlib.util
from collections.abc import Callable
from functools import cache, partial
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

PAGES = 64 << 20 >> 12
ROUNDS = 4
N = ROUNDS * PAGES
ROOT = 0x1000
RAM_PAGES = 128
DEVICE_GVA = 1 << 30
MOST = 32_764
SLOTS = (8, 32, 512, MOST)
CACHED, SLOW, BINARY, LINEAR = range(4)
SCAN = {"linear": "a scan takes 26 us and more for each fault"}


class Layout:
    """Slot, gap, slot, gap ...; the device's pages stand in the gaps."""

    def __init__(self, slots: int) -> None:
        gap = max(1, PAGES // slots)
        self.slots = [(0, RAM_PAGES)] + [(RAM_PAGES + n * (gap + 1) - 1, 1) for n in range(1, slots)]
        rng = np.random.default_rng(1)
        device = np.concatenate([np.arange(gap, dtype=np.uint64) + np.uint64(base + n) for base, n in self.slots])
        self.gfns = np.sort(rng.permutation(device)[:PAGES])
        self.order = np.concatenate([rng.permutation(PAGES) for _ in range(ROUNDS)])
        self.rows = np.zeros((slots, 8), np.uint64)
        self.rows[:, :2] = self.slots


class Guest:
    """The machine of a layout, with every device page touched once."""

    def __init__(self, mmu: Any, layout: Layout, scheme: Any, protocol: Any = "exchange") -> None:
        self.vm = km.VM(mmu, mmio_scheme=scheme, reader_protocol=protocol)
        self.ram = refs.aligned(RAM_PAGES * 4096)
        gvas = DEVICE_GVA + np.arange(PAGES, dtype=np.uint64) * np.uint64(4096)
        gpas = layout.gfns << np.uint64(12)
        refs.map_pages(self.ram.view(np.uint64), ROOT, 0x2000, list(zip(gvas.tolist(), gpas.tolist(), strict=True)))
        page = refs.aligned(4096)
        for base, pages in layout.slots:
            self.vm.memslots.create(gpa=base << 12, memory=self.ram if pages > 1 else page)
        self.vcpu = self.vm.create_vcpu()
        self.vcpu.set_sregs(**refs.LONG_MODE, cr3=ROOT)
        self.kinds = np.ones(N, np.uint8)
        self.out = np.zeros(N, ACCESS)
        self.gvas = gvas[layout.order]
        # What the handler is given: the gva, or the gpa where the processor reports that.
        self.addresses = self.gvas if mmu == "shadow" else gpas[layout.order]
        self.batch()

    def batch(self) -> None:
        self.vcpu.access_into(self.gvas, self.kinds, self.out, 0, 4)

    def one_page(self) -> None:
        self.vcpu.access_into(np.full(N, self.gvas[0], np.uint64), self.kinds, self.out, 0, 4)

    def count(self, counter: str, work: Callable[[], None]) -> int:
        before = self.vm.stats[counter]
        work()
        return int(self.vm.stats[counter] - before)


def faults(
    kernels: ModuleType, layout: Layout, guest: Guest, addresses: npt.NDArray[np.uint64], how: int
) -> Callable[[], None]:
    """A contestant: every address faults once."""

    def work() -> None:
        assert kernels.faults(guest.vcpu, addresses, how, layout.rows) == N

    return work


class Pair:
    """The same guest with mmio sptes and without, and the ways to serve its faults."""

    def __init__(self, mmu: str, slots: int, kernels: ModuleType) -> None:
        layout = Layout(slots)
        self.cached, self.off = Guest(mmu, layout, "generation"), Guest(mmu, layout, "off")

        run = partial(faults, kernels, layout)
        self.spte = run(self.cached, self.cached.addresses, CACHED)
        self.record = run(self.cached, np.full(N, self.cached.addresses[0], np.uint64), CACHED)
        self.others = {
            "slow": run(self.off, self.off.addresses, SLOW),
            "binary": run(self.off, self.off.addresses, BINARY),
        }
        if slots < MOST:
            self.others["linear"] = run(self.off, self.off.addresses, LINEAR)
        self.absent = SCAN if slots == MOST else {}
        # Each is served as its name says.
        self.record()
        assert self.cached.count("mmio_cache_hit", self.record) == N
        assert self.cached.count("mmio_spte_hit", self.spte) >= N - ROUNDS
        assert [self.off.count("mmio_slow", work) for work in self.others.values()] == [N] * len(self.others)


@pytest.fixture(scope="session")
def pairs(build_pyx: Callable[[str], ModuleType]) -> Callable[[str, int], Pair]:
    """Machines by MMU and slots; 32,764 slots take a while to make."""
    return cache(lambda mmu, slots: Pair(mmu, slots, build_pyx("mmio_kernels")))


def skip_large(slots: int, quick: bool) -> None:
    if quick and slots == MOST:
        pytest.skip("32,764 slots take long to make")


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("mmu", ["shadow", "ept"])
@pytest.mark.benchmark(group="MMIO fault served by the mmio spte")
def bench_mmio_spte(against: Any, pairs: Callable[[str, int], Pair], quick: bool, mmu: str, slots: int) -> None:
    skip_large(slots, quick)
    pair = pairs(mmu, slots)
    against(pair.spte, items=N, absent=pair.absent, **pair.others)


@pytest.mark.parametrize("slots", SLOTS[1:])
@pytest.mark.benchmark(group="MMIO fault served by the vCPU's record")
def bench_mmio_record(against: Any, pairs: Callable[[str, int], Pair], quick: bool, slots: int) -> None:
    skip_large(slots, quick)
    pair = pairs("shadow", slots)
    pair.record()
    against(pair.record, items=N, absent=pair.absent, **pair.others)


@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("mmu", ["shadow", "ept"])
@pytest.mark.benchmark(group="MMIO accesses in a batch, mmio spte")
def bench_mmio_batch(against: Any, pairs: Callable[[str, int], Pair], quick: bool, mmu: str, slots: int) -> None:
    skip_large(slots, quick)
    pair = pairs(mmu, slots)
    against(pair.cached.batch, items=N, record=pair.cached.one_page, slow=pair.off.batch)
    assert (pair.cached.out["outcome"] == km.Outcome.MMIO).all()


@pytest.mark.parametrize("mmu", ["shadow", "ept"])
@pytest.mark.benchmark(group="MMIO fault served by the mmio spte, by reader protocol")
def bench_mmio_protocol(against: Any, build_pyx: Callable[..., ModuleType], mmu: str) -> None:
    """The exchange, beside the plain store of membarrier and beside a build that marks nothing."""
    layout = Layout(32)
    exchange, plain = (Guest(mmu, layout, "generation", protocol) for protocol in ("exchange", "membarrier"))
    if plain.vm.reader_protocol != "membarrier":
        pytest.skip("this system has no membarrier(2)")
    kernels, unmarked = build_pyx("mmio_kernels"), build_pyx("mmio_kernels", "KVMMMU_NO_LOCKS")
    against(
        faults(kernels, layout, exchange, exchange.addresses, CACHED),
        items=N,
        membarrier=faults(kernels, layout, plain, plain.addresses, CACHED),
        unmarked=faults(unmarked, layout, exchange, exchange.addresses, CACHED),
    )
