"""The TLB and the paging-structure caches: what is kept, and until when (SDM vol. 3A section 4.10, 3C 29.4)."""

from __future__ import annotations

from typing import Any

import pytest

import kvmmmu as km
from cached import BARE, LARGE, OK, OTHER, PAGE, PF, behind, cost, machine, mmus, tdp
from kvmmmu.errors import ArgumentError
from machine import DATA, KERNEL, LONG, LONG5, P32, PAE3, PGE, PKE, SMAP, SMEP, USER, A, D, G, Machine, Mode, P, U, W

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
