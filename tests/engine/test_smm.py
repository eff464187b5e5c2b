"""A vCPU in system management mode: its memory is the slots of address space 1, its trees are its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.errors import ArgumentError, InvariantError
from machine import DATA, FLAT, LONG, MMIO, Machine

OK, IO = km.Outcome.OK, km.Outcome.MMIO
SMRAM = 0xA_0000
FLAVOURS = [("shadow", False), ("ept", True), ("ept", False), ("npt", True), ("npt", False)]


def machine(mmu: str, tdp_mmu: bool, **how: object) -> Machine:
    """Address space 1 has the same RAM, and its own page at SMRAM, where the other has a device."""
    m = Machine(mmu, FLAT, **({"tdp_mmu": tdp_mmu} if mmu != "shadow" else {}), ram=SMRAM, **how)
    m.vm.memslots.create(gpa=0, memory=m.ram, as_id=1)
    m.vm.memslots.create(gpa=SMRAM, memory=np.full(4096, 0x5A, np.uint8), as_id=1)
    return m


@pytest.fixture(params=FLAVOURS, ids=str)
def smm(request: pytest.FixtureRequest) -> Iterator[Machine]:
    m = machine(*request.param)
    yield m
    m.vm.check()


def test_memory_is_what_the_address_space_says(smm: Machine) -> None:
    assert smm.access(SMRAM).outcome is IO
    smm.vcpu.smm = True
    assert smm.vcpu.smm
    # KVM's own: the record of the device page outlives the change, so another page is asked for first.
    assert smm.access(MMIO).outcome is IO
    assert smm.vcpu.read(SMRAM, 1) == b"\x5a"
    smm.vcpu.write(0x1000, b"kvmmmu")
    smm.vcpu.smm = False
    assert smm.access(SMRAM).outcome is IO
    assert smm.vcpu.read(0x1000, 6) == b"kvmmmu"


def test_each_address_space_has_a_tree_that_is_found_again(smm: Machine) -> None:
    smm.access(0x1000, "w")
    smm.vcpu.smm = True
    count = smm.count("pf_taken")
    smm.access(0x1000, "w")
    assert count["pf_taken"] == 1
    smm.vcpu.smm = False
    smm.access(0x1000, "w")
    smm.vcpu.smm = True
    smm.access(0x1000, "w")
    assert count["pf_taken"] == 1


def test_the_log_of_a_slot_protects_the_trees_of_its_address_space(smm: Machine) -> None:
    for on in (True, False):
        smm.vcpu.smm = on
        smm.access(0x1000, "w")
    slot = smm.vm.memslots.at(0x1000, as_id=1)
    assert slot is not None
    smm.vm.memslots.set_flags(slot, log_dirty=True)
    count = smm.count("pf_taken")
    smm.access(0x1000, "w")
    assert count["pf_taken"] == 0
    smm.vcpu.smm = True
    smm.access(0x1000, "w")
    assert count["pf_taken"] == 1
    assert smm.vm.get_dirty_log(slot)[0]
    # What the other address space wrote is not in this log.
    smm.vcpu.smm = False
    smm.access(0x2000, "w")
    assert not smm.vm.get_dirty_log(slot).any()


def test_a_deleted_slot_of_one_address_space_leaves_the_other_its_memory(smm: Machine) -> None:
    smm.vcpu.smm = True
    smm.access(SMRAM)
    slot = smm.vm.memslots.at(SMRAM, as_id=1)
    assert slot is not None
    smm.vm.memslots.delete(slot)
    assert smm.access(SMRAM).outcome is IO
    assert smm.access(0x1000).outcome is OK
    smm.vcpu.smm = False
    assert smm.access(0x1000).outcome is OK


def test_a_reset_vcpu_is_out_of_smm(smm: Machine) -> None:
    smm.vcpu.smm = True
    smm.vcpu.init()
    assert not smm.vcpu.smm


@pytest.mark.parametrize("tdp_mmu", [True, False])
def test_the_record_of_the_last_mmio_page_goes_by_address_space_0_as_in_kvm(tdp_mmu: bool) -> None:
    m = machine("ept", tdp_mmu)
    m.vcpu.smm = True
    assert m.vcpu.access(MMIO).outcome is IO
    m.vm.memslots.create(gpa=MMIO, memory=np.zeros(4096, np.uint8), as_id=1)
    # The spte is of an old generation, but nobody looks at it: the record is thought current.
    assert m.vcpu.access(MMIO).outcome is IO
    m.vm.check()
    with pytest.raises(InvariantError, match="address space 0"):
        m.vm.check(holes=True)
    # Any change of address space 0 ends it.
    m.vm.memslots.create(gpa=MMIO << 1, memory=np.zeros(4096, np.uint8))
    assert m.vcpu.access(MMIO).outcome is OK


def test_smm_in_the_middle_of_a_guest_of_the_guest_is_refused() -> None:
    m = Machine("shadow", LONG)
    m.vcpu.enter_guest_mode(m.cr3)
    with pytest.raises(ArgumentError, match="guest mode"):
        m.vcpu.smm = True
    assert m.vcpu.smm is False


def test_paging_in_smm_reads_the_tables_of_its_own_memory() -> None:
    m = Machine("shadow", LONG)
    m.map(0x40_0000, DATA)
    other = m.ram.copy()
    m.vm.memslots.create(gpa=0, memory=other, as_id=1)
    assert m.access(0x40_0000).gpa == DATA
    m.vcpu.smm = True
    other[m.entry_gpa(0x40_0000) + 1] ^= 0x10
    assert m.access(0x40_0000).gpa == DATA ^ 0x1000
    m.vcpu.smm = False
    assert m.access(0x40_0000).gpa == DATA
