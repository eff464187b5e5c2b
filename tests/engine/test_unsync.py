"""Tables that lag: unsync pages, and every event that brings them up to date."""

from __future__ import annotations

import pytest

import kvmmmu as km
from machine import DATA, LONG, LONG5, MMIO, NOFLUSH, P32, PAE3, PAGING, PCIDE, PGE, USER, A, D, Machine, Mode, P, U, W

OK, PF = km.Outcome.OK, km.Outcome.PF
modes = pytest.mark.parametrize("mode", PAGING, ids=lambda mode: mode.name)


def machine(mode: Mode) -> Machine:
    """``user`` is mapped and used; the next store to its table makes it unsync."""
    m = Machine("shadow", mode)
    m.map(mode.user, DATA)
    m.access(mode.user, "w")
    return m


def unsync(m: Machine) -> int:
    return m.vm.stats["mmu_unsync"]


@modes
def test_a_store_to_a_leaf_table_makes_it_unsync_and_is_not_emulated(mode: Mode) -> None:
    m = machine(mode)
    result = m.set_entry(mode.user, DATA + 0x1000 | USER)
    assert result.path is km.Path.FAULT
    assert unsync(m) >= 1
    count = m.count()
    result = m.set_entry(mode.user, DATA + 0x2000 | USER)
    assert (result.path, result.exits) == (km.Path.HARDWARE, 0)
    assert count.grown() == {}


@modes
def test_the_old_translation_lives_on_until_the_guest_flushes(mode: Mode) -> None:
    m = machine(mode)
    m.set_entry(mode.user, DATA + 0x1000 | USER)
    assert m.access(mode.user).gpa == DATA
    m.invlpg(mode.user)
    assert m.access(mode.user).gpa == DATA + 0x1000


@modes
def test_invlpg_installs_the_new_entry_at_once(mode: Mode) -> None:
    m = machine(mode)
    m.set_entry(mode.user, DATA + 0x1000 | USER)
    count = m.count()
    m.invlpg(mode.user)
    assert m.access(mode.user).exits == 0
    assert (count["invlpg"], count["pf_taken"], count["remote_tlb_flush_requests"]) == (1, 0, 1)


@modes
def test_invlpg_of_another_page_changes_nothing(mode: Mode) -> None:
    m = machine(mode)
    m.map(mode.user + 0x1_0000, DATA + 0x5000)
    m.access(mode.user + 0x1_0000)
    m.set_entry(mode.user, DATA + 0x1000 | USER)
    m.invlpg(mode.user + 0x1_0000)
    assert m.access(mode.user).gpa == DATA


@modes
def test_invlpg_where_the_tables_are_in_sync_drops_nothing(mode: Mode) -> None:
    m = machine(mode)
    count = m.count("remote_tlb_flush_requests", "invlpg")
    m.invlpg(mode.user)
    assert m.access(mode.user).exits == 0
    assert count.grown() == {"invlpg": 1}


@modes
@pytest.mark.parametrize(
    ("entry", "outcome"),
    [
        (0, PF),
        (MMIO | USER, km.Outcome.MMIO),
        (DATA | P | W | U | D, OK),  # A = 0: installed by a fault only
        (DATA | P | A | D, OK),
        (0x700_0000_0000_0000 | DATA | USER, PF),  # reserved bits
    ],
)
def test_invlpg_follows_whatever_the_entry_has_become(mode: Mode, entry: int, outcome: km.Outcome) -> None:
    if mode is P32 and entry >> 32:
        entry = 0
    if mode in (LONG, LONG5) and entry >> 52:
        entry = DATA | USER | 1 << 50
    m = machine(mode)
    m.set_entry(mode.user, entry)
    m.invlpg(mode.user)
    assert m.access(mode.user).outcome is outcome


@pytest.mark.parametrize("mode", [LONG, LONG5], ids=lambda mode: mode.name)
def test_invlpg_of_an_address_that_is_none_is_only_counted(mode: Mode) -> None:
    m = machine(mode)
    m.set_entry(mode.user, DATA + 0x1000 | USER)
    count = m.count()
    m.invlpg(mode.user | 1 << 62)  # its low bits are those of ``user``
    assert count.grown() == {"invlpg": 1}
    assert m.access(mode.user).gpa == DATA


@modes
def test_loading_cr3_synchronises_what_lags(mode: Mode) -> None:
    m = machine(mode)
    m.set_entry(mode.user, DATA + 0x1000 | USER)
    m.load_cr3(m.cr3)
    assert m.access(mode.user).gpa == DATA + 0x1000
    assert unsync(m) == 0
    assert m.set_entry(mode.user, DATA | USER).path is km.Path.FAULT  # protected again


@modes
def test_sync_roots_is_the_same_by_hand(mode: Mode) -> None:
    m = machine(mode)
    m.set_entry(mode.user, DATA + 0x1000 | USER)
    m.vcpu.sync_roots()
    m.vm.check()
    assert m.access(mode.user).gpa == DATA + 0x1000


@modes
def test_a_sync_drops_what_the_guest_took_away_and_narrows_what_it_narrowed(mode: Mode) -> None:
    m = machine(mode)
    for i in range(1, 4):
        m.map(mode.user + i * 4096, DATA + i * 4096)
    m.access(mode.user)
    m.set_entry(mode.user, 0)
    m.set_entry(mode.user + 0x1000, DATA + 0x1000 | P | U | A | D)
    m.set_entry(mode.user + 0x2000, DATA + 0x2000 | P | W | A | D)
    m.load_cr3(m.cr3)
    assert m.access(mode.user).outcome is PF
    assert m.access(mode.user + 0x1000, "w", cpl=3).error_code == 7
    assert m.access(mode.user + 0x2000, "r", cpl=3).error_code == 5
    assert m.access(mode.user + 0x3000, "w", cpl=3).outcome is OK


@modes
def test_a_sync_gives_back_no_w_to_a_clean_page(mode: Mode) -> None:
    m = machine(mode)
    where = m.entry_gpa(mode.user)
    m.set_entry(mode.user, DATA | P | W | U | A)
    m.load_cr3(m.cr3)
    m.access(mode.user, "w")
    assert m.peek(where) & D


@modes
def test_a_global_flush_by_cr4_pge_synchronises(mode: Mode) -> None:
    m = machine(mode)
    m.set_entry(mode.user, DATA + 0x1000 | USER)
    m.vcpu.mov_cr4(m.vcpu.regs.cr4 ^ PGE)
    assert m.access(mode.user).gpa == DATA + 0x1000


@modes
def test_many_lagging_tables_are_synchronised_in_batches(mode: Mode) -> None:
    m = Machine("shadow", mode)
    step, n = 1 << m.shift(2), 40
    for i in range(n):
        m.map(mode.user + i * step, DATA)
        m.access(mode.user + i * step, "w")
    for i in range(n):
        m.set_entry(mode.user + i * step, DATA + 0x1000 | USER)
    assert unsync(m) >= n
    m.load_cr3(m.cr3)
    assert [m.vcpu.access(mode.user + i * step).gpa for i in range(n)] == [DATA + 0x1000] * n
    m.vm.check()
    assert unsync(m) == 0


@modes
def test_one_lagging_table_under_two_parents_is_synchronised_once(mode: Mode) -> None:
    m = machine(mode)
    second = mode.user + (1 << m.shift(2))
    m.set_entry(second, m.peek(m.entry_gpa(mode.user, 2)), 2)
    m.access(second)
    m.set_entry(mode.user, DATA + 0x1000 | USER)
    m.vm.events.enable("kvm_mmu_sync_page")
    m.load_cr3(m.cr3)
    assert m.access(mode.user).gpa == m.access(second).gpa == DATA + 0x1000
    gfn = m.entry_gpa(mode.user) >> 12
    assert sum(f"gfn {gfn:x} " in line for line in m.vm.events.text().splitlines()) == 1


@pytest.mark.parametrize("mode", [LONG, LONG5], ids=lambda mode: mode.name)
def test_a_table_that_comes_to_serve_as_a_directory_can_no_longer_lag(mode: Mode) -> None:
    m = machine(mode)
    m.set_entry(mode.user, DATA + 0x1000 | USER)
    assert unsync(m) >= 1
    m.track(m.entry_gpa(mode.user))
    assert m.set_entry(mode.user, DATA + 0x2000 | USER).path is km.Path.EMULATED
    assert m.access(mode.user).gpa == DATA + 0x2000


@modes
def test_a_guest_fault_for_want_of_rights_drops_the_stale_leaf(mode: Mode) -> None:
    m = machine(mode)
    m.set_entry(mode.user, DATA | P | U | A | D)  # now read-only, the shadow still writable
    assert m.access(mode.user, "w", cpl=3).outcome is OK
    m.invlpg(mode.user)
    assert m.access(mode.user, "w", cpl=3).error_code == 7
    m.set_entry(mode.user, DATA | USER)  # more rights again: no flush is owed for that
    assert m.access(mode.user, "w", cpl=3).outcome is OK


@modes
def test_an_entry_turned_from_memory_to_a_device_without_a_flush_leaves_no_stale_leaf(mode: Mode) -> None:
    m = machine(mode)
    m.set_entry(mode.user, DATA | P | U | A | D)
    m.invlpg(mode.user)
    assert m.access(mode.user, "r").exits == 0  # a read-only leaf in an unsync page
    m.set_entry(mode.user, MMIO | USER)
    result = m.access(mode.user, "w", cpl=3)  # faults on the old leaf, finds the new entry
    assert result.mmio == ((MMIO, 1),)


# -- roots that are kept


def two_spaces(mode: Mode) -> tuple[Machine, int]:
    m = Machine("shadow", mode)
    other = m.new_space()
    m.open_window(other)
    m.map(mode.user, DATA)
    m.map(mode.user, DATA + 0x1000, cr3=other)
    return m, other


@modes
def test_each_address_space_has_its_own_translation(mode: Mode) -> None:
    m, other = two_spaces(mode)
    for _ in range(3):
        assert m.access(mode.user).gpa == DATA
        m.load_cr3(other)
        assert m.access(mode.user).gpa == DATA + 0x1000
        m.load_cr3(m.cr3)


@pytest.mark.parametrize("mode", [LONG, LONG5], ids=lambda mode: mode.name)
def test_a_kept_root_is_taken_again_without_building(mode: Mode) -> None:
    m, other = two_spaces(mode)
    m.access(mode.user)
    m.load_cr3(other)
    m.access(mode.user)
    m.vm.events.enable("kvm_mmu_get_page")
    for cr3 in (m.cr3, other, m.cr3):
        m.load_cr3(cr3)
        assert m.access(mode.user).exits == 0
    assert m.vm.events.text() == ""


@pytest.mark.parametrize("mode", [P32, PAE3], ids=lambda mode: mode.name)
def test_pae_roots_are_not_kept_but_their_pages_are_found_again(mode: Mode) -> None:
    m, other = two_spaces(mode)
    m.access(mode.user)
    m.load_cr3(other)
    m.access(mode.user)
    m.vm.events.enable("kvm_mmu_get_page")
    m.load_cr3(m.cr3)
    assert m.access(mode.user).exits == 0
    lines = m.vm.events.text().splitlines()
    assert len(lines) == 4
    assert all(line.endswith("existing") for line in lines)


def test_no_more_than_three_previous_roots_are_kept() -> None:
    m = Machine("shadow", LONG)
    spaces = [m.cr3] + [m.new_space() for _ in range(4)]
    for cr3 in spaces[1:]:
        m.open_window(cr3, 0x1000)
    for cr3 in spaces:
        m.load_cr3(cr3)
        m.access(m.mode.window)
    m.vm.events.enable("kvm_mmu_get_page")
    m.load_cr3(spaces[1])  # three switches ago: kept
    m.access(m.mode.window)
    assert m.vm.events.text() == ""
    m.load_cr3(spaces[0])  # dropped, but its page is still in the hash
    m.access(m.mode.window)
    assert m.vm.events.text().strip().endswith("existing")


def with_pcid() -> tuple[Machine, int]:
    m, other = two_spaces(LONG)
    m.vcpu.mov_cr4(m.mode.cr4 | PCIDE)
    m.load_cr3(m.cr3 | 1)
    m.access(m.mode.user, "w")
    m.set_entry(m.mode.user, DATA + 0x2000 | USER)
    assert m.access(m.mode.user).gpa == DATA
    return m, other


def test_with_the_no_flush_bit_a_switch_away_and_back_keeps_what_lags() -> None:
    m, other = with_pcid()
    m.load_cr3(other | 2 | NOFLUSH)
    assert m.access(m.mode.user).gpa == DATA + 0x1000
    m.load_cr3(m.cr3 | 1 | NOFLUSH)
    assert m.access(m.mode.user).gpa == DATA


def test_without_the_no_flush_bit_the_way_back_synchronises() -> None:
    m, other = with_pcid()
    m.load_cr3(other | 2 | NOFLUSH)
    m.load_cr3(m.cr3 | 1)
    assert m.access(m.mode.user).gpa == DATA + 0x2000


def test_loading_another_root_of_a_pcid_with_a_flush_drops_the_kept_ones_of_that_pcid() -> None:
    m, other = with_pcid()
    m.load_cr3(other | 1)  # same PCID, flushed
    m.load_cr3(m.cr3 | 1 | NOFLUSH)
    assert m.access(m.mode.user).gpa == DATA + 0x2000


def test_invlpg_reaches_kept_roots_too() -> None:
    m, other = with_pcid()
    m.load_cr3(other | 2 | NOFLUSH)
    m.access(m.mode.user)
    m.invlpg(m.mode.user)
    m.load_cr3(m.cr3 | 1 | NOFLUSH)
    assert m.access(m.mode.user).gpa == DATA + 0x2000


def test_bit_63_of_cr3_is_never_stored() -> None:
    m, other = with_pcid()
    m.load_cr3(other | 2 | NOFLUSH)
    assert m.vcpu.regs.cr3 == other | 2


def test_an_unsync_table_whose_page_the_host_took_away_cannot_be_synchronised_and_is_zapped() -> None:
    m = Machine("shadow", LONG)
    gva = m.mode.user
    where = m.map(gva, DATA)
    m.access(gva)
    m.set_entry(gva, DATA + 0x1000 | USER)
    count = m.count("mmu_shadow_zapped")
    m.vm.host_dontneed(m.slot, first_page=where >> 12, npages=1)
    m.load_cr3(m.cr3)
    assert m.access(gva).outcome is km.Outcome.PF
    assert count["mmu_shadow_zapped"] == 1
