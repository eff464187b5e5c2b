"""Accesses that KVM carries out itself: across pages, half memory and half device, faulting in the middle."""

from __future__ import annotations

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.errors import GuestFaultError, MmioUnhandledError
from machine import DATA, FLAT, LONG, MMIO, MMUS, PAGING, USER, A, D, Machine, Mode, P, U, W

OK, IO, PF, ERROR = km.Outcome.OK, km.Outcome.MMIO, km.Outcome.PF, km.Outcome.INTERNAL_ERROR
modes = pytest.mark.parametrize("mode", PAGING, ids=lambda mode: mode.name)
mmus = pytest.mark.parametrize("mmu", MMUS)


def two_pages(mmu: str, mode: Mode, first: int, second: int, bits: int = USER) -> Machine:
    m = Machine(mmu, mode)
    m.map(mode.user, first)
    m.map(mode.user + 0x1000, second, bits)
    return m


@mmus
@modes
@pytest.mark.parametrize("warm", [False, True])
def test_a_device_access_across_pages_is_two_pieces(mmu: str, mode: Mode, warm: bool) -> None:
    m = two_pages(mmu, mode, MMIO, MMIO + 0x5000)
    if warm:
        m.access(mode.user)
        m.access(mode.user + 0x1000)
    for kind in "rw":
        result = m.access(mode.user + 0xFFD, kind, size=8)
        assert (result.outcome, result.mmio) == (IO, ((MMIO + 0xFFD, 3), (MMIO + 0x5000, 5)))


@mmus
@modes
@pytest.mark.parametrize("device_first", [False, True])
def test_half_memory_half_device_moves_each_half_where_it_belongs(mmu: str, mode: Mode, device_first: bool) -> None:
    pages = (MMIO, DATA) if device_first else (DATA, MMIO)
    m = two_pages(mmu, mode, *pages)
    seen: dict[int, int] = {}
    m.vm.mmio.register(
        MMIO,
        0x1000,
        read=lambda gpa, size: int.from_bytes(b"DEVICE!!"[:size], "little"),
        write=lambda gpa, size, value: seen.__setitem__(gpa, value),
    )
    gva = mode.user + 0xFFC
    ram = DATA if device_first else DATA + 0xFFC
    device = MMIO + 0xFFC if device_first else MMIO
    m.vcpu.write(gva, b"abcdEFGH")
    m.vm.check()
    mine, its = (b"EFGH", b"abcd") if device_first else (b"abcd", b"EFGH")
    assert m.ram[ram : ram + 4].tobytes() == mine
    assert seen == {device: int.from_bytes(its, "little")}
    expected = b"DEVI" + mine if device_first else mine + b"DEVI"
    assert m.vcpu.read(gva, 8) == expected


@mmus
@modes
@pytest.mark.parametrize("kind", ["r", "w"])
def test_a_fault_in_the_second_page_comes_before_any_exit_of_the_first(mmu: str, mode: Mode, kind: str) -> None:
    m = two_pages(mmu, mode, MMIO, DATA, USER & ~P)
    for _ in range(2):
        result = m.access(mode.user + 0xFFC, kind, size=8)
        assert (result.outcome, result.gva, result.mmio) == (PF, mode.user + 0x1000, ())
        assert result.error_code == (2 if kind == "w" else 0)
    assert m.vm.stats["mmio_exits"] == 0


@mmus
@modes
def test_a_fault_in_the_first_page_names_the_first(mmu: str, mode: Mode) -> None:
    m = Machine(mmu, mode)
    m.map(mode.user + 0x1000, MMIO)
    result = m.access(mode.user + 0xFFC, size=8)
    assert (result.outcome, result.gva) == (PF, mode.user + 0xFFC)


@mmus
@modes
def test_memory_across_pages_needs_both(mmu: str, mode: Mode) -> None:
    m = two_pages(mmu, mode, DATA, DATA + 0x5000, P | U | A | D)
    result = m.access(mode.user + 0xFFC, "w", size=8, value=(1 << 64) - 1, cpl=3)
    assert (result.outcome, result.error_code, result.gva) == (PF, 7, mode.user + 0x1000)
    assert not m.ram[DATA + 0xFFC : DATA + 0x1000].any()  # nothing was stored
    assert m.access(mode.user + 0xFFC, "r", size=8, cpl=3).outcome is OK


@mmus
@modes
def test_a_fetch_from_a_device_ends_the_vm_with_an_internal_error(mmu: str, mode: Mode) -> None:
    m = two_pages(mmu, mode, MMIO, DATA)
    for _ in range(2):
        count = m.count("insn_emulation", "insn_emulation_fail", "mmio_exits")
        result = m.access(mode.user, "x")
        assert (result.outcome, result.mmio) == (ERROR, ())
        assert count.grown() == {"insn_emulation": 1, "insn_emulation_fail": 1}
    assert m.access(mode.user, "r").outcome is IO
    assert m.access(mode.user + 0x1000, "x").outcome is OK


@mmus
def test_a_fetch_from_nowhere_without_paging_is_an_internal_error(mmu: str) -> None:
    m = Machine(mmu, FLAT)
    assert m.access(MMIO, "x").outcome is ERROR


@mmus
@modes
def test_the_local_apics_page_is_a_device_even_where_memory_stands(mmu: str, mode: Mode) -> None:
    m = two_pages(mmu, mode, 0xFEE0_0000, MMIO)
    m.vm.memslots.create(gpa=0xFEE0_0000, memory=np.zeros(4096, np.uint8), readonly=True)
    # Only an emulated access meets the rule: a read-only slot sends writes there.
    assert m.access(mode.user, "w").mmio == ((0xFEE0_0000, 1),)
    assert m.access(mode.user, "r").outcome is OK


@mmus
def test_a_device_that_nobody_registered_is_told_by_its_address(mmu: str) -> None:
    m = two_pages(mmu, LONG, MMIO, DATA)
    with pytest.raises(MmioUnhandledError, match=f"{MMIO + 8:#x}") as caught:
        m.vcpu.read(m.mode.user + 8, 4)
    assert caught.value.result.mmio == ((MMIO + 8, 4),)
    with pytest.raises(GuestFaultError) as fault:
        m.vcpu.write(m.mode.user + 0x20_0000, b"x")
    assert fault.value.result.outcome is PF


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 16, 32, 64])
@mmus
def test_every_size_reaches_a_device_whole(mmu: str, size: int) -> None:
    m = two_pages(mmu, LONG, MMIO, MMIO + 0x1000)
    assert m.access(m.mode.user + 0x100, "w", size=size, value=(1 << 8 * size) - 1).mmio == ((MMIO + 0x100, size),)


@mmus
def test_the_last_byte_of_the_address_space_is_followed_by_the_first(mmu: str) -> None:
    m = Machine(mmu, LONG)
    m.map(0xFFFF_FFFF_FFFF_F000, DATA)
    m.map(0, DATA + 0x1000)
    result = m.access(0xFFFF_FFFF_FFFF_FFFF, "w", size=2, value=0x0201)
    assert result.outcome is OK
    assert (m.ram[DATA + 0xFFF], m.ram[DATA + 0x1000]) == (1, 2)
    m.map(0xFFFF_FFFF_FFFF_E000, MMIO)


@mmus
def test_in_32_bit_code_the_end_of_4_gib_is_followed_by_0(mmu: str) -> None:
    m = Machine(mmu, FLAT)
    m.vm.memslots.create(gpa=0xFFFF_F000, memory=np.zeros(4096, np.uint8))
    result = m.access(0xFFFF_FFFF, "w", size=2, value=0x0201)
    assert (result.outcome, m.ram[0]) == (OK, 2)
    m.vm.memslots.delete(m.slot)
    assert m.access(0xFFFF_FFFF, "r", size=2).mmio == ((0, 1),)


def test_what_kvm_cannot_fetch_is_tried_again_where_the_first_fault_left_no_record() -> None:
    m = Machine("shadow", LONG)
    m.map(0, MMIO, USER & ~W)
    # gva 0 is never remembered; the write that KVM assumes is refused, which it leaves to the processor to find out.
    again = m.vcpu.execute("fetch", 0, code_gva=0).result
    assert (again.outcome, again.exits) == (ERROR, 2)
    other = Machine("shadow", LONG)
    other.map(0, MMIO)
    once = other.vcpu.execute("fetch", 0, code_gva=0).result
    assert (once.outcome, once.exits) == (ERROR, 1)
