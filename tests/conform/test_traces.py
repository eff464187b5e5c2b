"""Recorded runs of real kernels replay through the model with every answer the recorded one."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kvmmmu.conform.replay import MMUS, check, replay
from kvmmmu.tlb import Tlb
from kvmmmu.traces import Kind, bundled_trace, open_trace
from kvmmmu.traces.reader import MEM_CROSSES, MEM_STORE
from kvmmmu.vm import VM
from machine import LONG, Machine

SLICES = sorted((Path(__file__).parent.parent / "data" / "traces").glob("*.npz"))


@pytest.mark.parametrize("path", SLICES, ids=lambda path: path.stem)
def test_every_event_of_the_slices_agrees_in_every_mode(path: Path) -> None:
    report = check(path)
    assert report.ok, "\n".join(report.disagreements)
    assert report.total == len(MMUS) * (open_trace(path).n_records or 0)


def test_the_slices_have_every_kind_of_event() -> None:
    kinds = {int(kind) for path in SLICES for chunk in open_trace(path).chunks() for kind in np.unique(chunk.kind)}
    assert kinds == {int(kind) for kind in Kind} - {int(Kind.MEMHI)}


@pytest.mark.parametrize("mmu", MMUS)
def test_the_bundled_run_agrees_to_its_last_page_table_entry_and_repeated_mmio_takes_no_search(mmu: str) -> None:
    trace = open_trace(bundled_trace())
    report = replay(trace, mmu=mmu)  # type: ignore[arg-type]
    assert report.ok, report.first
    assert (report.events, report.tables_compared) == (trace.n_records, 512 * len(trace.page_gpa))
    assert sum(report.mmio.values()) == trace.meta["nio"]
    assert report.mmio["slow path"] < 0.001 * trace.meta["nio"]


def test_the_raw_sample_agrees_in_every_mode_and_leaves_no_access_out() -> None:
    report = check(bundled_trace(raw=True))
    assert report.ok, "\n".join(report.disagreements)
    assert report.total == len(MMUS) * 200_000


@pytest.mark.parametrize("mmu", MMUS)
@pytest.mark.parametrize("path", [*SLICES, bundled_trace(raw=True)], ids=lambda path: path.stem)
def test_with_a_tlb_every_answer_is_the_recorded_one_too(path: Path, mmu: str) -> None:
    report = replay(open_trace(path), mmu=mmu, tlb=Tlb())  # type: ignore[arg-type]
    assert report.ok, report.first
    assert report.tlb["tlb_hit"] > 0


@pytest.mark.parametrize("mmu", MMUS)
def test_every_invariant_holds_after_every_ten_thousandth_event(mmu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[VM] = []

    def counted(vm: VM, **how: bool) -> None:
        checked.append(vm)
        check_of_vm(vm, **how)

    check_of_vm = VM.check
    monkeypatch.setattr(VM, "check", counted)
    trace = open_trace(bundled_trace())
    report = replay(trace, mmu=mmu, check_every=10_000)  # type: ignore[arg-type]
    assert report.ok, report.first
    assert trace.n_records is not None
    assert len(checked) == -(-trace.n_records // 10_000)


@pytest.mark.parametrize(
    ("column", "kind", "change"),
    [("b", Kind.FETCH, 0x1000), ("b", Kind.MEM, 0x1000), ("b", Kind.PTSTORE, 0x1000), ("b", Kind.PF, 1)],
    ids=["gpa of a fetch", "gpa of an access", "gpa of a table store", "error code"],
)
@pytest.mark.parametrize("mmu", MMUS)
def test_a_changed_answer_is_a_disagreement_told_with_its_record(
    tmp_path: Path, mmu: str, column: str, kind: Kind, change: int
) -> None:
    source = SLICES[0]
    with np.load(source) as file:
        columns = {name: file[name] for name in file.files}
    at = int(np.flatnonzero(columns["kind"] == kind)[5])
    columns[column][at] ^= np.uint64(change)
    np.savez(tmp_path / source.name, **columns)
    report = replay(open_trace(tmp_path / source.name, memory_map=source.with_name("memory-map.json")), mmu=mmu)  # type: ignore[arg-type]
    assert report.disagreements >= 1
    assert report.first is not None
    assert report.first.startswith(f"record {at}: ")


def test_the_shared_traces_agree_in_full(shared: Path) -> None:
    paths = [*sorted((shared / "traces").glob("*.npz")), *sorted((shared / "traces").glob("*.raw.zst"))]
    assert paths
    for path in paths:
        report = check(path)
        assert report.ok, "\n".join([report.file, *report.disagreements])


@pytest.mark.parametrize("mmu", MMUS)
def test_a_raw_store_into_two_tables_changes_both(mmu: str) -> None:
    # Its first page alone is named; the engine translates the second, and moves the value there as well.
    m = Machine(mmu, LONG)
    first, second = m.new_table(), m.new_table() + 0x3000
    m.map(m.mode.user, first)
    m.map(m.mode.user + 4096, second)
    words = {"a": m.mode.user + 4092, "b": first + 4092, "c": 0x8877_6655_4433_2211}
    octets = {"kind": Kind.MEM, "size": 3, "flags": MEM_STORE | MEM_CROSSES, "cpl": 0}
    columns = SimpleNamespace(
        **{name: np.array([value], np.uint64) for name, value in words.items()},
        **{name: np.array([value], np.uint8) for name, value in octets.items()},
    )
    done = m.vcpu.replay(columns, values=True)
    assert (done.events, done.disagreements) == (1, 0)
    assert (m.peek(first + 4092, 4), m.peek(second, 4)) == (0x4433_2211, 0x8877_6655)
