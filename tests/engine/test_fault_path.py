"""What faults and passes over many pages cost: nothing is allocated, nothing beyond the range is touched."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.check import Snapshot
from kvmmmu.records import ACCESS
from machine import DATA, FLAT, LONG, MMUS, P32, RAM, USER, Machine, Mode

PAGES = RAM >> 12
ENGINE = Path(km.__file__).parent / "engine"
#: Rooms where memory is asked for: a machine, a vCPU, its TLB, and the tables of slots.
MAY_ALLOCATE = {"birth", "hostmem", "memmap", "memslots", "region", "reserve", "slotsets", "tlbcache"}


def touch(m: Machine, gpas: np.ndarray, kind: str = "w") -> np.ndarray:
    """Exits of an access to each address."""
    out = m.vcpu.access_many(gpas, kind)
    assert (out["outcome"] == km.Outcome.OK).all()
    return out["exits"].copy()


def every_page() -> np.ndarray:
    return np.arange(PAGES, dtype=np.uint64) * np.uint64(4096)


def test_only_rooms_that_make_machines_or_change_slots_ask_for_memory() -> None:
    asking = {
        room.stem
        for room in ENGINE.glob("*.pxd")
        if re.search(r"\b(malloc|calloc|realloc|aligned_alloc|mmap)\(", room.read_text())
    }
    assert asking <= MAY_ALLOCATE


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("mode", [FLAT, LONG, P32], ids=lambda mode: mode.name)
def test_faults_in_steady_state_take_nothing_new_from_the_arena(mmu: str, mode: Mode) -> None:
    m = Machine(mmu, mode)
    used = []
    for _ in range(4):
        touch(m, every_page() + np.uint64(mode.window))
        m.vm.memslots.move(m.slot, 1 << 30)
        m.slot = m.vm.memslots.move(m.slot, 0)
        snapshot = Snapshot(m.vm._core.snapshot())
        used.append((len(snapshot.pages), len(snapshot.descs)))
    assert used[1:] == used[:-1]


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def slack(pages: int) -> float:
    """What a page's share may be off by: three columns grow, each by whole pages of the host's choice."""
    chosen = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    lump = 2 << 20 if chosen.exists() and "[always]" in chosen.read_text() else 4096
    return 128 + 3 * lump / pages


def test_a_direct_shadow_page_takes_4_kib_and_an_eighth_of_a_kib() -> None:
    # 4,096 of sptes, 64 of metadata, 64 of unsync bits; the column of guest frames is never touched.
    blocks = 2048
    ram = np.zeros((blocks << 21) + 4096, np.uint8)
    at = -ram.ctypes.data % 4096
    vm = km.VM("ept")
    vm.memslots.create(gpa=0, memory=ram[at : at + (blocks << 21)])
    vcpu = vm.create_vcpu()
    gpas = np.arange(blocks, dtype=np.uint64) << np.uint64(21)
    kinds, out = np.zeros(blocks, np.uint8), np.zeros(blocks, ACCESS)
    vcpu.access_into(gpas[:64], kinds[:64], out[:64], 0, 1)
    before = resident()
    vcpu.access_into(gpas, kinds, out, 0, 1)
    grown = (resident() - before) / (blocks - 64)
    assert (out["outcome"] == km.Outcome.OK).all()
    assert 4096 <= grown < 4224 + slack(blocks - 64), grown


def test_an_indirect_shadow_page_takes_a_second_4_kib_for_the_frames_it_maps() -> None:
    tables = 1500
    m = Machine("shadow", LONG, ram=2 * RAM, start=False)
    for n in range(tables):
        m.map((1 << 39) + (n << 21), DATA)
    m.start()
    gvas = (1 << 39) + (np.arange(tables, dtype=np.uint64) << np.uint64(21))
    m.vm.set_nr_mmu_pages(4 * tables)
    touch(m, gvas[:64])
    before, pages = resident(), m.vm.stats["mmu_cache_miss"]
    touch(m, gvas)
    # One of its 512 reverse-map words may bring in a page of a list block besides.
    grown = (resident() - before) / (m.vm.stats["mmu_cache_miss"] - pages)
    assert 8192 <= grown < 8320 + 384 + slack(tables), grown


@pytest.mark.parametrize("tdp_mmu", [True, False])
@pytest.mark.parametrize(
    ("first", "n"), [(0, 1), (511, 2), (512, 512), (513, 510), (1023, 1), (1023, 514), (PAGES - 1, 1), (0, PAGES)]
)
def test_pages_given_back_are_those_of_the_range_and_no_others(tdp_mmu: bool, first: int, n: int) -> None:
    m = Machine("ept", FLAT, tdp_mmu=tdp_mmu)
    touch(m, every_page())
    m.vm.host_dontneed(m.slot, first_page=first, npages=n)
    assert m.vm.stats["pages_4k"] == PAGES - n
    exits = touch(m, every_page(), "w")
    mapped_again = np.flatnonzero(exits)
    assert len(mapped_again) and mapped_again.min() >= first and mapped_again.max() < first + n
    m.vm.check()


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("word", [0, 7, 8, 9, PAGES // 64 - 1])
def test_clearing_the_log_protects_the_pages_of_its_bits_and_no_others(mmu: str, word: int) -> None:
    m = Machine(mmu, FLAT)
    m.vm.set_manual_dirty_protect()
    m.vm.memslots.set_flags(m.slot, log_dirty=True)
    touch(m, every_page())
    bits = np.array([0x8000_0000_0001_0001], np.uint64)
    m.vm.clear_dirty_log(m.slot, bits, first_page=64 * word, npages=64)
    exits = touch(m, every_page())
    assert np.flatnonzero(exits).tolist() == [64 * word, 64 * word + 16, 64 * word + 63]
    m.vm.check()


@pytest.mark.parametrize("mode", [LONG, P32], ids=lambda mode: mode.name)
def test_synchronising_a_page_looks_for_its_tables_slot_once(mode: Mode) -> None:
    m = Machine("shadow", mode)
    gvas = mode.user + np.arange(512, dtype=np.uint64) * np.uint64(4096)
    for gva in gvas.tolist():
        m.map(gva, DATA)
    touch(m, gvas)
    m.set_entry(mode.user, DATA + 0x1000 | USER)  # the table is unsync from now on
    assert m.vm.stats["mmu_unsync"] == 1
    before = m.vm.stats["slot_search"]
    m.vcpu.sync_roots()
    assert m.vm.stats["mmu_unsync"] == 0
    # One for each frame that is mapped, one for the table.
    assert 512 <= m.vm.stats["slot_search"] - before <= 514
    assert m.access(mode.user).gpa == DATA + 0x1000
