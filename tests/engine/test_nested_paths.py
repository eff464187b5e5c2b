"""Paths through two dimensions: a vCPU that remembers them answers as one that is made to forget before each access."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvmmmu as km
from machine import DATA, LONG, LONG5, P32, PAE3, USER, Machine, Mode
from world import World

number = st.integers(0, (1 << 32) - 1)
accesses = st.tuples(
    st.just("access"),
    st.lists(number, min_size=1, max_size=4),
    st.sampled_from("rwx"),
    st.sampled_from((0, 3)),
)
steps = st.lists(
    st.one_of(
        accesses,
        accesses,
        st.tuples(st.just("entry"), st.integers(0, 15), st.integers(0, 3), number),
        st.tuples(st.just("entry"), st.integers(0, 15), st.integers(0, 3), number),
        st.tuples(st.just("space"), st.integers(0, 1)),
        st.tuples(st.just("slot")),
        st.tuples(st.just("zap")),
    ),
    min_size=3,
    max_size=8,
)


def told(result: km.AccessResult, mode: Mode) -> tuple[Any, ...]:
    answer = (result.outcome, result.gpa, result.error_code, result.gva, result.mmio)
    # A CR3 load of PAE paging reads the PDPTEs, and may take what faults there are before the access does.
    return answer if mode is PAE3 else (*answer, result.path, result.exits)


def forget(vcpu: km.VCpu) -> None:
    """Begin with tables that may be others: bit 3 of CR3 (PWT) says nothing about where they stand."""
    vcpu.load_cr3(vcpu.regs.cr3 ^ 8)


@pytest.mark.parametrize("mmu", ["ept", "npt"])
@pytest.mark.parametrize("mode", [P32, PAE3, LONG, LONG5], ids=lambda mode: mode.name)
@settings(max_examples=6, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(layout=st.lists(number, min_size=40, max_size=40), program=steps)
def test_what_is_remembered_changes_no_answer(
    mmu: str, mode: Mode, layout: list[int], program: list[tuple[Any, ...]]
) -> None:
    remembers, forgets = twins = World(mmu, mode), World(mmu, mode)
    for world in twins:
        world.lay_out(layout)
        world.vcpu.load_cr3(world.cr3)
    pool: list[int] = []
    for step, *what in program:
        if step == "access":
            pool += [remembers.gva(n) for n in what[0]]
        # After every step, all addresses so far, each often enough to make its path and to take it.
        for gva in [gva for gva in pool[-4:] for _ in range(4)]:
            kind, cpl = what[1:] if step == "access" else ("r", 0)
            forget(forgets.vcpu)
            one, other = (told(world.vcpu.access(gva, kind, cpl=cpl), mode) for world in twins)
            assert one == other, hex(gva)
        for world in twins:
            if step == "entry":
                world.guest_writes_entry(what[0], what[1], what[2] >> 3, what[2])
            elif step == "space":
                world.vcpu.load_cr3(world.tables[what[0]])
            elif step == "slot":
                world.toggle_slot()
            elif step == "zap":
                world.vm.set_nx_huge_pages(True)
                world.vm.set_nx_huge_pages(False)
        assert np.array_equal(remembers.ram, forgets.ram)
        assert mode is PAE3 or remembers.vm.stats == forgets.vm.stats


@pytest.mark.parametrize("mmu", ["ept", "npt"])
def test_memory_that_replaces_other_memory_at_the_same_frames_is_what_is_read(mmu: str) -> None:
    """A guest's table: all entries that lead to it come out as they were, but other bytes stand there now."""
    machine = Machine(mmu, LONG)
    table = 0x200_0000
    machine.map(LONG.user, DATA)
    machine.poke(machine.entry_gpa(LONG.user, 2), table | USER)
    frames = set()
    for n in range(8):
        frame = DATA + n * 4096
        memory = np.full(512, frame | USER, np.uint64)
        slot = machine.vm.memslots.create(gpa=table, memory=memory)
        # Every other time too few accesses for a path, so that the one before stays, and its root comes back.
        times = 1 if n % 2 else 5
        assert [machine.vcpu.access(LONG.user).gpa for _ in range(times)] == [frame] * times
        frames.add(machine.vm.memslots._core.find_gfn(table >> 12, 0)[1])
        machine.vm.memslots.delete(slot)
    assert len(frames) == 1


@pytest.mark.parametrize("mmu", ["ept", "npt"])
@pytest.mark.parametrize("level", [4, 3, 2, 1])
def test_a_path_ends_with_any_entry_of_the_guest(mmu: str, level: int) -> None:
    """One store to one of the guest's entries, and back: the next access follows it."""
    machine = Machine(mmu, LONG)
    machine.map(LONG.user, DATA)
    where = machine.entry_gpa(LONG.user, level)
    entry = machine.peek(where)
    for value in (entry, 0, entry, 0, entry):
        machine.poke(where, value)
        outcome = km.Outcome.OK if value else km.Outcome.PF
        assert [machine.vcpu.access(LONG.user).outcome for _ in range(5)] == [outcome] * 5


@pytest.mark.parametrize("mmu", ["ept", "npt"])
@pytest.mark.parametrize("level", [4, 3, 2, 1, 0])
def test_a_path_ends_with_any_entry_of_kvms(mmu: str, level: int) -> None:
    """The host takes away the page of one of the guest's tables, or of the data: the next access faults it in again."""
    machine = Machine(mmu, LONG, page_size="4K")
    machine.map(LONG.user, DATA)
    page = machine.entry_gpa(LONG.user, level) >> 12 if level else DATA >> 12
    for _ in range(3):
        assert machine.vcpu.access(LONG.user).exits > 0
        assert [machine.vcpu.access(LONG.user).exits for _ in range(5)] == [0] * 5
        saved = machine.ram[page * 4096 : page * 4096 + 4096].copy()
        machine.vm.host_dontneed(machine.slot, first_page=page, npages=1)
        machine.ram[page * 4096 : page * 4096 + 4096] = saved
