"""Hosts that encrypt memory (SME): the C-bit in KVM's own mappings, and the processor that reads past it."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.errors import ArgumentError, MemslotError
from kvmmmu.sptes import SpteFormat
from machine import DATA, FLAT, LONG, MMIO, PAE3, PAGING, USER, Machine
from scene import IO, OK

C = 1 << 47
HOST = km.HostCpu(vendor="amd", maxphyaddr=48, phys_bits=43, c_bit=47)
KINDS = [("shadow", True), ("npt", True), ("npt", False)]
kinds = pytest.mark.parametrize(("mmu", "tdp_mmu"), KINDS)
modes = pytest.mark.parametrize("mode", [FLAT, *PAGING], ids=lambda mode: mode.name)
MiB = 1 << 20


def words(m: Machine) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Every entry that maps or links, PAE roots too, and every other one."""
    tables = m.vm.page_tables(m.vcpu, all=True)
    used = tables.sptes >> np.uint64(11) & np.uint64(1) == 1
    used |= (tables.records["special"] != 0)[:, None] & (tables.sptes != 0)
    return tables.sptes[used], tables.sptes[~used]


@kinds
@modes
def test_every_mapping_and_link_carries_the_c_bit_and_the_data_is_where_it_was(
    mmu: str, tdp_mmu: bool, mode: Any
) -> None:
    m = Machine(mmu, mode, tdp_mmu=tdp_mmu, host=HOST)
    gva = DATA if mode is FLAT else mode.user
    if mode is not FLAT:
        m.map(gva, DATA)
    assert m.access(gva + 8, "w", size=4, value=0x1234).outcome is OK
    assert m.peek(DATA + 8, 4) == 0x1234
    m.poke(DATA + 8, 0x5678, 4)
    assert m.vcpu.read(gva + 8, 4) == (0x5678).to_bytes(4, "little")
    used, _ = words(m)
    assert used.size >= 2
    assert np.all(used & np.uint64(C) == np.uint64(C))


@kinds
def test_an_mmio_spte_is_what_it_was_and_still_answers(mmu: str, tdp_mmu: bool) -> None:
    mode = LONG if mmu == "shadow" else FLAT
    sptes = []
    for sme in (True, False):
        m = Machine(mmu, mode, tdp_mmu=tdp_mmu, host=replace(HOST, sme=sme))
        gva = mode.user if mmu == "shadow" else MMIO
        if mmu == "shadow":
            m.map(gva, MMIO)
        count = m.count("pf_mmio_spte_created", "mmio_cache_hit")
        assert [m.access(gva).outcome for _ in range(2)] == [IO, IO]
        assert count.grown() == {"pf_mmio_spte_created": 1, "mmio_cache_hit": 1}
        sptes.append(m.vcpu.walk_sptes(gva)[-1][1])
    assert sptes[0] == sptes[1]
    assert m.vm.spte_format.mmio_decode(sptes[0]).gfn == MMIO >> 12


@kinds
@pytest.mark.parametrize("host", [km.HostCpu(vendor="amd"), replace(HOST, sme=False)], ids=["none", "unused"])
def test_a_kernel_that_does_not_encrypt_sets_no_bit(mmu: str, tdp_mmu: bool, host: km.HostCpu) -> None:
    m = Machine(mmu, FLAT, tdp_mmu=tdp_mmu, host=host)
    m.access(DATA, "w")
    used, _ = words(m)
    assert used.size and not np.any(used & np.uint64(C))


@kinds
def test_pages_keep_the_bit_through_splitting_protecting_and_taking_back(mmu: str, tdp_mmu: bool) -> None:
    m = Machine(mmu, FLAT, tdp_mmu=tdp_mmu, host=HOST, page_size="2M", nx_huge_pages=True)
    m.access(DATA, "w")
    m.access(DATA + 2 * MiB, "x")
    m.vm.memslots.set_flags(m.slot, log_dirty=True)
    m.access(DATA, "w")
    assert int(m.vm.get_dirty_log(m.slot)[DATA >> 18]) & 1
    m.access(DATA, "r")
    m.vm.host_dontneed(m.slot, first_page=(DATA >> 12) + 1, npages=3)
    m.access(DATA + 4096, "r")
    m.vm.memslots.set_flags(m.slot, log_dirty=False)
    m.access(DATA, "r")
    used, empty = words(m)
    assert np.all(used & np.uint64(C) == np.uint64(C))
    assert not empty.any()


@kinds
def test_writing_through_an_existing_leaf_is_spurious_and_not_another_frame(mmu: str, tdp_mmu: bool) -> None:
    m = Machine(mmu, LONG, tdp_mmu=tdp_mmu, host=HOST)
    m.map(m.mode.user, DATA)
    m.access(m.mode.user, "w")
    m.vcpu = m.vm.create_vcpu()
    m.start()
    before = m.vm.stats["remote_tlb_flush_requests"]
    m.access(m.mode.user, "w")
    assert m.vm.stats["remote_tlb_flush_requests"] == before
    assert m.vm.stats["pages_4k"] >= 1


@kinds
def test_cached_translations_lead_to_the_same_frames(mmu: str, tdp_mmu: bool) -> None:
    m = Machine(mmu, LONG, tdp_mmu=tdp_mmu, host=HOST, tlb=km.Tlb())
    m.map(m.mode.user, DATA)
    for value in (7, 9):
        m.access(m.mode.user, "w", size=1, value=value)  # after each, every cached frame is compared with the tables
        assert m.ram[DATA] == value


@pytest.mark.parametrize(("c_bit", "fits"), [(32, False), (33, True), (40, True)])
def test_no_frame_reaches_the_c_bit(c_bit: int, fits: bool) -> None:
    # The tables stand in the lowest 4 GiB.
    m = km.VM("npt", host=replace(HOST, c_bit=c_bit))
    memory = np.zeros(4 * MiB, np.uint8)
    if not fits:
        with pytest.raises(MemslotError):
            m.memslots.create(gpa=0, memory=memory)
        return
    m.memslots.create(gpa=0, memory=memory)
    vcpu = m.create_vcpu()
    assert vcpu.access(0x1000, "w").outcome is OK
    (leaf,) = [e for page in m.page_tables() for e in page.entries if e.kind == "leaf"]
    assert leaf.spte >> c_bit & 1 and leaf.ref < 1 << c_bit - 12
    m.check()


def test_the_bit_is_said_in_words_and_left_out_of_frame_numbers() -> None:
    m = Machine("npt", FLAT, host=HOST)
    m.access(DATA, "w")
    (leaf,) = [e for page in m.vm.page_tables() for e in page.entries if e.kind == "leaf"]
    words = m.vm.spte_format.decode(leaf.spte)
    assert words.facts["encrypted"] is True
    assert words.facts["pfn"] == leaf.ref == (leaf.spte & ~C & (1 << 52) - 1) >> 12
    assert "encrypted yes; rights RWXU" in m.vcpu.explain_sptes(DATA)
    assert m.vm.spte_format.decode(leaf.spte & ~C).facts["encrypted"] is False
    assert "encrypted" not in SpteFormat.of(km.HostCpu(vendor="amd"), "npt").decode(leaf.spte).facts


def test_the_bit_is_not_reserved_and_its_neighbours_are() -> None:
    form = SpteFormat.of(HOST, "npt")
    leaf = 1 << 11 | 0x67 | 0x1234 << 12
    assert [bit for bit in range(40, 52) if form.is_reserved(leaf | 1 << bit)] == [43, 44, 45, 46, 48, 49, 50, 51]
    assert (form.masks["me"], form.masks["address"]) == (C, (1 << 52) - 4096 - C)
    assert SpteFormat.of(replace(HOST, sme=False), "npt").masks["me"] == 0
    # An entry that only the C-bit marks would not fault, and looks like a mapping.
    with pytest.raises(ArgumentError, match="would not fault"):
        km.VM("npt", host=replace(HOST, mmio_masks=(C | 1, C | 1, 6)))


def test_pae_roots_carry_it_too() -> None:
    m = Machine("shadow", PAE3, host=HOST)
    m.map(m.mode.user, DATA, USER)
    m.access(m.mode.user)
    (roots,) = [page for page in m.vm.page_tables() if page.special]
    assert [e.spte & ~0xFFFFF000 for e in roots.entries] == [C | 1] * 4
    assert [e.ref < 1 << 20 for e in roots.entries] == [True] * 4


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs /proc/self/mem to break an spte")
@kinds
@pytest.mark.parametrize("bit", [34, 42])
def test_a_broken_address_in_an_upper_entry_leaves_the_lockless_walk_in_the_arena(
    mmu: str, tdp_mmu: bool, bit: int
) -> None:
    from planted import planted

    m = Machine(mmu, FLAT, tdp_mmu=tdp_mmu, host=HOST)
    m.access(DATA)
    whole = m.vcpu.walk_sptes(DATA)
    with planted(m.vcpu, DATA, 2, 1 << bit):
        assert m.vcpu.walk_sptes(DATA)[-1] == whole[-1]
