"""NX huge pages: what a fetch costs, and the worker that gives split pages a new start (Linux 6.1)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvmmmu as km
from kvmmmu.errors import ArgumentError, VmClosedError
from machine import FLAT, LONG, USER, Machine, MiB
from scene import TDP, Flavour

OK = km.Outcome.OK
HUGE = 2 * MiB
AREA = 0x4000_0000  # a slot backed by 2 MiB pages
PAGES = 8
EVERY = (Flavour("shadow", FLAT), Flavour("shadow", LONG), *(Flavour(f.mmu, FLAT, f.tdp_mmu) for f in TDP))
every = pytest.mark.parametrize("flavour", EVERY, ids=str)
MEMORY = np.zeros(PAGES * HUGE, np.uint8)


class Box(Machine):
    """A slot of eight huge pages; a paging guest sees each through a large page of its own."""

    def __init__(self, flavour: Flavour, **how: Any) -> None:
        super().__init__(flavour.mmu, flavour.mode, tdp_mmu=flavour.tdp_mmu, **({"nx_huge_pages": True} | how))
        self.area = self.vm.memslots.create(gpa=AREA, memory=MEMORY, page_size="2M")
        for n in range(PAGES if flavour.mode.levels else 0):
            self.map(AREA + n * HUGE, AREA + n * HUGE, USER, level=2)

    def touch(self, n: int, kind: str = "r", offset: int = 0) -> km.AccessResult:
        result = self.access(AREA + n * HUGE + offset, kind)
        assert result.outcome is OK
        return result

    def split(self) -> list[int]:
        """Which huge pages are mapped by tables now."""
        gfns = [p.gfn for p in self.vm.page_tables(self.vcpu) if p.nx_disallowed]
        return sorted((gfn - (AREA >> 12)) // 512 for gfn in gfns)

    def executable(self, n: int) -> bool | None:
        """Whether the leaf of a huge page may be executed; None where a table or nothing stands."""
        address = AREA + n * HUGE
        for table in self.vm.page_tables(self.vcpu):
            if table.level == 2:
                for entry in table.entries:
                    if entry.address == address and entry.kind == "leaf":
                        return bool(entry.spte & 4) if self.vm.mmu == "ept" else not entry.spte >> 63
        return None


@every
def test_recovery_makes_room_for_a_huge_page_and_the_next_data_fault_maps_it(flavour: Flavour) -> None:
    b = Box(flavour)
    b.touch(0)
    assert b.executable(0) is False
    b.touch(0, "x")
    assert (b.executable(0), b.split(), b.vm.stats["nx_lpage_splits"]) == (None, [0], 1)
    b.touch(0, "r", 0x5000)  # a data fault does not undo the split
    assert b.split() == [0]
    count = b.count("remote_tlb_flush_requests", "nx_lpage_splits")
    b.vm.events.enable("kvm_mmu_prepare_zap_page")
    assert b.vm.recover_nx_huge_pages() == 1
    b.vm.check()
    assert len(b.vm.events.text().splitlines()) == 1
    assert count["remote_tlb_flush_requests"] == 1
    assert (b.vm.stats["nx_lpage_splits"], b.vm.stats["pages_2m"]) == (0, 0)
    b.touch(0)
    assert (b.executable(0), b.vm.stats["pages_2m"]) == (False, 1)
    b.touch(0, "x")
    assert b.split() == [0]  # and a fetch splits it again


@every
@pytest.mark.parametrize(("ratio", "gone"), [(1, 5), (2, 3), (3, 2), (5, 1), (60, 1), (2**32 - 1, 1), (0, 0)], ids=str)
def test_one_table_in_so_many_goes_rounded_up_and_the_oldest_first(flavour: Flavour, ratio: int, gone: int) -> None:
    b = Box(flavour)
    order = [3, 0, 4, 1, 2]
    for n in order:
        b.touch(n, "x")
    assert b.vm.recover_nx_huge_pages(ratio) == gone
    b.vm.check()
    assert b.split() == sorted(order[gone:])
    assert b.vm.stats["nx_lpage_splits"] == 5 - gone


@every
def test_a_table_that_was_zapped_for_another_reason_is_not_recovered_again(flavour: Flavour) -> None:
    b = Box(flavour)
    for n in range(3):
        b.touch(n, "x")
    b.vm.memslots.delete(b.area)
    b.access(0x2000 if not flavour.mode.levels else b.mode.window)  # the vCPU drops its old root
    assert b.vm.stats["nx_lpage_splits"] == 0
    assert b.vm.recover_nx_huge_pages(1) == 0
    assert b.vm.recover_nx_huge_pages(1) == 0


@every
def test_a_logged_slot_is_no_exception(flavour: Flavour) -> None:
    b = Box(flavour)
    b.touch(0, "x")
    b.vm.memslots.set_flags(b.area, log_dirty=True)
    assert b.vm.recover_nx_huge_pages(1) == 1
    b.touch(0)
    assert b.executable(0) is None  # logging still wants small pages
    assert b.vm.stats["nx_lpage_splits"] == 0


@every
def test_small_pages_that_no_huge_page_could_replace_are_not_counted(flavour: Flavour) -> None:
    b = Box(flavour)
    small = b.access(0x3000 if not flavour.mode.levels else b.mode.window + 0x3000, "x", cpl=0)
    assert (small.outcome, b.vm.stats["nx_lpage_splits"]) == (OK, 0)


@pytest.mark.parametrize("mmu", ["ept", "npt"])
def test_the_tdp_mmu_takes_the_parents_entry_first_then_the_tables_present_ones(mmu: str) -> None:
    b = Box(Flavour(mmu, FLAT))
    b.touch(0, "x")
    b.touch(0, "r", 0x7000)
    b.vm.events.enable(("kvm_tdp_mmu_spte_changed", "kvm_mmu_prepare_zap_page"))
    b.vm.recover_nx_huge_pages(1)
    lines = b.vm.events.text().splitlines()
    gfn = AREA >> 12
    changes = [line.split() for line in lines if line.startswith("kvm_tdp_mmu_spte_changed")]
    assert lines[0].startswith(f"kvm_tdp_mmu_spte_changed: as id 0 gfn {gfn:x} level 2")
    assert lines[1].startswith("kvm_mmu_prepare_zap_page: sp gen 0 gfn 40000 l1")
    # Nobody else faults meanwhile: of the table's 512 entries only the present ones are taken.
    assert [(line[5], line[7], line[-1]) for line in changes] == [
        (f"{gfn:x}", "2", "0"), (f"{gfn:x}", "1", "5a0"), (f"{gfn + 7:x}", "1", "5a0")
    ]  # fmt: skip
    assert len(lines) == 4


def test_two_vcpus_share_one_tree_and_one_recovery() -> None:
    b = Box(Flavour("npt", FLAT))
    b.touch(0, "x")
    first, b.vcpu = b.vcpu, b.vm.create_vcpu()
    b.start()
    assert b.touch(0, "x").exits == 0
    assert b.vm.stats["nx_lpage_splits"] == 1
    b.vm.recover_nx_huge_pages(1)
    for vcpu in (first, b.vcpu):
        assert vcpu.access(AREA).outcome is OK
    assert b.executable(0) is False


@every
def test_switching_the_mitigation_zaps_everything_and_maps_by_the_new_rule(flavour: Flavour) -> None:
    b = Box(flavour, nx_huge_pages=False)
    b.touch(0, "x")
    assert b.executable(0) is True
    valid = b.vm._core.mmu_valid_gen
    b.vm.set_nx_huge_pages(True)
    b.vm.check()
    assert b.vm._core.mmu_valid_gen != valid
    b.touch(0)
    assert b.executable(0) is False
    b.vm.set_nx_huge_pages(True)
    assert b.vm._core.mmu_valid_gen != valid  # no change, nothing zapped
    b.vm.set_nx_huge_pages(False)
    assert b.vm._core.mmu_valid_gen == valid
    b.touch(0)
    assert b.executable(0) is True


def test_the_ratio_is_a_switch_of_the_behaviour() -> None:
    assert km.Behaviour().nx_huge_pages_recovery_ratio == 60
    b = Box(Flavour("ept", FLAT), behaviour=km.Behaviour(nx_huge_pages=True, nx_huge_pages_recovery_ratio=2))
    assert b.vm.behaviour.nx_huge_pages_recovery_ratio == 2
    for n in range(4):
        b.touch(n, "x")
    assert b.vm.recover_nx_huge_pages() == 2
    for bad in (-1, 1 << 32):
        with pytest.raises((ArgumentError, OverflowError), match="nx_huge_pages_recovery_ratio"):
            km.Behaviour(nx_huge_pages_recovery_ratio=bad)
        with pytest.raises((ArgumentError, OverflowError), match="ratio"):
            b.vm.recover_nx_huge_pages(bad)
    with pytest.raises(TypeError, match="ratio"):
        b.vm.recover_nx_huge_pages(1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="on must be"):
        b.vm.set_nx_huge_pages(1)  # type: ignore[arg-type]
    assert b.vm.stats["nx_lpage_splits"] == 2
    b.vm.close()
    with pytest.raises(VmClosedError):
        b.vm.recover_nx_huge_pages()


STEPS = st.one_of(
    st.tuples(st.just("touch"), st.integers(0, PAGES - 1), st.sampled_from("rwx"), st.integers(0, 511)),
    st.tuples(st.just("recover"), st.sampled_from([1, 2, 3, 60])),
    st.tuples(st.just("switch")),
    st.tuples(st.just("log")),
    st.tuples(st.just("take"), st.integers(0, PAGES * 512 - 4)),
    st.tuples(st.just("move")),
)


@every
@settings(max_examples=8)
@given(st.lists(STEPS, max_size=20))
def test_list_count_and_leaves_stay_consistent(flavour: Flavour, steps: list[tuple[Any, ...]]) -> None:
    b = Box(flavour)
    on = logged = True
    for name, *how in steps:
        if name == "touch":
            gva = AREA + how[0] * HUGE + how[2] * 4096
            assert b.access(gva, how[1]).outcome in (OK, km.Outcome.MMIO, km.Outcome.INTERNAL_ERROR)
        elif name == "recover":
            before = b.vm.stats["nx_lpage_splits"]
            gone = b.vm.recover_nx_huge_pages(how[0])
            assert gone <= -(-before // how[0])
        elif name == "switch":
            on = not on
            b.vm.set_nx_huge_pages(on)
        elif name == "log":
            b.vm.memslots.set_flags(b.area.number, log_dirty=logged)
            logged = not logged
        elif name == "take":
            b.vm.host_dontneed(b.area.number, first_page=how[0], npages=3)
        else:
            there = b.vm.memslots[b.area.number].gpa
            b.vm.memslots.move(b.area.number, AREA + (0 if there != AREA else 0x1000_0000))
        b.vm.check()
