"""A guest that flushes as the architecture asks sees nothing of the TLB, whatever its tables say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kvmmmu as km
from kvmmmu.check.tlb import tlb_entries
from kvmmmu.conform.replay import MMUS, replay
from kvmmmu.errors import InvariantError
from kvmmmu.traces import bundled_trace, open_trace
from machine import DATA, LONG, LONG5, P32, PAE3, Machine, Mode
from world import World

number = st.integers(0, (1 << 32) - 1)
tlbs = st.sampled_from(
    [
        km.Tlb(),
        km.Tlb((1, 1), None, None, None, pde=(1, 1), pdpte=None, guest_physical=(1, 1)),
        km.Tlb((2, 1), (1, 1), None, (1, 2), guest_physical=None),
    ]
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("access"), number, st.sampled_from("rwx"), st.sampled_from((0, 3))),
        st.tuples(st.just("entry"), st.integers(0, 15), st.integers(0, 3), number),
        st.tuples(st.just("space"), st.integers(0, 1)),
        st.tuples(st.just("slot")),
        st.tuples(st.just("again"), st.integers(1, 4)),
    ),
    min_size=4,
    max_size=24,
)


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("mode", [P32, PAE3, LONG, LONG5], ids=lambda mode: mode.name)
@settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tlb=tlbs, layout=st.lists(number, min_size=40, max_size=40), program=steps)
def test_answers_and_memory_are_those_of_a_plain_walk(
    mmu: str, mode: Mode, tlb: km.Tlb, layout: list[int], program: list[tuple[Any, ...]]
) -> None:
    world = World(mmu, mode, tlb=tlb)
    world.lay_out(layout)
    world.vcpu.load_cr3(world.cr3)
    done: list[tuple[int, str, int]] = []
    for step, *what in program:
        if step == "access":
            gva, kind, cpl = what
            done.append((world.gva(gva), kind, cpl))
            world.compare(*done[-1])
        elif step == "entry":
            world.guest_writes_entry(what[0], what[1], what[2] >> 3, what[2])
            world.vcpu.load_cr3(world.vcpu.regs.cr3)
        elif step == "space":
            world.vcpu.load_cr3(world.tables[what[0]])
        elif step == "slot":
            world.toggle_slot(forget=True)
        else:
            for gva, kind, cpl in done[-what[0] :]:
                world.compare(gva, kind, cpl)


def outcome(result: km.AccessResult) -> tuple[Any, ...]:
    return result.outcome, result.gpa, result.error_code, result.mmio


@pytest.mark.parametrize("mmu", MMUS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(program=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.sampled_from("rwx0")), max_size=40))
def test_a_guest_that_flushes_runs_alike_with_a_tlb_and_without(mmu: str, program: list[tuple[int, int, str]]) -> None:
    """Remapping and INVLPG of that page alone: everything else that is cached must go on being true."""
    twins = [Machine(mmu, LONG, tlb=tlb) for tlb in (None, km.Tlb())]
    for page, frame, kind in program:
        gva, answers = twins[0].mode.user + page * 4096, []
        for m in twins:
            if m.peek(m.entry_gpa(gva, 2)) & 1 == 0:
                m.map(gva, 0, 0)
                m.invlpg(gva)
            if kind == "0":
                m.set_entry(gva, DATA + frame * 4096 | (0x67 if frame else 0))
                m.invlpg(gva)
            else:
                answers.append(outcome(m.access(gva, kind)))
        assert answers[:1] == answers[1:]
    assert np.array_equal(twins[0].ram, twins[1].ram)


SMALL = km.Tlb((1, 1), None, None, None, pde=(1, 1), guest_physical=(1, 1))


@pytest.mark.parametrize(("mmu", "tlb"), [*((mmu, km.Tlb()) for mmu in MMUS), ("ept", SMALL)])
def test_a_recorded_boot_replays_alike_with_a_tlb(mmu: Any, tlb: km.Tlb) -> None:
    report = replay(open_trace(bundled_trace()), mmu=mmu, tlb=tlb)
    assert report.ok and report.tables_compared > 0
    assert report.tlb["tlb_hit"] > 10_000 and report.tlb["tlb_miss"] > 1000


@pytest.mark.shared
@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("name", ["linux-i686-pae-mixed.npz", "linux-x86_64-4level-mmio-first1M.raw.zst"])
def test_every_recorded_run_replays_alike_with_a_tlb(mmu: Any, name: str, shared: Any) -> None:
    report = replay(open_trace(shared / "traces" / name), mmu=mmu, tlb=km.Tlb(), check_every=100_000)
    assert report.ok


def test_an_entry_that_kvms_tables_do_not_have_is_a_violation(monkeypatch: pytest.MonkeyPatch) -> None:
    m = Machine("ept", tlb=km.Tlb())
    m.map(m.mode.user, DATA)
    m.access(m.mode.user)
    words = m.vm._core.tlb_list(0)
    assert len(words) and not words[:, -1].any()
    words[0, -1] = 2
    (violation,) = tlb_entries(0, words)
    assert violation.invariant == "TLB" and "another frame" in violation.found
    monkeypatch.setattr("kvmmmu.check.run.tlb_entries", lambda vcpu, found: tlb_entries(vcpu, words))
    with pytest.raises(InvariantError, match="another frame"):
        m.vm.check()
