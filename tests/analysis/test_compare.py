"""Designs held against each other on one recorded run: the same answers, and counters that show what each saves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmmmu.analysis.compare
from kvmmmu.analysis.compare import Row, compare, designs
from kvmmmu.conform.replay import ReplayReport, replay
from kvmmmu.conform.slot_changes import BASE, SlotChanges
from kvmmmu.errors import ArgumentError, FormatError
from kvmmmu.memslots import MemSlot, MemSlots
from kvmmmu.tlb import Tlb
from kvmmmu.traces import MemoryArea, Trace, open_trace

TRACES = Path(__file__).parent.parent / "data" / "traces"
RECORDED = TRACES / "linux-i686-pae-mixed-first60k.npz"


@pytest.fixture(scope="module")
def trace() -> Trace:
    return open_trace(RECORDED)


def rows_of(trace: Trace, *, rounds: int = 1, slot_changes: SlotChanges | None = None, **axes: Any) -> dict[str, Row]:
    rows = compare(trace, designs(**axes), rounds=rounds, slot_changes=slot_changes)
    assert all(row.report.ok for row in rows), [row.report.first for row in rows]
    return {str(row.design): row for row in rows}


def test_designs_are_all_combinations_of_what_is_named() -> None:
    switches = [("one_root", True), ("one_root", False), ("no_retry", True)]
    named = designs(["ept"], ["off", "off"], ["6.1", "3.1"], switches)
    assert [str(design) for design in named] == [
        "ept, off, one_root=on, no_retry=on",
        "ept, off, one_root=off, no_retry=on",
        "ept, off, 3.1, one_root=on, no_retry=on",
        "ept, off, 3.1, one_root=off, no_retry=on",
    ]
    assert ["one_root" in design.behaviour.switches for design in named] == [True, False, True, False]


def test_without_names_they_are_the_three_mmus_with_three_schemes_and_profiles_bring_their_own() -> None:
    assert len(designs()) == 9
    own = designs(["npt"], profiles=["6.1", "3.1", "seed"])
    assert [str(design) for design in own] == ["npt, generation", "npt, zap_all, 3.1", "npt, unguarded, seed"]


def test_equal_designs_have_equal_counters_in_every_round(trace: Trace) -> None:
    # Under shadow paging there is no TDP MMU to switch.
    axes: dict[str, Any] = {"mmus": ["shadow"], "switches": [("tdp_mmu", True), ("tdp_mmu", False)]}
    once = rows_of(trace, mmio_schemes=["generation"], **axes)
    twice = rows_of(trace, mmio_schemes=["generation"], rounds=2, **axes)
    counts = [row.counts() for row in (*once.values(), *twice.values())]
    assert len(counts) == 4 and counts[0]["pf_taken"]
    assert all(count == counts[0] for count in counts)


def test_designs_take_turns_and_their_time_is_held_against_the_first_of_the_same_round(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = replay(trace, mmu="ept")
    asked: list[str] = []
    # The machine is ten times slower in the second round.
    seconds = {"ept": [1.0, 10.0, 1.0], "npt": [2.0, 30.0, 1.0]}

    def stand_in(trace: Trace, *, mmu: str, **how: Any) -> ReplayReport:
        asked.append(mmu)
        return replace(report, cpu_seconds=seconds[mmu].pop(0))

    monkeypatch.setattr(kvmmmu.analysis.compare, "replay", stand_in)
    first, second = compare(trace, designs(["ept", "npt"], ["off"]), rounds=3)
    assert asked == ["ept", "npt", "npt", "ept", "ept", "npt"]
    assert (first.cpu.q1, first.cpu.median, first.cpu.q3) == (1, 1, 1)
    assert (second.cpu.q1, second.cpu.median, second.cpu.q3) == (1.5, 2, 2.5)


def test_without_caching_every_mmio_access_is_slow_and_searches_memslots(trace: Trace) -> None:
    rows = rows_of(trace, mmus=["ept"], mmio_schemes=["off", "generation"])
    off, cached = rows["ept, off"].counts(), rows["ept, generation"].counts()
    accesses = off["mmio_exits"]
    assert accesses
    assert (off["mmio_slow"], off["mmio_cache_hit"], off["mmio_spte_hit"], off["mmio_faults"]) == (accesses, 0, 0, 0)
    assert (off["slot_search"] or 0) >= accesses
    assert (cached["mmio_slow"] or 0) < 0.01 * accesses > (cached["slot_search"] or 0) - (cached["pf_taken"] or 0)
    assert cached["mmio_faults"] == (cached["mmio_cache_hit"] or 0) + (cached["mmio_spte_hit"] or 0)


def test_generations_spare_the_zap_when_a_slot_is_made(trace: Trace) -> None:
    schemes = {"mmus": ["shadow"], "mmio_schemes": ["zap_all", "generation"]}
    still = rows_of(trace, **schemes)
    assert still["shadow, zap_all"].counts() == still["shadow, generation"].counts()
    rows = rows_of(trace, slot_changes=SlotChanges(2048), **schemes)
    zap_all, generation = rows["shadow, zap_all"].counts(), rows["shadow, generation"].counts()
    for key in ("mmu_shadow_zapped", "mmu_cache_miss", "guest_walk", "slot_search"):
        assert (zap_all[key] or 0) > (generation[key] or 0) > (still["shadow, generation"].counts()[key] or 0), key


def test_slots_change_by_their_seed_and_not_after_the_last_record(
    trace: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zapped(changes: SlotChanges) -> int:
        report = replay(trace, mmu="shadow", mmio_scheme="generation", slot_changes=changes)
        return report.counters["mmu_shadow_zapped"]

    # Making a slot zaps nothing, moving and deleting one does: the seed decides how often.
    assert zapped(SlotChanges(1024, seed=5)) == zapped(SlotChanges(1024, seed=5)) != zapped(SlotChanges(1024, seed=6))
    made: list[int] = []
    create = MemSlots.create

    def counted(slots: MemSlots, **what: Any) -> MemSlot:
        made.append(what["gpa"])
        return create(slots, **what)

    monkeypatch.setattr(MemSlots, "create", counted)
    assert trace.n_records is not None
    for every, more in ((trace.n_records - 1, 1), (trace.n_records, 0)):
        made.clear()
        zapped(SlotChanges(every))
        assert len([gpa for gpa in made if gpa >= BASE]) == more


def test_invariants_are_asked_for_all_along_while_slots_change(trace: Trace) -> None:
    report = replay(trace, mmu="shadow", check_every=25_000, slot_changes=SlotChanges(7_000))
    assert report.ok
    assert report.counters["mmu_shadow_zapped"] > 100


def test_kvm_counts_pages_of_the_shadow_mmu_and_none_of_the_tdp_mmu(trace: Trace) -> None:
    switches = [("tdp_mmu", True), ("tdp_mmu", False)]
    rows = rows_of(trace, mmus=["npt"], mmio_schemes=["generation"], switches=switches)
    assert rows["npt, generation, tdp_mmu=on"].counts()["mmu_cache_miss"] is None
    assert rows["npt, generation, tdp_mmu=off"].counts()["mmu_cache_miss"]


def test_with_a_tlb_hits_misses_and_entries_read_are_columns(trace: Trace) -> None:
    (row,) = compare(trace, designs(["npt"], ["generation"]), tlb=Tlb(), rounds=1)
    counts, tlb = row.counts(), row.report.tlb
    assert (counts["tlb_hit"], counts["tlb_miss"]) == (tlb["tlb_hit"], tlb["tlb_miss"])
    read = sum(tlb[f"{walk}_l{level}"] for walk in ("walk_refs", "nested_walk_refs") for level in range(1, 6))
    assert counts["walk_refs_per_access"] == pytest.approx(read / (tlb["tlb_hit"] + tlb["tlb_miss"]), abs=0.001)
    assert "tlb_hit" not in next(iter(rows_of(trace, mmus=["npt"], mmio_schemes=["off"]).values())).counts()


def test_progress_names_the_design_and_the_round(trace: Trace) -> None:
    seen: list[tuple[str, int, int | None]] = []
    compare(trace, designs(["ept"], ["off"]), rounds=2, progress=lambda *what: seen.append(what))
    assert seen == [(f"ept, off; round {turn} of 2", trace.n_records, trace.n_records) for turn in (1, 2)]


def test_bad_requests_are_refused_by_name(trace: Trace) -> None:
    with pytest.raises(ArgumentError, match="switch 'nosuch' is unknown"):
        designs(switches=[("nosuch", True)])
    with pytest.raises(ArgumentError, match="mmu = 'tdp': allowed are 'shadow', 'ept', 'npt'"):
        designs(["tdp"])  # type: ignore[list-item]
    with pytest.raises(ArgumentError, match="rounds: 0 is outside"):
        compare(trace, designs(), rounds=0)
    with pytest.raises(ArgumentError, match="designs: there is none"):
        compare(trace, [])
    with pytest.raises(ArgumentError, match="every: 0 is outside"):
        SlotChanges(0)


def test_slots_do_not_change_where_the_machine_has_something(trace: Trace) -> None:
    areas = [*trace.memory_map, MemoryArea(BASE + 4096, BASE + 8191, "i/o", "a device")]
    with pytest.raises(ArgumentError, match="slot_changes: a device stands at 0x4000001000"):
        replay(open_trace(RECORDED, memory_map=areas), mmu="ept", slot_changes=SlotChanges(100))


def test_a_trace_without_records_is_refused(tmp_path: Path) -> None:
    with np.load(RECORDED) as file:
        columns = {name: file[name] for name in file.files}
    for name in ("kind", "a", "b", "c", "size", "flags", "cpl", "tb_delta"):
        if name in columns:
            columns[name] = columns[name][:0]
    np.savez(tmp_path / RECORDED.name, **columns)
    empty = open_trace(tmp_path / RECORDED.name, memory_map=TRACES / "memory-map.json")
    with pytest.raises(FormatError, match="first60k.npz: kind: no records"):
        compare(empty, designs())


def test_a_figure_shows_every_design_and_is_the_same_each_time(trace: Trace, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib, of the extra 'bench'")
    from kvmmmu.analysis.compare_figure import draw

    rows = list(rows_of(trace, mmus=["shadow", "npt"], mmio_schemes=["off", "generation"]).values())
    for name in ("one.svg", "two.svg"):
        draw(rows, tmp_path / name)
    text = (tmp_path / "one.svg").read_text()
    for what in ("shadow, off", "npt, generation", "MMIO by mmio spte", "KVM does not count", "CPU time"):
        assert what in text, what
    assert "entries read an access" not in text
    assert text == (tmp_path / "two.svg").read_text()
    with pytest.raises(ArgumentError, match=r"figure\.doc: suffix '\.doc': allowed are"):
        draw(rows, tmp_path / "figure.doc")
    with pytest.raises(ArgumentError, match="no such directory"):
        draw(rows, tmp_path / "absent" / "figure.svg")
