"""Corners of the machine where a wrong step corrupts memory, books or answers."""

from __future__ import annotations

import numpy as np
import pytest
from machine import FLAT, LMA, LME, LONG, MMIO, MMUS, NXE, PAE, PE, PG, RAM, Machine

import kvmmmu as km
from kvmmmu.errors import GuestFaultError

MAP = 0x40_0000
HUGE = 0x4000_0000


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("size", [9, 16, 64])
def test_a_store_wider_than_eight_bytes_goes_to_a_device_whole(mmu: str, size: int) -> None:
    machine = Machine(mmu)
    machine.map(MAP, MMIO)
    result = machine.access(MAP, "w", size=size, value=(1 << 8 * size) - 1)
    assert result.outcome is km.Outcome.MMIO
    assert result.mmio == ((MMIO, size),)
    assert result.exits < 10


@pytest.mark.parametrize("mmu", MMUS)
def test_frames_given_back_to_the_host_are_present_for_the_next_slot(mmu: str) -> None:
    vm = km.VM(mmu=mmu)  # type: ignore[arg-type]
    slot = vm.memslots.create(gpa=0, memory=np.ones(4 * 4096, np.uint8))
    vm._core.host_pages(slot.id, 0, 4, False)
    vm.memslots.delete(slot)
    vm.memslots.create(gpa=0, memory=np.full(4 * 4096, 7, np.uint8))
    vcpu = vm.create_vcpu()
    vcpu.set_sregs(cr0=PE)
    assert vcpu.read(0x1000, 4) == b"\7\7\7\7"


def test_a_split_for_an_executable_page_is_not_counted_once_its_shadow_page_went() -> None:
    machine = Machine("shadow", LONG, page_size="2M", nx_huge_pages=True)
    machine.map(HUGE, RAM // 2, level=2)
    machine.access(HUGE, "x")
    assert machine.vm.stats["nx_lpage_splits"] == 1
    machine.vm.memslots.delete(machine.slot)
    assert machine.vm.stats["nx_lpage_splits"] == 0


def test_an_instruction_of_32_bit_code_has_32_bit_addresses() -> None:
    machine = Machine("shadow", FLAT)
    machine.poke(0x1000, 0x1234, 8)
    nothing = lambda gpa, size: b""  # noqa: E731
    result, _, exits, value = machine.vcpu.run_insn(
        0, (1 << 32) + 0x1000, 8, 0, 0, 0, 0x2000, 3, 0, False, False, 0, nothing
    )
    machine.vm.check()
    assert (result.outcome, result.gpa, exits, value) == (km.Outcome.OK, 0x1000, [], 0x1234)


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize(("cr4", "efer"), [(0, LMA), (PAE, LMA | NXE), (PAE, LME)])
def test_sregs_whose_lma_does_not_follow_from_lme_and_pg_are_refused(mmu: str, cr4: int, efer: int) -> None:
    machine = Machine(mmu)
    before = machine.vcpu.regs
    with pytest.raises(GuestFaultError):
        machine.vcpu.set_sregs(cr0=PE | PG, cr4=cr4, efer=efer)
    assert machine.vcpu.regs == before
