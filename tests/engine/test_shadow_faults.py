"""Shadow paging: what a fault builds, in every format of guest tables."""

from __future__ import annotations

from dataclasses import replace

import pytest

import kvmmmu as km
from machine import (
    DATA,
    FLAT,
    LONG,
    LONG5,
    MODES,
    NXE,
    P32,
    PAE3,
    PAGING,
    PG,
    PKE,
    PSE,
    SMAP,
    SMEP,
    USER,
    WP,
    A,
    D,
    Machine,
    Mode,
    P,
    U,
    W,
    reference,
)

OK, PF, GP = km.Outcome.OK, km.Outcome.PF, km.Outcome.GP
name = pytest.mark.parametrize("mode", PAGING, ids=lambda mode: mode.name)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_a_fault_maps_the_page_and_the_next_access_does_not_exit(mode: Mode) -> None:
    m = Machine("shadow", mode)
    gva = mode.user if mode.levels else DATA
    if mode.levels:
        m.map(gva, DATA)
    count = m.count()
    first, second = m.access(gva + 5), m.access(gva + 7, "w")
    assert (first.outcome, first.gpa, first.path, first.exits) == (OK, DATA + 5, km.Path.FAULT, 1)
    assert (second.outcome, second.gpa, second.path, second.exits) == (OK, DATA + 7, km.Path.HARDWARE, 0)
    assert (count["pf_taken"], count["pf_fixed"], count["pf_guest"]) == (1, 1, 0)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_data_goes_where_the_guest_put_it(mode: Mode) -> None:
    m = Machine("shadow", mode)
    gva = mode.user if mode.levels else DATA
    if mode.levels:
        m.map(gva, DATA + 0x1000)
        m.map(gva + 0x1000, DATA)
    m.vcpu.write(gva + 0xFF8, bytes(range(16)))
    m.vm.check()
    assert m.vcpu.read(gva + 0xFF8, 16) == bytes(range(16))
    low, high = (DATA + 0x1000, DATA) if mode.levels else (DATA, DATA + 0x1000)
    assert m.ram[low + 0xFF8 : low + 0x1000].tobytes() == bytes(range(8))
    assert m.ram[high : high + 8].tobytes() == bytes(range(8, 16))


@name
def test_the_shadow_of_each_guest_table_is_one_page_and_is_found_again(mode: Mode) -> None:
    m = Machine("shadow", mode)
    other = m.new_space()
    m.open_window(other)
    m.map(mode.user, DATA)
    where = m.entry_gpa(mode.user, 2 if mode is not P32 else 1)
    m.access(mode.user)
    count = m.count("mmu_cache_miss")
    m.load_cr3(other)
    m.access(mode.window)
    m.load_cr3(m.cr3)
    m.access(mode.user)
    tops = {LONG: 1, LONG5: 1, PAE3: 4, P32: 4}[mode]  # pages of the other root
    below = {LONG: 3, LONG5: 4, PAE3: 1, P32: 1}[mode]  # its window's tables
    assert count["mmu_cache_miss"] == tops + below
    assert m.peek(where) & P


@name
def test_a_page_not_present_is_the_guests_own_fault(mode: Mode) -> None:
    m = Machine("shadow", mode)
    m.map(mode.user, DATA, USER & ~P)
    count = m.count()
    for kind, code in (("r", 0), ("w", 2)):
        result = m.access(mode.user + 1, kind)
        assert (result.outcome, result.error_code, result.gva) == (PF, code, mode.user + 1)
    assert m.access(mode.user, "r", cpl=3).error_code == 4
    assert (count["pf_guest"], count["pf_fixed"]) == (3, 0)


@name
@pytest.mark.parametrize("nx", [False, True])
def test_the_fetch_bit_of_an_error_code_needs_nx(mode: Mode, nx: bool) -> None:
    m = Machine("shadow", mode)
    m.start(efer=mode.efer | NXE if nx else mode.efer & ~NXE)
    assert m.access(mode.user, "x").error_code == (0x10 if nx else 0)


@name
@pytest.mark.parametrize("bits", [P | A | D, P | W | A | D, P | U | A | D, P | W | U | A | D])
@pytest.mark.parametrize("wp", [False, True])
@pytest.mark.parametrize("first", ["r", "w"])
def test_every_access_is_permitted_as_a_plain_walk_permits_it(mode: Mode, bits: int, wp: bool, first: str) -> None:
    m = Machine("shadow", mode)
    m.map(mode.user, DATA, bits)
    if not wp:
        m.vcpu.mov_cr0(mode.cr0 & ~WP)
    for kind, cpl in ((first, 0), ("r", 3), ("w", 0), ("w", 3), ("r", 0), ("x", 3), ("w", 0)):
        walk = reference(m).walk_result(mode.user, kind, cpl)
        result = m.access(mode.user, kind, cpl=cpl)
        assert (result.outcome is OK) == walk.ok, (kind, cpl, result)
        if not walk.ok:
            assert result.error_code == walk.error_code


@pytest.mark.parametrize("mode", [PAE3, LONG, LONG5], ids=lambda mode: mode.name)
def test_rights_of_upper_tables_narrow_those_of_the_leaf(mode: Mode) -> None:
    m = Machine("shadow", mode)
    second = mode.user + (1 << m.shift(2))
    m.map(mode.user, DATA)
    shared = m.entry_gpa(mode.user) & ~0xFFF
    # The same table under two directories entries: one allows all, one is for reading only.
    m.poke(m.entry_gpa(second, 2), shared | P | U | A)
    assert m.access(mode.user, "w", cpl=3).outcome is OK
    assert m.access(second, "r", cpl=3).outcome is OK
    assert (m.access(second, "w", cpl=3).outcome, m.access(second, "w", cpl=3).error_code) == (PF, 7)
    assert m.access(mode.user, "w", cpl=3).outcome is OK


@name
def test_the_guests_accessed_bits_are_set_by_the_walk_and_dirty_by_the_first_write(mode: Mode) -> None:
    m = Machine("shadow", mode)
    where = m.map(mode.user, DATA, P | W | U, upper=P | W | U)
    upper = m.entry_gpa(mode.user, 2)
    m.access(mode.user)
    assert (m.peek(where) & (A | D), m.peek(upper) & (A | D)) == (A, A)
    count = m.count()
    m.access(mode.user, "w")
    assert (m.peek(where) & (A | D), m.peek(upper) & (A | D)) == (A | D, A)
    assert count["pf_taken"] == 1  # a clean page is mapped without W, so that KVM sees the write


@name
def test_a_refused_access_sets_nothing(mode: Mode) -> None:
    m = Machine("shadow", mode)
    where = m.map(mode.user, DATA, P | U, upper=P | W | U)
    before = m.ram.copy()
    assert m.access(mode.user, "w", cpl=3).outcome is PF
    assert m.peek(where) & (A | D) == 0
    assert (m.ram == before).all()


@name
def test_neighbours_are_mapped_ahead_up_to_the_first_that_cannot_be(mode: Mode) -> None:
    m = Machine("shadow", mode)
    for i in range(8):
        m.map(mode.user + i * 4096, DATA + i * 4096, USER if i != 5 else P | W | U)
    m.access(mode.user + 2 * 4096)
    assert [m.access(mode.user + i * 4096).exits for i in range(8)] == [0, 0, 0, 0, 0, 1, 0, 0]


@name
def test_neighbours_outside_the_aligned_window_of_eight_are_not(mode: Mode) -> None:
    m = Machine("shadow", mode)
    for i in range(10):
        m.map(mode.user + i * 4096, DATA + i * 4096)
    m.access(mode.user + 7 * 4096)
    assert [m.access(mode.user + i * 4096).exits for i in (0, 6, 8, 9)] == [0, 0, 1, 0]


def test_without_paging_neighbours_are_mapped_in_runs() -> None:
    m = Machine("shadow", FLAT)
    count = m.count("pf_taken")
    for i in range(16):
        m.access(DATA + i * 4096)
    assert count["pf_taken"] == 2


@name
def test_a_supervisor_write_with_wp_0_takes_the_page_from_the_user_and_the_user_takes_it_back(mode: Mode) -> None:
    m = Machine("shadow", mode)
    m.map(mode.user, DATA, P | U | A | D)
    m.vcpu.mov_cr0(mode.cr0 & ~WP)
    assert m.access(mode.user, "w", cpl=0).outcome is OK
    count = m.count()
    assert m.access(mode.user, "w", cpl=0).exits == 0
    assert m.access(mode.user, "r", cpl=3).exits == 1
    assert m.access(mode.user, "w", cpl=3).outcome is PF
    assert m.access(mode.user, "w", cpl=0).exits == 1
    assert count["pf_guest"] == 1


def test_a_page_written_with_wp_0_under_smep_cannot_be_fetched_by_the_supervisor() -> None:
    m = Machine("shadow", LONG)
    m.map(m.mode.user, DATA, P | U | A | D)
    m.vcpu.mov_cr4(m.mode.cr4 | SMEP)
    m.vcpu.mov_cr0(m.mode.cr0 & ~WP)
    assert m.access(m.mode.user, "w", cpl=0).outcome is OK
    result = m.access(m.mode.user, "x", cpl=0)
    assert (result.outcome, result.error_code) == (PF, 0x11)


@pytest.mark.parametrize("ac", [False, True])
@pytest.mark.parametrize("implicit", [False, True])
def test_smap_guards_user_pages_from_the_supervisor(ac: bool, implicit: bool) -> None:
    m = Machine("shadow", LONG)
    m.map(m.mode.user, DATA)
    m.access(m.mode.user, "r", cpl=3)
    m.vcpu.mov_cr4(m.mode.cr4 | SMAP)
    m.vcpu.ac = ac
    result = m.access(m.mode.user, "r", cpl=0, implicit=implicit)
    if ac and implicit:
        # The error code does not tell KVM that the access was implicit: its walk permits, the processor refuses.
        assert result.outcome is km.Outcome.HANG
    else:
        assert result.outcome is (OK if ac else PF)


def test_keys_are_not_offered_with_shadow_paging() -> None:
    m = Machine("shadow", LONG, cpu=km.GuestCpu(pku=True))
    assert not m.vcpu.cpu.pku
    before = m.vcpu.regs
    for load in (m.vcpu.mov_cr4, lambda cr4: m.vcpu.set_sregs(cr4=cr4)):
        with pytest.raises(km.errors.ArgumentError, match="the guest CPU has no pku"):
            load(m.mode.cr4 | PKE)
    # What comes past the Python face (recorded runs) may have the bit, and gets #GP where it would mean something.
    assert not m.vcpu.load_sregs(before.cr0, before.cr3, before.cr4 | PKE, before.efer, 4, before.compat)
    assert m.vcpu.regs == before
    m.vcpu.set_sregs(pkru=4)
    assert not m.vcpu.load_register(4, m.mode.cr4 | PKE)
    assert m.vcpu.regs == replace(before, pkru=4)


@pytest.mark.parametrize("mmu", ["ept", "npt"])
def test_keys_are_offered_with_a_second_dimension(mmu: str) -> None:
    m = Machine(mmu, LONG, cpu=km.GuestCpu(pku=True))
    assert m.vcpu.cpu.pku
    m.vcpu.mov_cr4(m.mode.cr4 | PKE)
    assert m.vcpu.regs.cr4 == m.mode.cr4 | PKE


@pytest.mark.parametrize("mode", [LONG, LONG5], ids=lambda mode: mode.name)
def test_an_address_that_is_not_canonical_is_gp_without_an_exit(mode: Mode) -> None:
    m = Machine("shadow", mode)
    for gva in (1 << (47 if mode is LONG else 56), (1 << 63), mode.window & ~(1 << 63)):
        result = m.access(gva)
        assert (result.outcome, result.exits) == (GP, 0)


@pytest.mark.parametrize("mode", [FLAT, P32, PAE3], ids=lambda mode: mode.name)
def test_outside_64_bit_code_addresses_are_32_bits_wide(mode: Mode) -> None:
    m = Machine("shadow", mode)
    gva = mode.user if mode.levels else DATA
    if mode.levels:
        m.map(gva, DATA)
    assert m.access(gva | 1 << 40).gpa == DATA
    assert m.access(gva).gpa == DATA
    result = m.access(0xFFFF_FFFF, size=2)
    if mode.levels:
        assert (result.outcome, result.gva) == (PF, 0xFFFF_FFFF)
    else:
        assert result.mmio == ((0xFFFF_FFFF, 1),)


def test_compatibility_mode_is_32_bits_wide_too() -> None:
    m = Machine("shadow", LONG)
    m.map(m.mode.user, DATA)
    m.vcpu.set_sregs(compat=True)
    assert m.access(m.mode.user | 1 << 47).gpa == DATA


def test_pse36_reaches_memory_above_4_gib() -> None:
    m = Machine("shadow", P32)
    m.vm.memslots.create(gpa=1 << 32, memory=m.ram[: 1 << 22])
    m.poke(m.entry_gpa(m.mode.user, 2), 1 << 13 | 0x80 | USER)
    result = m.access(m.mode.user + 0x12_3456, "w", value=9)
    assert (result.outcome, result.gpa) == (OK, (1 << 32) + 0x12_3456)
    assert m.ram[0x12_3456] == 9


def test_without_pse_bit_7_of_a_directory_entry_is_ignored() -> None:
    m = Machine("shadow", P32)
    m.map(m.mode.user, DATA)
    where = m.entry_gpa(m.mode.user, 2)
    m.poke(where, m.peek(where) | 0x80)
    m.start(cr4=m.mode.cr4 & ~PSE)
    assert m.access(m.mode.user).gpa == DATA


def test_a_frame_mapped_more_than_a_thousand_times_loses_all_its_leaves_at_once() -> None:
    m = Machine("shadow", LONG)
    base = m.mode.user
    for i in range(1200):
        m.map(base + i * 4096, DATA)
    for i in range(0, 1200, 8):
        m.vcpu.access(base + i * 4096)
    m.vm.check()
    assert m.vm.stats["max_mmu_rmap_size"] == 1001
    assert m.vm.stats["pages_4k"] < 1000
    for i in range(0, 1200, 100):
        assert m.access(base + i * 4096).gpa == DATA


def test_paging_can_be_switched_on_and_off_over_the_same_memory() -> None:
    m = Machine("shadow", LONG)
    m.map(m.mode.user, DATA)
    for _ in range(3):
        assert m.access(m.mode.user).gpa == DATA
        m.vcpu.set_sregs(cr0=m.mode.cr0 & ~PG, efer=m.mode.efer & ~0x400)
        assert m.access(m.mode.user).gpa == m.mode.user
        m.start()


def test_a_4_mib_page_is_mapped_by_2_mib_where_its_half_holds_none_of_the_tables_in_use() -> None:
    m = Machine("shadow", P32, page_size="2M")
    gva = 0x0080_0000
    m.map(gva, 0, level=2)  # tables begin at 1 MiB: the lower half of the page holds them
    assert m.access(gva + 0x30_0000, "w").gpa == 0x30_0000
    assert m.vm.stats["pages_2m"] == 1
    assert m.access(gva + 0x10_0000, "w").gpa == 0x10_0000
    assert m.vm.stats["pages_2m"] == 1
