"""Every invariant can fail: a copy of a consistent state is damaged in one place, and the right name is called."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.check import INVARIANTS, Snapshot, check_snapshot
from kvmmmu.errors import InvariantError, VmBusyError, VmClosedError
from machine import DATA, FLAT, LONG, MMIO, P32, USER, Machine

Damage = Callable[[Snapshot], Any]


def shadow_state() -> Snapshot:
    """Two roots, an unsync table, an mmio spte, a read-only mapping, freed pages, long lists."""
    m = Machine("shadow", LONG)
    user = m.mode.user
    for i in range(20):
        m.map(user + i * 4096, DATA, USER)  # one frame, twenty leaves: a list of two blocks
    m.map(user + 0x20_0000, MMIO, USER)
    other = m.new_space()
    m.open_window(other)
    m.map(user, DATA + 0x1000, USER, cr3=other)
    m.vm.memslots.create(gpa=0x2000_0000, memory=np.zeros(4096, np.uint8), log_dirty=True)
    m.map(user + 0x40_0000, 0x2000_0000, USER)
    for i in range(20):
        m.access(user + i * 4096, "w")
    m.access(user + 0x20_0000)
    m.access(user + 0x40_0000, "w")
    m.load_cr3(other)
    m.access(user, "w")
    m.load_cr3(m.cr3)
    m.access(user)
    m.set_entry(user, DATA | USER)  # the table is unsync now
    return Snapshot(m.vm._core.snapshot())


def tdp_state() -> Snapshot:
    """The TDP MMU with tables, leaves of two sizes and an mmio spte."""
    m = Machine("ept", LONG, page_size="2M", tdp_mmu=True)
    m.vm.memslots.create(gpa=0x2000_0000, memory=np.zeros(4096, np.uint8))
    m.map(m.mode.user, MMIO, USER)
    m.access(m.mode.window, "w")
    m.access(m.mode.user)
    return Snapshot(m.vm._core.snapshot())


def p32_state() -> Snapshot:
    m = Machine("shadow", P32)
    m.map(0x40_0000, DATA)
    m.map(0x80_0000, 0x40_0000, level=2)
    m.access(0x40_0000, "w")
    m.access(0x80_0000, "w")
    return Snapshot(m.vm._core.snapshot())


def nx_state() -> Snapshot:
    """Three huge pages split for a fetch, and one that was only read."""
    m = Machine("npt", FLAT, page_size="2M", nx_huge_pages=True)
    for n in range(3):
        m.access(n * 0x20_0000, "x")
    m.access(3 * 0x20_0000)
    return Snapshot(m.vm._core.snapshot())


def tdx_state() -> Snapshot:
    """A TDX guest: an mmio spte beside empty entries, and memory."""
    m = Machine("ept", FLAT, tdx=True)
    m.access(DATA)
    m.access(MMIO)
    return Snapshot(m.vm._core.snapshot())


def sme_state() -> Snapshot:
    """A host that encrypts: PAE roots, tables and leaves with the C-bit."""
    m = Machine("shadow", FLAT, host=km.HostCpu(vendor="amd", maxphyaddr=48, phys_bits=43, c_bit=47))
    m.access(DATA)
    m.access(MMIO)
    return Snapshot(m.vm._core.snapshot())


STATES = {
    **{"shadow": shadow_state, "tdp": tdp_state, "p32": p32_state, "nx": nx_state},
    **{"tdx": tdx_state, "sme": sme_state},
}


@pytest.mark.parametrize("name", STATES)
def test_the_states_to_be_damaged_are_consistent(name: str) -> None:
    assert check_snapshot(STATES[name]()) == []


def first(mask: Any) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(mask)[0])


def active(s: Snapshot, level: int = 1) -> int:
    return first(s.valid & (s.level == level) & (s.pages["role"] & 0x80 == 0))[0]


def set_spte(s: Snapshot, where: Any, value: int, keep: int = 0) -> None:
    at = first(where)
    s.sptes[at] = np.uint64(int(s.sptes[at]) & keep | value)


def without_cache(s: Snapshot) -> Snapshot:
    """Forget what was computed of the undamaged state."""
    for name in list(s.__dict__):
        if isinstance(getattr(type(s), name, None), type(Snapshot.__dict__["live"])):
            del s.__dict__[name]
    return s


def pages(field: str, change: Callable[[int], int], level: int = 1) -> Damage:
    def damage(s: Snapshot) -> None:
        at = active(s, level)
        s.pages[field][at] = change(int(s.pages[field][at]))

    return damage


def value(name: str, change: int) -> Damage:
    def damage(s: Snapshot) -> None:
        s.values[name] += change

    return damage


def stat(name: str) -> Damage:
    def damage(s: Snapshot) -> None:
        s.stats[name] += 1

    return damage


def leaf(clear: int = 0, put: int = 0, level: int = 1) -> Damage:
    def damage(s: Snapshot) -> None:
        set_spte(s, s.leaf & (s.level == level)[:, None] & ((s.sptes & np.uint64(2)) != 0), put, ~clear)

    return damage


def slot_column(name: str, level: int | None = None) -> Damage:
    def damage(s: Snapshot) -> None:
        column = getattr(s.spaces[0].slots[0], name)
        (column if level is None else column[level])[1] += 1

    return damage


def new_list_head(s: Snapshot) -> None:
    column = s.spaces[0].slots[0].rmap[1]
    column[np.flatnonzero(column & np.uint64(3) == 2)[0]] = 0


def block_in_two_lists(s: Snapshot) -> None:
    column = s.spaces[0].slots[0].rmap[1]
    many = int(np.flatnonzero(column & np.uint64(3) == 2)[0])
    column[int(np.flatnonzero(column == 0)[0])] = column[many]


def entry_in_a_free_page(s: Snapshot) -> None:
    s.pages["on_list"][s.free or 0] = 1
    s.sptes[s.free, 7] = 1


def drop_link(s: Snapshot) -> None:
    set_spte(s, s.link & s.shadow[:, None], 0)


def parent_of_nobody(s: Snapshot) -> None:
    s.pages["parents"][active(s)] = 0


def child_at_the_wrong_level(s: Snapshot) -> None:
    s.pages["role"][active(s)] += 1


def wrong_quadrant(s: Snapshot) -> None:
    s.pages["role"][active(s)] ^= 0x20


def zapped_root_unannounced(s: Snapshot) -> None:
    root = s.vcpus[0].roots[0][0]
    s.pages["role"][root] |= 0x800
    s.vcpus[0].values["requests"] = 0


def zapped_page_nobody_holds(s: Snapshot) -> None:
    """A root as zapping leaves it, in the hash, but no vCPU's any more."""
    root = s.vcpus[0].roots[0][0]
    page = s.pages[root]
    s.sptes[root] = 0
    page["role"] |= 0x800
    page["root_count"] = 0
    s.vcpus[0].roots[:] = [(0, 0) if page == root else (page, pgd) for page, pgd in s.vcpus[0].roots]


def unsync_above_level_1(s: Snapshot) -> None:
    s.pages["unsync"][active(s, 2)] = 1
    s.stats["mmu_unsync"] += 1


def unmark_parent(s: Snapshot) -> None:
    at = first(s.unsync_bits)
    s.unsync_bits[at] = False
    s.pages["unsync_children"][at[0]] -= 1


def miscount_parent(s: Snapshot) -> None:
    s.unsync_bits[first(s.unsync_bits)] = False


def table_in_sync_too_early(s: Snapshot) -> None:
    s.pages["unsync"][:] = 0
    s.stats["mmu_unsync"] = 0


def leaf_beyond_its_rights(s: Snapshot) -> None:
    at = first(s.leaf & s.shadow[:, None] & ((s.sptes & np.uint64(2)) != 0) & ((s.shadowed & np.uint64(4)) != 0))
    s.shadowed[at] &= ~np.uint64(2)


def readonly_slot(s: Snapshot) -> None:
    s.spaces[0].slots[0].flags |= 2


def wrong_frame(s: Snapshot) -> None:
    set_spte(s, s.leaf, 0, -1)
    at = first(s.leaf)
    s.sptes[at] ^= np.uint64(1 << 20)


def slot_over_mmio(s: Snapshot) -> None:
    s.spaces[0].slots[-1].base_gfn = MMIO >> 12
    s.vcpus[0].values["mmio_gfn"] = 0


def record_over_slot(s: Snapshot) -> None:
    s.vcpus[0].values |= {"mmio_gfn": 0, "mmio_generation": s.spaces[0].generation}
    s.vcpus[0].values["mmio_gfn"] = DATA >> 12


def odd_generation(s: Snapshot) -> None:
    s.spaces[0].generation += 1


def update_in_flight(s: Snapshot) -> None:
    s.spaces[0].generation |= 1 << 63


def lost_dirty_bit(s: Snapshot) -> None:
    dirty = s.spaces[0].slots[-1].dirty
    assert dirty is not None
    dirty[:] = 0


def stray_value(s: Snapshot) -> None:
    at = first(s.valid[:, None] & (s.sptes == 0))
    s.sptes[at] = np.uint64(0x5A0)


def special(s: Snapshot) -> Any:
    return (s.pages["special"] != 0)[:, None]


def clear_c_bit(s: Snapshot, where: Any) -> None:
    s.sptes[first(where)] &= ~np.uint64(1 << 47)


def mmio_elsewhere(s: Snapshot) -> None:
    page, entry = first(s.mmio)
    s.sptes[page, entry ^ 1] = s.sptes[page, entry]


def empty_entry_that_raises_ve(s: Snapshot) -> None:
    page, entry = first(s.mmio)
    s.sptes[page, entry ^ 1] = 0


def entry_being_torn_down(s: Snapshot) -> None:
    page, entry = first(s.mmio)
    s.sptes[page, entry ^ 1] = np.uint64(1 << 63 | 0x5A0)


def large_leaf_over_table(s: Snapshot) -> None:
    slot = s.spaces[0].slots[0]
    slot.disallow[2][(int(s.gfn[first(s.leaf & (s.level == 2)[:, None])]) >> 9)] += 1


def large_leaf_beyond_slot(s: Snapshot) -> None:
    s.spaces[0].slots[0].npages = 300


def large_leaf_unbacked(s: Snapshot) -> None:
    s.spaces[0].slots[0].segments[:, 3] = 1


def two_tdp_parents(s: Snapshot) -> None:
    page, entry = first(s.link & s.tdp[:, None] & (s.level == 3)[:, None])
    s.sptes[page, 511] = s.sptes[page, entry]


def lost_tdp_table(s: Snapshot) -> None:
    set_spte(s, s.link & s.tdp[:, None] & (s.level == 2)[:, None], 0)


def shifted_tdp_table(s: Snapshot) -> None:
    s.pages["gfn"][first(s.tdp & (s.level == 1))[0]] += 512


DAMAGE: list[tuple[str, str, str, Damage]] = [
    ("active list", "shadow", "a page is cut off", pages("list_next", lambda _: 0)),
    ("active list", "shadow", "a back link is wrong", pages("list_prev", lambda n: n + 1)),
    ("active list", "shadow", "one too many is counted", value("active_n", 1)),
    ("active list", "shadow", "a page of another generation is left", pages("valid_gen", lambda n: n ^ 1)),
    ("active list", "shadow", "the tail is another page", value("active_tail", 1)),
    ("hash", "shadow", "a page is in the wrong bucket", pages("gfn", lambda n: n + 1)),
    ("hash", "shadow", "a back link is wrong", pages("hash_prev", lambda n: n + 1)),
    ("hash", "shadow", "a chain leads out of the arena", pages("hash_next", lambda _: 1 << 20)),
    ("free list", "shadow", "a page is lost", pages("on_list", lambda _: 1)),
    ("free list", "shadow", "the chain begins at a used page", value("free", 1)),
    ("list blocks", "shadow", "a block is lost", new_list_head),
    ("list blocks", "shadow", "a block is in two lists", block_in_two_lists),
    ("list blocks", "shadow", "a head is of no kind", pages("parents", lambda n: n | 3)),
    ("used pages", "shadow", "one too many is counted", value("used_pages", 1)),
    ("used pages", "shadow", "the quota is broken", value("max_pages", -62)),
    ("used pages", "shadow", "an indirect page too many is counted", value("indirect_pages", 1)),
    ("rmap", "shadow", "a leaf is in no list", new_list_head),
    ("rmap", "shadow", "a list holds an empty spte", leaf(clear=-1)),
    ("rmap", "shadow", "a list belongs to another gfn", lambda s: s.shadowed.__setitem__(first(s.leaf), 7)),
    ("page counters", "shadow", "pages_4k", stat("pages_4k")),
    ("page counters", "tdp", "pages_2m", stat("pages_2m")),
    ("page counters", "tdp", "nx_lpage_splits", stat("nx_lpage_splits")),
    ("parents", "shadow", "a link is gone", drop_link),
    ("parents", "shadow", "a child does not know", parent_of_nobody),
    ("children", "shadow", "a level is left out", child_at_the_wrong_level),
    ("children", "shadow", "a child is zapped", pages("role", lambda n: n | 0x800)),
    ("children", "shadow", "a role differs", pages("role", lambda n: n ^ 0x2000)),
    ("children", "p32", "a quadrant is wrong", wrong_quadrant),
    ("roots", "shadow", "a reference too many", pages("root_count", lambda n: n + 1, level=4)),
    ("roots", "tdp", "a reference too few", lambda s: s.pages["root_count"].__setitem__(s.tdp_roots, 1)),
    ("roots", "shadow", "a zapped root nobody drops", zapped_root_unannounced),
    ("roots", "shadow", "a zapped page is nobody's", zapped_page_nobody_holds),
    ("unsync", "shadow", "an upper table lags", unsync_above_level_1),
    ("unsync", "shadow", "mmu_unsync", stat("mmu_unsync")),
    ("unsync bits", "shadow", "a parent does not know", unmark_parent),
    ("unsync bits", "shadow", "a parent miscounts", miscount_parent),
    ("write protection", "shadow", "a writable table counts as in sync", table_in_sync_too_early),
    ("write tracking", "shadow", "a count is wrong", slot_column("write_track")),
    ("large page counts", "shadow", "a count is wrong", slot_column("disallow", 2)),
    ("writability", "shadow", "W without MMU-writable", leaf(clear=1 << 10)),
    ("writability", "tdp", "MMU-writable without host-writable", leaf(clear=1 << 57, level=2)),
    ("large leaves", "tdp", "a table stands inside", large_leaf_over_table),
    ("large leaves", "tdp", "it leaves its slot", large_leaf_beyond_slot),
    ("large leaves", "tdp", "the host has small pages", large_leaf_unbacked),
    ("rights", "shadow", "the guest's table does not allow W", leaf_beyond_its_rights),
    ("rights", "shadow", "the slot is read-only", readonly_slot),
    ("frames", "shadow", "another frame", wrong_frame),
    ("frames", "tdp", "another frame", wrong_frame),
    ("encryption", "sme", "a leaf is read as plain memory", lambda s: clear_c_bit(s, s.leaf)),
    ("encryption", "sme", "a link is", lambda s: clear_c_bit(s, s.link)),
    ("encryption", "sme", "a PAE root is", lambda s: clear_c_bit(s, special(s) & (s.sptes != 0))),
    ("mmio", "tdp", "a slot stands there", slot_over_mmio),
    ("mmio", "shadow", "neither present nor MMIO", stray_value),
    ("mmio", "tdp", "of another gfn", mmio_elsewhere),
    ("mmio", "tdx", "an empty entry tells the guest", empty_entry_that_raises_ve),
    ("mmio", "tdx", "an entry is being torn down", entry_being_torn_down),
    ("generation", "shadow", "odd", odd_generation),
    ("generation", "shadow", "an update in flight", update_in_flight),
    ("generation", "tdp", "the vCPU's record names memory", record_over_slot),
    ("dirty log", "shadow", "a writable page is not in it", lost_dirty_bit),
    ("tdp tree", "tdp", "a table hangs twice", two_tdp_parents),
    ("tdp tree", "tdp", "a table hangs nowhere", lost_tdp_table),
    ("tdp tree", "tdp", "a table is shifted", shifted_tdp_table),
    ("nx list", "nx", "a page is cut off", lambda s: s.pages["nx_next"].__setitem__(s.nx_head, 0)),
    ("nx list", "nx", "a back link is wrong", lambda s: s.pages["nx_prev"].__setitem__(s.nx_tail, 0)),
    ("nx list", "nx", "the tail is another page", value("nx_tail", -1)),
    ("nx list", "nx", "a page is not marked", lambda s: s.pages["nx_disallowed"].__setitem__(s.nx_head, 0)),
    ("nx list", "nx", "it leads out of the arena", lambda s: s.pages["nx_next"].__setitem__(s.nx_head, 1 << 20)),
    ("nx leaves", "nx", "a huge page may be executed", leaf(clear=1 << 63, level=2)),
]


IDS = [f"{invariant}: {what} ({state})" for invariant, state, what, _ in DAMAGE]


@pytest.mark.parametrize(("invariant", "state", "what", "damage"), DAMAGE, ids=IDS)
def test_a_damaged_state_violates(invariant: str, state: str, what: str, damage: Damage) -> None:
    s = STATES[state]()
    damage(s)
    assert invariant in {v.invariant for v in check_snapshot(without_cache(s)) if not v.hole}


def test_every_invariant_is_tested_by_damage() -> None:
    assert {name for name, *_ in DAMAGE} == set(INVARIANTS)


def test_a_violation_says_which_invariant_where_and_what_was_expected() -> None:
    s = STATES["shadow"]()
    s.stats["pages_4k"] += 1
    (violation,) = check_snapshot(s)
    error = InvariantError([violation])
    assert error.violations == (violation,)
    found = s.stats["pages_4k"]
    assert str(error) == f"1 invariants violated\n  page counters: pages_4k is {found}, expected {found - 1}"


def test_a_closed_vm_has_no_state_to_check() -> None:
    vm = km.VM()
    vm.check()
    vm.close()
    with pytest.raises(VmClosedError):
        vm.check()


def test_a_running_vcpu_forbids_the_check() -> None:
    m = Machine("shadow", LONG)
    stop = threading.Event()
    gvas = np.full(200_000, m.mode.window + DATA, np.uint64)

    def run() -> None:
        while not stop.is_set():
            m.vcpu.access_many(gvas)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        with pytest.raises(VmBusyError, match="vCPU 0 is running"):
            for _ in range(10_000):
                try:
                    m.vm.check()
                except VmBusyError as error:
                    # It was not when the check began.
                    if "a vCPU ran meanwhile" not in str(error):
                        raise
    finally:
        stop.set()
        thread.join()
    m.vm.check()


@pytest.mark.parametrize("mmu", ["shadow", "ept"])
def test_the_hosts_zero_page_may_stand_read_only_for_any_untouched_page(mmu: str) -> None:
    vm = km.VM(mmu)  # type: ignore[arg-type]
    slot = vm.memslots.create(gpa=0, memory=np.zeros(1 << 20, np.uint8))
    vm.host_untouched(slot)
    vcpu = vm.create_vcpu()
    assert vcpu.access(0x3000, "r").outcome is km.Outcome.OK
    state = Snapshot(vm._core.snapshot())
    assert any(state.gfn[place] == 3 and state.pfn[place] == 0 for place in zip(*np.nonzero(state.sptes), strict=True))
    vm.check()
