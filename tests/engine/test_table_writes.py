"""Stores to guest tables that KVM makes itself: what they zap, and when a table stops being taken for one."""

from __future__ import annotations

import pytest

import kvmmmu as km
from machine import DATA, LONG, LONG5, P32, PAE3, USER, A, D, Machine, Mode, P, U, W

OK, PF = km.Outcome.OK, km.Outcome.PF
long_modes = pytest.mark.parametrize("mode", [LONG, LONG5], ids=lambda mode: mode.name)


def tracked(mode: Mode = LONG) -> Machine:
    """The level-1 table of ``user`` is a directory elsewhere: every store to it is KVM's."""
    m = Machine("shadow", mode)
    for i in range(8):
        m.map(mode.user + i * 4096, DATA + i * 4096)
    m.track(m.entry_gpa(mode.user))
    m.access(mode.user)
    return m


@long_modes
def test_a_store_to_a_directory_is_emulated_and_takes_effect_at_once(mode: Mode) -> None:
    m = tracked(mode)
    count = m.count()
    assert m.set_entry(mode.user, DATA + 0x5000 | USER).path is km.Path.EMULATED
    assert (count["mmu_pte_write"], count["insn_emulation"]) == (1, 1)
    assert m.access(mode.user).gpa == DATA + 0x5000


@long_modes
@pytest.mark.parametrize("level", [2, 3, 4])
def test_an_upper_entry_taken_away_takes_all_below_with_it(mode: Mode, level: int) -> None:
    m = Machine("shadow", mode)
    m.map(mode.user, DATA)
    m.access(mode.user)
    entry = m.peek(m.entry_gpa(mode.user, level))
    m.set_entry(mode.user, 0, level)
    assert m.access(mode.user).outcome is PF
    m.set_entry(mode.user, entry, level)
    assert m.access(mode.user).gpa == DATA


@long_modes
def test_one_spte_is_zapped_and_its_neighbours_stay(mode: Mode) -> None:
    m = tracked(mode)
    m.set_entry(mode.user + 0x1000, DATA + 0x6000 | USER)
    exits = [m.access(mode.user + i * 4096).exits for i in range(3)]
    assert exits == [0, 1, 0]


def test_pde_zaps_are_counted_for_upper_entries_that_do_not_become_zero() -> None:
    m = Machine("shadow", LONG)
    m.map(m.mode.user, DATA)
    m.access(m.mode.user)
    entry = m.peek(m.entry_gpa(m.mode.user, 2))
    count = m.count()
    m.set_entry(m.mode.user, 0, 2)
    assert count["mmu_pde_zapped"] == 0
    m.access(m.mode.user)
    m.set_entry(m.mode.user, entry, 2)
    assert count["mmu_pde_zapped"] == 1


def test_half_a_64_bit_entry_counts_as_the_entry() -> None:
    m = tracked()
    where = m.entry_gpa(m.mode.user)
    count = m.count()
    m.store(where + 4, 0, 4)
    assert count["mmu_flooded"] == 0
    m.store(where, DATA + 0x7000 | USER, 4)
    assert (count["mmu_flooded"], m.access(m.mode.user).gpa) == (0, DATA + 0x7000)


@pytest.mark.parametrize(
    ("offset", "size", "value", "zapped"),
    [
        (0, 1, USER & 0xFF, False),  # one byte at the start of an entry: a flag being changed
        (1, 1, 0x10 | DATA >> 8 & 0xFF, True),
        (0, 2, USER, True),
        (4, 8, 0, True),  # crosses into the next entry
        (6, 4, 0, False),  # crosses too, but 4 bytes under PAE stand for the 8 round their first
        (0, 4, DATA | USER, False),
        (0, 8, DATA | USER, False),
        (0, 16, DATA | USER, True),
    ],
)
def test_a_store_that_is_no_entry_zaps_the_whole_page(offset: int, size: int, value: int, zapped: bool) -> None:
    m = tracked()
    count = m.count()
    m.store(m.entry_gpa(m.mode.user) + offset, value, size)
    # The table has two shadow pages, as leaf table and as directory.
    assert count["mmu_flooded"] == (2 if zapped else 0)
    assert count["mmu_shadow_zapped"] >= (2 if zapped else 0)


def test_the_third_store_in_a_row_makes_kvm_give_up_the_directory() -> None:
    m = tracked()
    m.access((5 << 39) + (511 << 21))  # used by a fault: the count begins at zero
    count = m.count()
    for i in range(3):
        assert count["mmu_flooded"] == 0
        m.set_entry(m.mode.user + (300 + i) * 4096, 0)
    assert count["mmu_flooded"] == 1


def test_a_fault_through_the_directory_forgives_earlier_stores() -> None:
    m = tracked()
    table = m.entry_gpa(m.mode.user)
    count = m.count()
    for i in range(8):
        m.store(table + (300 + i) * 8, 0)
        # A fault whose walk passes the directory; entry 511 is its only child.
        m.poke(m.peek(table + 511 * 8) & ~0xFFF | 8 * i, DATA | USER)
        m.vcpu.access((5 << 39) + (511 << 21) + 4096 * i)
    assert count["mmu_flooded"] == 0


def test_a_leaf_table_is_never_given_up_for_many_stores() -> None:
    m = tracked()
    m.vm.check()
    # Level 1 alone is exempt; the directory role of the same table goes.
    count = m.count()
    for i in range(20):
        m.set_entry(m.mode.user + (300 + i) * 4096, 0)
    assert count["mmu_flooded"] == 1
    assert m.access(m.mode.user).gpa == DATA


@long_modes
def test_a_table_no_longer_tracked_may_lag_again(mode: Mode) -> None:
    m = tracked(mode)
    for i in range(3):
        m.set_entry(mode.user + (300 + i) * 4096, 0)
    assert m.set_entry(mode.user, DATA + 0x1000 | USER).path is not km.Path.EMULATED
    assert m.vm.stats["mmu_unsync"] >= 1


# -- 32-bit tables: quadrants


def p32() -> Machine:
    m = Machine("shadow", P32)
    m.map(m.mode.user, DATA)
    m.map(m.mode.user + 0x20_0000, DATA + 0x1000)  # the same guest table, its second half
    m.access(m.mode.user)
    m.access(m.mode.user + 0x20_0000)
    return m


def test_a_32_bit_table_has_a_shadow_page_for_each_half() -> None:
    m = p32()
    assert m.entry_gpa(m.mode.user) & ~0xFFF == m.entry_gpa(m.mode.user + 0x20_0000) & ~0xFFF
    m.vm.events.enable("kvm_mmu_unsync_page")
    m.set_entry(m.mode.user, DATA + 0x2000 | USER)
    lines = m.vm.events.text().splitlines()
    assert sorted(line.split(" q")[1][0] for line in lines) == ["0", "1"]
    m.invlpg(m.mode.user)
    m.invlpg(m.mode.user + 0x20_0000)
    assert m.access(m.mode.user).gpa == DATA + 0x2000
    assert m.access(m.mode.user + 0x20_0000).gpa == DATA + 0x1000


@pytest.mark.parametrize("quadrant", range(4))
def test_a_32_bit_directory_entry_stands_for_two_sptes_of_one_quadrant(quadrant: int) -> None:
    m = Machine("shadow", P32)
    gva = (quadrant << 30) + 0x1240_0000
    m.map(gva, DATA)
    m.map(gva + 0x20_0000, DATA + 0x1000)
    m.access(gva)
    m.access(gva + 0x20_0000)
    count = m.count()
    m.set_entry(gva, m.peek(m.entry_gpa(gva, 2)), 2)
    assert count["mmu_pde_zapped"] == 2
    assert [m.access(gva).exits, m.access(gva + 0x20_0000).exits] == [1, 1]


def test_a_crooked_store_to_a_32_bit_directory_zaps_all_four_quadrants() -> None:
    m = p32()
    for quadrant in range(4):
        gva = (quadrant << 30) + 0x1240_0000
        m.map(gva, DATA)
        m.access(gva)
    where = m.entry_gpa(0x1240_0000, 2)
    count = m.count()
    m.store(where + 2, m.peek(where) >> 16 & 0xFFFF, 2)
    assert count["mmu_flooded"] == 4
    for quadrant in range(4):
        assert m.access((quadrant << 30) + 0x1240_0000).gpa == DATA


# -- PAE and self-reference


def test_a_pae_directory_entry_can_be_changed_by_halves() -> None:
    m = Machine("shadow", PAE3)
    m.map(m.mode.user, DATA)
    table = m.new_table()
    m.poke(table + (m.mode.user >> 12 & 511) * 8, DATA + 0x1000 | USER)
    m.access(m.mode.user)
    where = m.entry_gpa(m.mode.user, 2)
    m.store(where + 4, 0, 4)
    m.store(where, table | P | W | U | A, 4)
    assert m.access(m.mode.user).gpa == DATA + 0x1000


@long_modes
def test_a_table_mapped_in_the_range_it_maps_can_be_written_through_itself(mode: Mode) -> None:
    m = Machine("shadow", mode)
    m.map(mode.user, DATA)
    table = m.entry_gpa(mode.user) & ~0xFFF
    m.map(mode.user + 0x1000, table)
    own = mode.user + 0x1000 + (mode.user >> 12 & 511) * 8
    assert m.access(own, "w", size=8, value=DATA + 0x3000 | USER).outcome is OK
    m.invlpg(mode.user)
    assert m.access(mode.user).gpa == DATA + 0x3000


@pytest.mark.parametrize("mode", [PAE3, LONG, LONG5], ids=lambda mode: mode.name)
def test_a_large_guest_page_that_holds_its_own_tables_is_mapped_by_4_kib(mode: Mode) -> None:
    m = Machine("shadow", mode, page_size="2M")
    gva = mode.user + (1 << 30 if mode is not PAE3 else 0)
    m.map(gva, 0, USER | W | D | A, level=2)  # 2 MiB at gpa 0: all tables stand in it
    assert m.access(gva + 0x5000, "w").outcome is OK
    assert m.vm.stats["pages_2m"] == 0
    where = m.entry_gpa(gva, 2)
    result = m.access(gva + where, "w", size=8, value=m.peek(where))
    assert result.outcome is OK
    assert m.access(gva + 0x5000, "w").outcome is OK
