"""Many accesses in one call are the same accesses one by one: answers, memory, counters and tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvmmmu as km
from kvmmmu.conform.replay import MMUS
from kvmmmu.records import ACCESS
from machine import DATA, FLAT, LONG, LONG5, MMIO, MODES, NX, P32, PAE3, PKE, A, D, Machine, Mode, P, U, W
from world import World

number = st.integers(0, (1 << 32) - 1)
kinds = st.integers(0, 2)
batches = st.tuples(
    st.just("batch"),
    st.lists(number, min_size=1, max_size=8),  # addresses that take turns
    st.lists(st.tuples(st.integers(0, 7), kinds, st.integers(1, 40)), min_size=2, max_size=12),  # which, how, how often
    st.sampled_from((0, 3)),
    st.sampled_from((1, 4, 16)),
)
steps = st.lists(
    st.one_of(
        batches,
        batches,
        st.tuples(st.just("entry"), st.integers(0, 15), st.integers(0, 3), number),
        st.tuples(st.just("space"), st.integers(0, 1)),
        st.tuples(st.just("invlpg"), number),
        st.tuples(st.just("slot")),
    ),
    min_size=3,
    max_size=10,
)


def one_by_one(vcpu: km.VCpu, gvas: npt.NDArray[np.uint64], how: npt.NDArray[np.uint8], **more: Any) -> Any:
    return np.concatenate([vcpu.access_many(gvas[i : i + 1], how[i : i + 1], **more) for i in range(len(gvas))])


def same(many: Machine, single: Machine, gvas: Any, how: Any, **more: Any) -> npt.NDArray[np.void]:
    """The same accesses on twins, in one call and one by one; the answers."""
    addresses, codes = np.array(gvas, np.uint64), np.array(how, np.uint8)
    got = many.vcpu.access_many(addresses, codes, **more)
    wanted = one_by_one(single.vcpu, addresses, codes, **more)
    different = np.flatnonzero(got != wanted)
    assert not different.size, f"row {different[0]}: {got[different[0]]}, alone {wanted[different[0]]}"
    assert np.array_equal(many.ram, single.ram)
    assert many.vm.stats == single.vm.stats
    many.vm.check()
    return got


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("mode", [FLAT, P32, PAE3, LONG, LONG5], ids=lambda mode: mode.name)
@settings(max_examples=10, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(layout=st.lists(number, min_size=40, max_size=40), program=steps)
def test_whatever_the_tables_say(mmu: str, mode: Mode, layout: list[int], program: list[tuple[Any, ...]]) -> None:
    many, single = twins = World(mmu, mode), World(mmu, mode)
    for world in twins:
        world.lay_out(layout)
        world.vcpu.load_cr3(world.cr3)
    for step, *what in program:
        if step == "batch":
            pool = [many.gva(n) for n in what[0]]
            rows = [(pool[at % len(pool)] + n, kind) for at, kind, times in what[1] for n in range(times)]
            same(many, single, *zip(*rows, strict=True), cpl=what[2], size=what[3])
        for world in twins:
            if step == "entry":
                world.guest_writes_entry(what[0], what[1], what[2] >> 3, what[2])
            elif step == "space" and mode.levels:
                world.vcpu.load_cr3(world.tables[what[0]])
            elif step == "invlpg":
                world.vcpu.invlpg(world.gva(what[0]))
            elif step == "slot":
                world.toggle_slot()


def pages(mode: Mode, n: int = 64) -> list[int]:
    return [mode.user + 4096 * i if mode.levels else DATA + 4096 * i for i in range(n)]


def mapped(mmu: str, mode: Mode, bits: int = P | W | U | A | D, **how: Any) -> Machine:
    machine = Machine(mmu, mode, start=False, **how)
    for n, gva in enumerate(pages(mode)):
        if mode.levels:
            machine.map(gva, DATA + 4096 * n, bits)
    machine.start()
    return machine


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.name)
def test_pages_in_any_order_by_any_kind_again_and_again(mmu: str, mode: Mode) -> None:
    many, single = mapped(mmu, mode), mapped(mmu, mode)
    draw = np.random.default_rng(1)
    for cpl in (0, 3):
        gvas = draw.choice(pages(mode), 600).astype(np.uint64) + draw.integers(0, 4090, 600).astype(np.uint64)
        rows = same(many, single, gvas, draw.integers(0, 3, 600), cpl=cpl, size=4)
        assert (rows["outcome"] == km.Outcome.OK).all()
        assert (rows["exits"][-100:] == 0).all()


@pytest.mark.parametrize("mmu", MMUS)
def test_an_access_over_the_end_of_its_page_is_made_of_two(mmu: str) -> None:
    many, single = mapped(mmu, LONG), mapped(mmu, LONG)
    base = pages(LONG)[0]
    rows = same(many, single, [base + 4096 * (n % 60) + 4090 + n % 8 for n in range(400)], [1] * 400, size=8)
    assert (rows["outcome"] == km.Outcome.OK).all()


@pytest.mark.parametrize("mmu", MMUS)
def test_a_clear_dirty_bit_is_set_by_the_first_store_among_reads(mmu: str) -> None:
    many, single = mapped(mmu, LONG, P | W | U), mapped(mmu, LONG, P | W | U)
    gvas = pages(LONG)
    same(many, single, gvas * 4, [0] * 256)
    assert not many.peek(many.entry_gpa(gvas[5])) & D
    same(many, single, gvas * 4, [0] * 128 + [1] + [0] * 127)
    assert [bool(many.peek(many.entry_gpa(gva)) & D) for gva in gvas] == [True] + [False] * 63


@pytest.mark.parametrize("mmu", MMUS)
def test_what_one_kind_may_not_do_ends_in_its_fault_between_rows_that_are_granted(mmu: str) -> None:
    many, single = mapped(mmu, LONG, P | U | A | D | NX), mapped(mmu, LONG, P | U | A | D | NX)
    how = [0] * 300
    how[100], how[200] = 1, 2
    rows = same(many, single, pages(LONG)[:4] * 75, how, cpl=3)
    assert np.flatnonzero(rows["outcome"] == km.Outcome.PF).tolist() == [100, 200]


@pytest.mark.parametrize("mmu", ["ept", "npt"])  # shadow paging knows no protection keys
def test_protection_keys_are_looked_at_in_every_row(mmu: str) -> None:
    twins = [mapped(mmu, LONG) for _ in range(2)]
    for machine in twins:
        machine.poke(machine.entry_gpa(pages(LONG)[3]), DATA + 3 * 4096 | P | W | U | A | D | 1 << 59)
        machine.start(cr4=LONG.cr4 | PKE, pkru=0b1000)  # key 1: no stores
    reads_it = same(*twins, pages(LONG)[:8] * 40, [1, 0] * 160, cpl=3)
    assert (reads_it["outcome"] == km.Outcome.OK).all()
    writes_it = same(*twins, pages(LONG)[:8] * 40, [0, 1] * 160, cpl=3)
    assert np.flatnonzero(writes_it["outcome"] == km.Outcome.PF).tolist() == list(range(3, 320, 8))


@pytest.mark.parametrize("mmu", MMUS)
def test_devices_among_memory_are_devices_every_time(mmu: str) -> None:
    many, single = mapped(mmu, LONG), mapped(mmu, LONG)
    gvas = pages(LONG)
    for machine in (many, single):
        machine.map(gvas[7], MMIO)
    rows = same(many, single, gvas * 8, [0] * 512)
    assert np.flatnonzero(rows["outcome"] == km.Outcome.MMIO).tolist() == list(range(7, 512, 64))


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("page_size", ["4K", "2M"])
def test_large_pages_of_the_guest_and_of_kvm_are_granted_by_kind(mmu: str, page_size: str) -> None:
    twins = [Machine(mmu, LONG, page_size=page_size, start=False) for _ in range(2)]
    for machine in twins:
        machine.map(LONG.user, 0x20_0000, P | U | A | NX, level=2)  # data, read only, clean
        machine.map(LONG.user + (2 << 20), 0x40_0000, P | W | U | A, level=2)  # its D bit is clear
        machine.start()
    draw = np.random.default_rng(2)
    gvas = (LONG.user + draw.integers(0, 4 << 20, 2000)).astype(np.uint64)
    rows = same(*twins, gvas, draw.choice([0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2], 2000))
    assert {km.Outcome(code) for code in rows["outcome"]} == {km.Outcome.OK, km.Outcome.PF}


@pytest.mark.parametrize("mmu", MMUS)
def test_a_dirty_log_holds_every_page_that_a_batch_wrote(mmu: str) -> None:
    twins = [mapped(mmu, LONG) for _ in range(2)]
    gvas = pages(LONG)
    for machine in twins:
        machine.vm.memslots.set_flags(machine.slot, log_dirty=True)
    for _ in range(3):
        same(*twins, gvas * 4, [0] * 64 + [1] * 192)
        logs = [machine.vm.get_dirty_log(machine.slot) for machine in twins]
        assert np.array_equal(*logs)
        assert logs[0].any()


@pytest.mark.parametrize("mmu", MMUS)
def test_rows_with_a_tlb_are_hits_counted_one_by_one(mmu: str) -> None:
    twins = [mapped(mmu, LONG, tlb=km.Tlb()) for _ in range(2)]
    draw = np.random.default_rng(3)
    for _ in range(3):
        same(*twins, draw.choice(pages(LONG), 500), draw.integers(0, 2, 500))
        assert twins[0].vcpu.stats == twins[1].vcpu.stats
    assert twins[0].vcpu.stats["tlb_hit"] > 1000


def test_rows_hold_nothing_of_the_memory_they_are_written_to() -> None:
    machine = mapped("ept", LONG)
    gvas = np.array(pages(LONG) * 4, np.uint64)
    clean, dirty = np.zeros(256, ACCESS), np.zeros(256, ACCESS)
    dirty.view(np.uint8)[:] = 0xFF
    for out in (clean, clean, dirty):
        machine.vcpu.access_into(gvas, np.zeros(256, np.uint8), out, 0, 1)
    assert clean.tobytes() == dirty.tobytes()
