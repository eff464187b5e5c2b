"""The TLB and the paging-structure caches: what is kept, for whom, until when (SDM vol. 3A section 4.10, 3C 29.4)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.errors import ArgumentError, GuestFaultError
from machine import (
    DATA,
    KERNEL,
    LONG,
    LONG5,
    MMIO,
    MMUS,
    NOFLUSH,
    P32,
    PAE3,
    PCIDE,
    PGE,
    PKE,
    RAM,
    SMAP,
    SMEP,
    USER,
    A,
    D,
    G,
    Machine,
    Mode,
    P,
    U,
    W,
)

OK, IO, PF = km.Outcome.OK, km.Outcome.MMIO, km.Outcome.PF
TDP = ("ept", "npt")
mmus = pytest.mark.parametrize("mmu", MMUS)
tdp = pytest.mark.parametrize("mmu", TDP)
PAGE, LARGE = 0x1000, 0x20_0000
OTHER = DATA + 0x10_0000
#: No array but the smallest that there must be: each access walks every level.
BARE = km.Tlb((1, 1), None, None, None, None, None, None, None, None)


def machine(mmu: str = "ept", mode: Mode = LONG, *, tlb: km.Tlb | None = None, cr4: int = 0, **how: Any) -> Machine:
    m = Machine(mmu, mode, tlb=tlb or km.Tlb(), start=False, **how)
    m.start(cr4=mode.cr4 | cr4)
    return m


def references(m: Machine) -> int:
    return sum(count for name, count in m.vcpu.stats.items() if "walk_refs" in name)


def cost(m: Machine, gva: int, kind: str = "r") -> int:
    """Table entries read by one access that needs no exit; -1: it was a hit."""
    before, hits = references(m), m.vcpu.stats["tlb_hit"]
    result = m.access(gva, kind)
    assert (result.outcome, result.exits) == (OK, 0)
    if m.vcpu.stats["tlb_hit"] > hits:
        assert references(m) == before
        return -1
    return references(m) - before


def behind(m: Machine, gva: int, value: int, level: int = 1, cr3: int | None = None) -> None:
    """Change an entry where no cache and no KVM sees it: a store from elsewhere."""
    m.poke(m.entry_gpa(gva, level, cr3), value)


# ---- what a walk costs ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mmu", "mode", "guest", "host", "count"),
    [
        # One dimension: an entry a level.  PAE reads PDPTEs from registers; shadow tables of 32-bit guests are PAE.
        ("shadow", LONG, "4K", None, 4),
        ("shadow", LONG5, "4K", None, 5),
        ("shadow", LONG, "2M", "2M", 3),
        ("shadow", PAE3, "4K", None, 2),
        ("shadow", P32, "4K", None, 2),
        # Two dimensions: (g + 1)(n + 1) - 1 for g guest levels over n of the host's.
        ("ept", LONG, "4K", "4K", 24),
        ("npt", LONG, "4K", "4K", 24),
        ("ept", LONG, "4K", "2M", 19),
        ("ept", LONG, "2M", "4K", 19),
        ("ept", LONG, "2M", "2M", 15),
        ("npt", LONG, "2M", "2M", 15),
        ("ept", LONG5, "4K", "4K", 29),
        ("ept", PAE3, "4K", "4K", 14),
        ("npt", PAE3, "4K", "4K", 19),
        ("ept", P32, "4K", "4K", 14),
        ("npt", P32, "4K", "2M", 11),
    ],
)
def test_a_walk_without_any_cache_reads_what_the_closed_form_says(
    mmu: str, mode: Mode, guest: str, host: str | None, count: int
) -> None:
    m = machine(mmu, mode, tlb=BARE, page_size=host)
    gva = 0x4000_0000
    m.map(gva, DATA, level=2 if guest == "2M" else 1)
    m.access(gva)
    m.vcpu.invvpid(2)
    assert cost(m, gva) == count
    if mmu != "shadow":
        guest_levels = sum(m.vcpu.stats[f"walk_refs_l{n}"] > 0 for n in range(1, 6))
        host_levels = {"4K": 4, "2M": 3}[host or "4K"]
        assert count == (guest_levels + 1) * (host_levels + 1) - 1


@tdp
def test_five_levels_over_five_read_35_entries(mmu: str) -> None:
    host = km.HostCpu(maxphyaddr=52, la57=True, vendor="amd" if mmu == "npt" else "intel")
    m = machine(mmu, LONG5, tlb=BARE, cpu=km.GuestCpu(maxphyaddr=52), host=host)
    m.map(0x4000_0000, DATA)
    m.access(0x4000_0000)
    m.vcpu.invvpid(2)
    assert cost(m, 0x4000_0000) == 35


def test_references_are_counted_by_dimension_and_level() -> None:
    m = machine(tlb=BARE)
    m.map(0x4000_0000, DATA)
    m.access(0x4000_0000)
    m.vcpu.invvpid(2)
    count = m.count(*(f"{name}_l{level}" for name in ("walk_refs", "nested_walk_refs") for level in range(1, 6)))
    m.access(0x4000_0000)
    assert count.grown() == {
        **{f"walk_refs_l{level}": 1 for level in range(1, 5)},
        **{f"nested_walk_refs_l{level}": 5 for level in range(1, 5)},
    }


def test_without_a_tlb_nothing_is_counted_and_nothing_cached() -> None:
    m = Machine("ept")
    m.map(0x4000_0000, DATA)
    for _ in range(3):
        m.access(0x4000_0000)
    assert m.vcpu.tlb is None and len(m.vcpu.tlb_entries()) == 0
    assert not any(count for name, count in m.vm.stats.items() if "walk_refs" in name or name.startswith("tlb_hit"))


@pytest.mark.parametrize(("distance", "count"), [(PAGE, 1), (LARGE, 2), (1 << 30, 3), (1 << 39, 4)])
def test_a_walk_begins_at_the_lowest_table_it_shares_with_an_earlier_one(distance: int, count: int) -> None:
    m = machine("shadow")
    gvas = (0x4000_0000, 0x4000_0000 + distance)
    for gva in gvas:
        m.map(gva, DATA)
        m.access(gva)
    m.vcpu.invvpid(2)
    assert cost(m, gvas[0]) == 4
    assert cost(m, gvas[1]) == count
    assert [cost(m, gva) for gva in gvas] == [-1, -1]


@tdp
def test_guest_physical_mappings_make_the_second_walk_of_a_guest_table_free(mmu: str) -> None:
    m = machine(mmu)
    gvas = (0x4000_0000, 0x4000_1000)
    for gva, gpa in zip(gvas, (DATA, DATA + PAGE), strict=True):
        m.map(gva, gpa)
        m.access(gva)
    m.vcpu.invept() if mmu == "ept" else m.load_cr3(m.cr3)
    if mmu == "ept":
        # Four tables in one 2 MiB: four entries for the first, then one each by the PDE cache; the page is in another.
        assert cost(m, gvas[0]) == 4 + (4 + 1 + 1 + 1) + 2
    else:
        cost(m, gvas[0])
    assert cost(m, gvas[1]) == (2 if mmu == "ept" else 1)  # under NPT the final mapping was kept over the CR3 load


# ---- until when -----------------------------------------------------------------------------------


@mmus
def test_a_page_mapped_anew_stays_stale_until_invlpg(mmu: str) -> None:
    m = machine(mmu)
    gva = m.mode.user
    m.map(gva, DATA)
    m.access(gva)
    assert cost(m, gva) == -1 or mmu == "shadow"
    m.set_entry(gva, OTHER | USER)
    assert m.access(gva).gpa == DATA
    m.invlpg(gva)
    assert m.access(gva).gpa == OTHER


@tdp
def test_a_stale_hit_reads_and_writes_the_old_page(mmu: str) -> None:
    m = machine(mmu)
    gva = m.mode.user
    m.map(gva, DATA)
    m.access(gva)
    m.poke(DATA, 0x11), m.poke(OTHER, 0x22)
    behind(m, gva, OTHER | USER)
    assert m.vcpu.read(gva, 1) == b"\x11"
    m.vcpu.write(gva, b"\x33")
    assert (m.peek(DATA, 1), m.peek(OTHER, 1)) == (0x33, 0x22)
    m.invlpg(gva)
    assert m.vcpu.read(gva, 1) == b"\x22"


@tdp
def test_a_clean_entry_does_not_serve_a_write_and_a_dirty_one_does(mmu: str) -> None:
    m = machine(mmu)
    gva = m.mode.user
    where = m.map(gva, DATA, P | W | U)
    m.access(gva, "w")  # the second dimension is dirty from now on
    m.poke(where, DATA | P | W | U)
    m.invlpg(gva)
    m.access(gva)
    assert m.peek(where) & (A | D) == A
    assert cost(m, gva) == -1
    assert cost(m, gva, "w") > 0
    assert m.peek(where) & (A | D) == A | D
    m.poke(where, DATA | P | W | U)
    assert cost(m, gva, "w") == -1
    assert m.peek(where) & (A | D) == 0  # a hit touches no table (section 4.10.2.3)
    m.invlpg(gva)
    m.access(gva, "w")
    assert m.peek(where) & (A | D) == A | D


@tdp
def test_rights_taken_away_hold_from_invlpg_on(mmu: str) -> None:
    m = machine(mmu)
    gva = m.mode.user
    m.map(gva, DATA)
    m.access(gva, "w")
    behind(m, gva, DATA | P | U | A | D)
    assert m.access(gva, "w").outcome is OK
    m.invlpg(gva)
    assert m.access(gva, "w").outcome is PF


@mmus
def test_rights_given_need_no_flush(mmu: str) -> None:
    m = machine(mmu)
    gva = m.mode.user
    m.map(gva, DATA, P | U | A | D)
    assert m.access(gva).outcome is OK
    assert m.access(gva, "w").outcome is PF
    assert m.access(gva).outcome is OK
    m.set_entry(gva, DATA | USER)
    assert m.access(gva, "w").outcome is OK


@tdp
def test_rights_given_in_an_upper_table_need_no_flush_either(mmu: str) -> None:
    m = machine(mmu)
    gva = m.mode.user
    m.map(gva, DATA, upper=P | U | A)
    m.map(gva + PAGE, DATA + PAGE)
    assert m.access(gva).outcome is OK
    assert m.access(gva + PAGE, "w").outcome is PF
    for level in (2, 3, 4):
        behind(m, gva, m.peek(m.entry_gpa(gva, level)) | W, level)
    # A fault on a way that began in a cache is looked at again from the top.
    assert m.access(gva + PAGE, "w").outcome is OK


@tdp
def test_a_page_that_becomes_present_needs_no_flush(mmu: str) -> None:
    m = machine(mmu)
    gva = m.mode.user
    m.map(gva, 0, 0)
    assert m.access(gva).outcome is PF
    behind(m, gva, DATA | USER)
    assert m.access(gva).gpa == DATA


@mmus
def test_with_spurious_faults_given_rights_cost_one_fault_that_takes_the_entry_along(mmu: str) -> None:
    m = machine(mmu, tlb=km.Tlb(spurious_faults=True))
    gva = m.mode.user
    m.map(gva, DATA, P | U | A | D)
    m.access(gva)
    assert cost(m, gva) == -1
    m.set_entry(gva, DATA | USER)
    first = m.access(gva, "w")
    if mmu == "shadow":
        assert (first.outcome, first.path) == (OK, km.Path.FAULT)  # KVM found nothing to do, or the spte too weak
    else:
        assert (first.outcome, first.error_code) == (PF, P | W)
    assert m.access(gva, "w").outcome is OK


@tdp
def test_modes_that_judge_cached_rights_take_effect_at_once(mmu: str) -> None:
    m = machine(mmu, cr4=SMAP | SMEP | PKE)
    gva = m.mode.user
    m.map(gva, DATA, P | U | A | D)
    assert m.access(gva, cpl=3).outcome is OK
    assert m.access(gva, cpl=0).outcome is PF  # SMAP
    m.vcpu.ac = True
    assert m.access(gva, cpl=0).outcome is OK
    assert m.access(gva, "w", cpl=0).outcome is PF
    m.vcpu.mov_cr0(m.mode.cr0 & ~(1 << 16))
    assert m.access(gva, "w", cpl=0).outcome is OK  # CR0.WP
    m.vcpu.set_sregs(pkru=1)
    assert m.access(gva, cpl=3).outcome is PF  # PKRU.AD of key 0
    m.vcpu.set_sregs(pkru=0)
    assert m.access(gva, cpl=3).outcome is OK


# ---- for whom: PCIDs and global pages ----------------------------------------------------------


@tdp
def test_global_pages_outlive_a_cr3_load_and_others_do_not(mmu: str) -> None:
    m = machine(mmu, cr4=PGE)
    m.map(m.mode.user, DATA)
    m.map(m.mode.user + PAGE, DATA + PAGE, USER | G)
    for gva in (m.mode.user, m.mode.user + PAGE):
        m.access(gva)
        behind(m, gva, OTHER | USER)
    m.load_cr3(m.cr3)
    assert m.access(m.mode.user).gpa == OTHER
    assert m.access(m.mode.user + PAGE).gpa == DATA + PAGE
    m.vcpu.mov_cr4(m.mode.cr4)  # PGE 1 -> 0
    assert m.access(m.mode.user + PAGE).gpa == OTHER


@tdp
def test_without_pge_no_page_is_global(mmu: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, DATA, USER | G)
    m.access(m.mode.user)
    behind(m, m.mode.user, OTHER | USER)
    m.load_cr3(m.cr3)
    assert m.access(m.mode.user).gpa == OTHER


def two_spaces(mmu: str, cr4: int = 0, bits: int = USER) -> tuple[Machine, int, int]:
    """PCID 1 maps the user page to DATA, PCID 2 to OTHER; both are cached, PCID 1 is current."""
    m = machine(mmu, cr4=PCIDE | cr4)
    first, second = m.cr3 | 1, m.new_space()
    m.open_window(second)
    m.map(m.mode.user, DATA, bits)
    m.map(m.mode.user, OTHER, bits, cr3=second)
    second |= 2
    for cr3, gpa in ((second, OTHER), (first, DATA)):
        m.load_cr3(cr3)
        m.access(m.mode.user)
        m.access(m.mode.user)
        assert m.access(m.mode.user).gpa == gpa
    return m, first, second


@mmus
def test_a_pcid_keeps_its_entries_while_another_runs(mmu: str) -> None:
    m, first, second = two_spaces(mmu)
    if mmu == "shadow":  # the load that made the first current was KVM's to carry out: it flushed the whole VPID
        for cr3 in (second, first):
            m.load_cr3(cr3 | NOFLUSH)
            m.access(m.mode.user)
    m.load_cr3(second | NOFLUSH)
    assert cost(m, m.mode.user) == -1
    assert m.access(m.mode.user).gpa == OTHER
    m.load_cr3(first | NOFLUSH)
    assert cost(m, m.mode.user) == -1
    assert m.access(m.mode.user).gpa == DATA


@tdp
def test_a_cr3_load_without_bit_63_drops_the_pcid_it_names_alone(mmu: str) -> None:
    m, first, second = two_spaces(mmu)
    m.load_cr3(second)
    assert cost(m, m.mode.user) > 0
    m.load_cr3(first | NOFLUSH)
    assert cost(m, m.mode.user) == -1


@tdp
def test_invlpg_is_for_the_current_pcid(mmu: str) -> None:
    m, _, second = two_spaces(mmu)
    m.invlpg(m.mode.user)
    assert cost(m, m.mode.user) > 0
    m.load_cr3(second | NOFLUSH)
    assert cost(m, m.mode.user) == -1


@tdp
def test_invlpg_takes_global_pages_of_every_pcid(mmu: str) -> None:
    m, first, second = two_spaces(mmu, PGE)
    gva = m.mode.user + PAGE
    m.map(gva, DATA, USER | G)
    m.map(gva, OTHER, USER | G, cr3=second & ~0xFFF)
    assert m.access(gva).gpa == DATA
    m.load_cr3(second | NOFLUSH)
    assert m.access(gva).gpa == DATA  # the guest's own fault: one global page, two meanings
    m.invlpg(gva)
    assert m.access(gva).gpa == OTHER
    m.load_cr3(first | NOFLUSH)
    assert m.access(gva).gpa == OTHER


@tdp
@pytest.mark.parametrize(
    ("kind", "pcid", "gone"), [(0, 1, (1,)), (0, 2, (2,)), (1, 2, (2,)), (1, 1, (1,)), (2, 0, (1, 2)), (3, 0, (1, 2))]
)
def test_invpcid_reaches_what_its_type_says(mmu: str, kind: int, pcid: int, gone: tuple[int, ...]) -> None:
    m, first, second = two_spaces(mmu)
    m.vcpu.invpcid(kind, pcid, m.mode.user)
    for number, cr3 in ((1, first), (2, second)):
        m.load_cr3(cr3 | NOFLUSH)
        assert (cost(m, m.mode.user) > 0) == (number in gone)


@tdp
@pytest.mark.parametrize(("kind", "kept"), [(0, True), (1, True), (2, False), (3, True)])
def test_invpcid_spares_global_pages_unless_it_means_them(mmu: str, kind: int, kept: bool) -> None:
    m = machine(mmu, cr4=PGE | PCIDE)
    m.map(m.mode.user, DATA, USER | G)
    m.access(m.mode.user)
    m.vcpu.invpcid(kind, 0, m.mode.user)
    assert (cost(m, m.mode.user) == -1) == kept


@mmus
@pytest.mark.parametrize(
    ("cr4", "kind", "pcid", "gva"),
    [(PCIDE, 4, 0, 0), (PCIDE, 1, 4096, 0), (0, 0, 1, 0), (0, 1, 1, 0), (PCIDE, 0, 1, 1 << 62)],
)
def test_invpcid_refuses_bad_operands_with_gp(mmu: str, cr4: int, kind: int, pcid: int, gva: int) -> None:
    m = machine(mmu, cr4=cr4)
    with pytest.raises(GuestFaultError, match="#GP: INVPCID"):
        m.vcpu.invpcid(kind, pcid, gva)


@pytest.mark.parametrize("kind", [0, 1, 2, 3])
def test_with_shadow_paging_kvm_carries_invpcid_out(kind: int) -> None:
    m, _, second = two_spaces("shadow")
    m.set_entry(m.mode.user, DATA + PAGE | USER)
    assert m.access(m.mode.user).gpa == DATA
    m.vcpu.invpcid(kind, 1, m.mode.user)
    assert m.access(m.mode.user).gpa == DATA + PAGE
    m.load_cr3(second | NOFLUSH)
    assert m.access(m.mode.user).gpa == OTHER


@tdp
def test_leaving_pcids_forgets_them_all(mmu: str) -> None:
    m, first, second = two_spaces(mmu)
    m.load_cr3(first & ~0xFFF)
    m.vcpu.mov_cr4(m.mode.cr4)
    m.vcpu.mov_cr4(m.mode.cr4 | PCIDE)
    m.load_cr3(second | NOFLUSH)
    assert cost_with_exits(m, m.mode.user) > 0


def cost_with_exits(m: Machine, gva: int) -> int:
    before = references(m)
    assert m.access(gva).outcome is OK
    return references(m) - before


@tdp
@pytest.mark.parametrize("change", ["PG off and on", "SMEP on", "NXE off", "PGE"])
def test_control_registers_that_change_what_tables_mean_empty_the_tlb(mmu: str, change: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, DATA)
    m.access(m.mode.user)
    behind(m, m.mode.user, OTHER | USER)
    regs = m.vcpu.regs
    if change == "PG off and on":
        m.vcpu.set_sregs(compat=True)
        m.vcpu.mov_cr0(regs.cr0 & ~(1 << 31))
        m.vcpu.mov_cr0(regs.cr0)
        m.vcpu.set_sregs(compat=False)
    elif change == "SMEP on":
        m.vcpu.mov_cr4(regs.cr4 | SMEP)
    elif change == "PGE":
        m.vcpu.mov_cr4(regs.cr4 | PGE)
    else:
        m.vcpu.write_efer(regs.efer & ~0x800)
    assert m.access(m.mode.user).gpa == OTHER


# ---- INVLPG and what hangs on an address ---------------------------------------------------------


def test_invlpg_drops_every_table_known_of_the_pcid_but_only_its_own_page() -> None:
    m = machine("ept")
    gvas = [m.mode.user + n * PAGE for n in range(3)]
    for n, gva in enumerate(gvas):
        m.map(gva, DATA + n * PAGE)
        m.access(gva)
    m.vcpu.invvpid(2)
    assert cost(m, gvas[0]) == 4  # guest entries alone: guest-physical mappings were kept
    m.invlpg(1 << 40)
    assert cost(m, gvas[0]) == -1
    assert cost(m, gvas[1]) == 4


@tdp
def test_invlpg_of_a_large_page_drops_all_the_parts_it_is_cached_in(mmu: str) -> None:
    m = machine(mmu, page_size="4K")
    gva = 0x4000_0000
    m.map(gva, DATA, level=2)
    m.access(gva), m.access(gva + PAGE)
    assert cost(m, gva) == cost(m, gva + PAGE) == -1
    m.invlpg(gva + PAGE)
    assert cost(m, gva) > 0
    assert cost(m, gva + PAGE) > 0


@tdp
def test_a_4_mib_page_is_cached_in_two_halves_and_dropped_as_one(mmu: str) -> None:
    m = machine(mmu, P32, page_size="2M", ram=2 * RAM)
    m.map(0x4000_0000, RAM, level=2)
    m.access(0x4000_0000), m.access(0x4000_0000 + LARGE)
    assert set(m.vcpu.tlb_entries()["page_shift"]) >= {21}
    assert m.access(0x4000_0000 + LARGE).gpa == RAM + LARGE
    m.invlpg(0x4000_0000)
    assert cost(m, 0x4000_0000 + LARGE) > 0


def test_invlpg_that_kvm_carries_out_drops_the_address_from_the_processor_as_well() -> None:
    m = machine("shadow")
    gvas = (m.mode.user, m.mode.user + PAGE)
    for n, gva in enumerate(gvas):
        m.map(gva, DATA + n * PAGE)
        m.access(gva), m.access(gva)
    m.invlpg(gvas[0])
    assert [cost(m, gva) for gva in gvas] == [4, -1]


@tdp
def test_invlpg_of_an_address_that_is_not_canonical_does_nothing(mmu: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, DATA)
    m.access(m.mode.user)
    m.invlpg(m.mode.user | 1 << 62)
    assert cost(m, m.mode.user) == -1


def test_invept_takes_guest_physical_mappings_and_invvpid_leaves_them() -> None:
    m = machine("ept")
    m.map(m.mode.user, DATA)
    m.access(m.mode.user)
    m.vcpu.invvpid(1)
    count = m.count("tlb_nested_hit", "tlb_nested_miss")
    m.access(m.mode.user)
    assert count.grown() == {"tlb_nested_hit": 5}
    m.vcpu.invept()
    count = m.count("tlb_nested_hit", "tlb_nested_miss")
    m.access(m.mode.user)
    assert count.grown() == {"tlb_nested_miss": 5}


@pytest.mark.parametrize("mmu", ["shadow", "npt"])
def test_invept_needs_ept(mmu: str) -> None:
    with pytest.raises(ArgumentError, match="mmu='ept'"):
        machine(mmu).vcpu.invept()


def test_invvpid_but_global_and_of_one_address() -> None:
    m = machine("ept", cr4=PGE)
    m.map(m.mode.user, DATA)
    m.map(m.mode.user + PAGE, DATA + PAGE, USER | G)
    gvas = (m.mode.user, m.mode.user + PAGE)
    for gva in gvas:
        m.access(gva)
    m.vcpu.invvpid(3)
    assert [cost(m, gva) == -1 for gva in gvas] == [False, True]
    m.vcpu.invvpid(0, gvas[1])
    assert [cost(m, gva) == -1 for gva in gvas] == [True, False]


# ---- KVM's flushes --------------------------------------------------------------------------------


@mmus
def test_a_slot_that_goes_is_gone_from_the_tlb_as_well(mmu: str) -> None:
    m = machine(mmu)
    extra = m.vm.memslots.create(gpa=1 << 30, memory=np.zeros(PAGE, np.uint8))
    m.map(m.mode.user, 1 << 30)
    assert m.access(m.mode.user).outcome is OK
    assert m.access(m.mode.user).outcome is OK
    m.vm.memslots.delete(extra)
    assert m.access(m.mode.user).outcome is IO


@mmus
def test_a_write_after_the_dirty_log_was_read_is_logged_again(mmu: str) -> None:
    m = machine(mmu)
    m.vm.memslots.set_flags(m.slot, log_dirty=True)
    m.map(m.mode.user, DATA)
    for _ in range(3):
        m.access(m.mode.user, "w"), m.access(m.mode.user, "w")
        log = m.vm.get_dirty_log(m.slot)
        assert int(log[DATA >> 18]) >> (DATA >> 12 & 63) & 1


@mmus
def test_a_host_page_given_back_is_read_as_zero_at_once(mmu: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, DATA)
    m.vcpu.write(m.mode.user, b"\x55")
    m.vm.host_dontneed(m.slot, first_page=DATA >> 12, npages=1)
    assert m.vcpu.read(m.mode.user, 1) == b"\0"


@mmus
def test_other_vcpus_are_flushed_before_they_run_again(mmu: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, DATA)
    second = m.vm.create_vcpu(tlb=km.Tlb())
    second.set_sregs(cr0=m.mode.cr0, cr3=m.cr3, cr4=m.mode.cr4, efer=m.mode.efer)
    for _ in range(2):
        assert second.access(m.mode.user).outcome is OK
    moved = m.vm.memslots.move(m.slot, 1 << 31)
    assert moved.gpa == 1 << 31
    assert second.access(m.mode.user).outcome is not OK
    m.vm.check()


@mmus
def test_mmio_is_never_cached_as_a_translation(mmu: str) -> None:
    m = machine(mmu)
    m.map(m.mode.user, MMIO)
    for _ in range(3):
        count = m.count("tlb_hit")
        assert m.access(m.mode.user).outcome is IO
        assert count["tlb_hit"] == 0
    assert MMIO not in m.vcpu.tlb_entries()["gpa"].tolist()


@mmus
def test_a_guest_without_paging_is_served_too(mmu: str) -> None:
    m = Machine(mmu, tlb=km.Tlb(), start=False)
    assert m.vcpu.access(DATA).gpa == DATA
    count = m.count("tlb_hit", "tlb_nested_hit")
    assert m.access(DATA).gpa == DATA
    # Under EPT and NPT only guest-physical mappings are used (SDM vol. 3C section 29.4.2).
    assert count.grown() == ({"tlb_hit": 1} if mmu == "shadow" else {"tlb_nested_hit": 1})


# ---- the arrays -----------------------------------------------------------------------------------


def test_the_least_recently_used_way_of_a_set_makes_room() -> None:
    m = machine("ept", tlb=km.Tlb(pages_4k=(1, 2), second_level=None))
    gvas = [m.mode.user + n * PAGE for n in range(3)]
    for n, gva in enumerate(gvas):
        m.map(gva, DATA + n * PAGE)
        m.access(gva)
    m.access(gvas[0]), m.access(gvas[1])
    m.access(gvas[0])
    assert cost(m, gvas[2]) > 0
    assert cost(m, gvas[0]) == -1
    assert cost(m, gvas[1]) > 0


def test_pages_of_different_sets_do_not_meet() -> None:
    m = machine("ept", tlb=km.Tlb(pages_4k=(4, 1), second_level=None))
    gvas = [m.mode.user + n * PAGE for n in range(5)]
    for n, gva in enumerate(gvas):
        m.map(gva, DATA + n * PAGE)
        m.access(gva)
    assert [cost(m, gva) == -1 for gva in gvas[1:]] == [True] * 4
    assert cost(m, gvas[0]) > 0


def test_the_second_level_serves_what_the_first_has_lost() -> None:
    m = machine("ept", tlb=km.Tlb(pages_4k=(1, 1), second_level=(4, 2)))
    gvas = [m.mode.user + n * PAGE for n in range(4)]
    for n, gva in enumerate(gvas):
        m.map(gva, DATA + n * PAGE)
        m.access(gva)
    assert [cost(m, gva) for gva in gvas] == [-1] * 4


@pytest.mark.parametrize(("tlb", "shift"), [(km.Tlb(), 21), (km.Tlb(pages_2m=None), 12)])
def test_a_large_page_takes_the_largest_entry_there_is_an_array_for(tlb: km.Tlb, shift: int) -> None:
    m = machine("ept", tlb=tlb, page_size="2M")
    m.map(0x4000_0000, DATA, level=2)
    m.access(0x4000_0000 + PAGE)
    entries = m.vcpu.tlb_entries()
    mine = entries[(entries["gpa"] >> 21 == DATA >> 21) & (entries["pcid"] == 0) & (entries["page_shift"] > 0)]
    assert set(mine["page_shift"]) == {shift}
    assert cost(m, 0x4000_0000) == (-1 if shift == 21 else 1)


def test_what_is_cached_can_be_listed() -> None:
    m = machine("ept", cr4=PGE)
    m.map(m.mode.user, DATA, USER | G)
    m.access(m.mode.user, "w")
    entries = m.vcpu.tlb_entries()
    page = entries[entries["place"] == "pages_4k"]
    assert page.tolist() == [("pages_4k", m.mode.user, int(page["hpa"][0]), DATA, 12, -1, 7, 0)]
    assert {"pde", "pml4e", "nested pde", "guest_physical", "second_level"} <= set(entries["place"])
    m.vcpu.invept()
    assert len(m.vcpu.tlb_entries()) == 0


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("pages_4k", (3, 4), ArgumentError, "pages_4k: 3 sets"),
        ("pages_4k", (1 << 17, 1), ArgumentError, "131072 sets"),
        ("pages_2m", (4, 0), ArgumentError, "pages_2m: 0 ways"),
        ("pde", (4, 65), ArgumentError, "pde: 65 ways"),
        ("pages_4k", None, TypeError, "pages_4k must be a tuple"),
        ("second_level", 5, TypeError, "second_level must be a tuple"),
        ("second_level", (1.0, 2), TypeError, "second_level must be a tuple"),
        ("spurious_faults", 1, TypeError, "spurious_faults must be a bool"),
    ],
)
def test_a_geometry_that_cannot_be_is_refused(name: str, value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        km.Tlb(**{name: value})


def test_a_vcpu_takes_a_tlb_once_and_nothing_else_for_one() -> None:
    vm = km.VM("ept")
    with pytest.raises(TypeError, match="tlb must be a Tlb or None"):
        vm.create_vcpu(tlb=64)  # type: ignore[arg-type]
    vcpu = vm.create_vcpu(tlb=km.Tlb())
    with pytest.raises(ArgumentError, match="has one already"):
        vcpu.use_tlb(km.Tlb())


def test_supervisor_pages_hit_for_the_supervisor_alone() -> None:
    m = machine("npt")
    m.map(m.mode.user, DATA, KERNEL)
    assert m.access(m.mode.user, cpl=0).outcome is OK
    assert m.access(m.mode.user, cpl=3).outcome is PF
    assert m.access(m.mode.user, cpl=0).outcome is OK
