"""What stands around the machine in a replay: memory, PAE roots, final tables, the report.

The machine itself is a stand-in here (``machine.py``); the real one is replayed in the tests of the engine.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmmmu.conform import replay as module
from kvmmmu.conform.replay import Memory, check, replay
from kvmmmu.errors import FormatError
from kvmmmu.traces import Trace

_spec = importlib.util.spec_from_file_location("kvmmmu_test_machine", Path(__file__).with_name("machine.py"))
assert _spec is not None
assert _spec.loader is not None
machine = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = machine
_spec.loader.exec_module(machine)

MakeTrace = Callable[..., Trace]
LONG = (0x80000001, 0x20, 0x500)  # cr0, cr4, efer with LMA
PAE = (0x80000001, 0x20, 0)
MEM, STATE, MOVCR, PTSTORE = 0, 2, 5, 10


def state(cr3: int, registers: tuple[int, int, int]) -> tuple[int, int, int, int]:
    cr0, cr4, efer = registers
    return STATE, cr3, cr0 | cr4 << 32, efer


def page(**entries: int) -> list[int]:
    words = [0] * 512
    for name, value in entries.items():
        words[int(name.removeprefix("e"))] = value
    return words


def run(trace: Trace, monkeypatch: pytest.MonkeyPatch, **how: Any) -> tuple[Any, Any]:
    stand_in = machine.StandIn(**how)
    monkeypatch.setattr(module, "_machine", lambda *_: (stand_in, stand_in))
    return replay(trace, mmu="shadow"), stand_in


def test_memory_is_ram_and_rom_zeroed_with_the_page_tables_in_place(make_trace: MakeTrace) -> None:
    trace = make_trace([state(0x1000, LONG)], {0x1000: page(e5=7), 0x101000: page(e6=9)}, None)
    memory = Memory(trace)
    assert memory.bytes.nbytes == 0x4000 + 0x1000 + 0x8000
    assert memory.bytes.ctypes.data % 4096 == 0
    assert memory.page(0x1000)[5] == 7
    assert memory.page(0x101000)[6] == 9
    assert int(memory.words.sum()) == 16
    assert memory.offset(0x4000) is None
    assert memory.offset(0xFEE00000) is None


def test_each_memory_area_becomes_a_slot_and_rom_is_read_only(
    make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = make_trace([state(0x1000, LONG)], {0x1000: page()}, None)
    _, stand_in = run(trace, monkeypatch)
    assert [(gpa, len(memory), readonly) for gpa, memory, readonly in stand_in.memslots.slots] == [
        (0, 0x4000, False),
        (0x8000, 0x1000, True),
        (0x100000, 0x8000, False),
    ]


def test_final_tables_that_agree_are_counted_and_those_that_differ_are_named(
    make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [state(0x1000, LONG), (PTSTORE, 0xFFFF000000001028, 0x1028, 0x2063)]
    good = make_trace(records, {0x1000: page(e4=1)}, {0x1000: page(e4=1, e5=0x2063)})
    report, _ = run(good, monkeypatch)
    assert (report.tables_compared, report.tables_different, report.ok) == (512, 0, True)
    wrong = make_trace(records, {0x1000: page(e4=1)}, {0x1000: page(e4=3, e5=0x2063)})
    report, _ = run(wrong, monkeypatch)
    assert (report.tables_compared, report.tables_different, report.ok) == (512, 1, False)
    assert report.first == "final page table at gpa 0x1000, entry 4: expected 0x3, got 0x1"


def test_a_trace_without_final_tables_is_checked_by_its_events_alone(
    make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = run(make_trace([state(0x1000, LONG)], {0x1000: page()}, None), monkeypatch)
    assert (report.events, report.tables_compared, report.ok) == (1, 0, True)


def test_nothing_replayed_is_not_ok(make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = run(make_trace([], {0x1000: page()}, None), monkeypatch)
    assert not report.ok


def test_pdptes_lose_the_emulators_accessed_bits_before_pae_paging_loads_them(
    make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {0x1000: page(e4=0x2021, e5=0x3061, e8=0x2021), 0x2000: page(e0=0x2067)}
    records = [state(0x1020, PAE), (MEM, 0, 0, 0), (MOVCR, 0x1040, 3, 0), state(0x1040, PAE)]
    report, stand_in = run(make_trace(records, pages, pages), monkeypatch)
    assert stand_in.pdptes_at_load == {0x1020: [0x2001, 0x3001, 0, 0], 0x1040: [0x2001, 0, 0, 0]}
    # The recorded final tables still have them: they are not compared, anything else is.
    assert report.ok
    assert stand_in.fed == [(0, 2), (2, 2)]


def test_only_pae_roots_are_touched(make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = {0x1000: page(e0=0x2067)}
    report, stand_in = run(make_trace([state(0x1000, LONG)], pages, pages), monkeypatch)
    assert report.ok
    assert stand_in.pdptes_at_load == {0x1000: [0x2067, 0, 0, 0]}


def test_other_bits_of_pdptes_are_compared(make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make_trace([state(0x1000, PAE)], {0x1000: page(e0=0x2021)}, {0x1000: page(e0=0x3021)})
    report, _ = run(trace, monkeypatch)
    assert report.tables_different == 1


def test_a_disagreement_is_counted_and_the_first_is_told_with_its_record(
    make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = make_trace([state(0x1000, LONG), (MEM, 0, 0, 0)], {0x1000: page()}, None)
    report, _ = run(trace, monkeypatch, wrong_at=1)
    assert (report.disagreements, report.ok) == (1, False)
    assert report.first == "record 1: load at gva 0x1000: expected gpa 0x2000, got gpa 0x3000\nthe walk"


def test_counters_are_those_of_the_machine_sorted_into_their_places(
    make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, _ = run(make_trace([state(0x1000, LONG)], {0x1000: page()}, None), monkeypatch)
    assert report.mmio == {"vCPU cache": 30, "mmio spte": 20, "slow path": 10}
    assert report.faults == {"pf_taken": 7, "pf_fixed": 5}
    assert report.counters["mmu_unsync"] == 1
    assert report.as_dict()["events"] == 1


def test_checking_a_trace_counts_events_and_final_entries_of_all_three_modes(
    make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = make_trace([state(0x1000, LONG), (MEM, 0, 0, 0)], {0x1000: page()}, {0x1000: page(e1=1)})
    monkeypatch.setattr(module, "_machine", lambda *_: (machine.StandIn(wrong_at=1),) * 2)
    report = check(trace.path, show=2)
    assert (report.total, report.total - report.agreed) == (3 * (2 + 512), 3 * 2)
    assert len(report.disagreements) == 2
    assert report.disagreements[0].startswith("shadow: record 1")


def test_a_memory_that_no_machine_has_is_refused(make_trace: MakeTrace) -> None:
    trace = make_trace([state(0x1000, LONG)], {0x1000: page()}, None)
    huge = [{"start": 0, "end": (1 << 52) - 1, "kind": "ram", "name": "all"}]
    from kvmmmu.traces import open_trace

    with pytest.raises(FormatError, match="memory map"):
        Memory(open_trace(trace.path, memory_map=huge))
