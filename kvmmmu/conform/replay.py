"""A recorded run sent through the model: every event, every fault and the final page tables compared."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmmmu.behaviour import Behaviour, MmioScheme
from kvmmmu.conform.report import FileReport
from kvmmmu.conform.slot_changes import SlotChanges
from kvmmmu.constants import TABLE
from kvmmmu.cpu import GuestCpu, HostCpu
from kvmmmu.errors import ArgumentError, FormatError
from kvmmmu.stats import TLB_COUNTERS
from kvmmmu.tlb import Tlb
from kvmmmu.traces import Chunk, Kind, MemoryArea, Trace, open_trace
from kvmmmu.vcpu import VCpu
from kvmmmu.vm import VM, Mmu

__all__ = ["MMUS", "Memory", "ReplayReport", "check", "replay"]

MMUS: tuple[Mmu, ...] = ("shadow", "ept", "npt")
PAGE = 4096
# PAE: the emulator that recorded the runs sets A (bit 5) and D (bit 6) in PDPTEs, where a processor reserves them.
PDPTE_AD = np.uint64(TABLE["PT_ACCESSED_MASK"] | TABLE["PT_DIRTY_MASK"])
PDPTES = 4

Progress = Callable[[int, int | None], None]


@dataclass(frozen=True)
class ReplayReport:
    """What one replay in one mode showed.

    Attributes
    ----------
    trace, mmu : str
    mmio_scheme : str or None
        The scheme asked for; None is the behaviour profile's own.
    events : int
        Records replayed.
    disagreements : int
        Records whose answer was not the recorded one.
    first : str or None
        The first of them, in words.
    tables_compared, tables_different : int
        Entries of the final page tables; 0 compared where the file does not have them.
    exits : int
        VM exits of all accesses; those of instructions (INVLPG, moves to control registers) are not in it.
    mmio : dict
        MMIO accesses by how they were served.
    faults, counters : dict
        KVM's counters, those of page faults apart.
    tlb : dict
        Hits, misses and table entries read, by level; empty without a TLB.
    seconds : float
        Wall time inside the model; reading and unpacking the file is not in it.
    cpu_seconds : float
        The thread's CPU time of the same.
    """

    trace: str
    mmu: str
    mmio_scheme: str | None
    events: int
    disagreements: int
    first: str | None
    tables_compared: int
    tables_different: int
    exits: int
    mmio: dict[str, int]
    faults: dict[str, int]
    counters: dict[str, int]
    seconds: float
    cpu_seconds: float
    tlb: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether something was checked and everything agreed."""
        return self.events > 0 and self.disagreements == 0 and self.tables_different == 0

    @property
    def events_per_second(self) -> float:
        """Events per second of wall time."""
        return self.events / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        fields = {name: value for name, value in asdict(self).items() if name != "tlb" or value}
        return {**fields, "ok": self.ok, "events_per_second": round(self.events_per_second)}


class Memory:
    """The machine's memory at the start of a run: one buffer, the page tables copied in, the rest zero."""

    def __init__(self, trace: Trace) -> None:
        self.areas: list[tuple[MemoryArea, int]] = []
        nbytes = 0
        for area in trace.memory_map:
            if area.is_memory:
                self.areas.append((area, nbytes))
                nbytes += area.nbytes
        try:
            backing = np.zeros(nbytes + PAGE, np.uint8)
        except (MemoryError, ValueError):
            raise FormatError(f"{trace.path}: memory map: {nbytes} bytes of memory cannot be had") from None
        skip = -backing.ctypes.data % PAGE
        self.bytes = backing[skip : skip + nbytes]
        self.words = self.bytes.view(np.uint64)
        for gpa, page in zip(trace.page_gpa.tolist(), trace.page_t0, strict=True):
            self.page(gpa)[:] = page

    def offset(self, gpa: int) -> int | None:
        """Where a guest-physical byte stands in the buffer; None outside memory."""
        for area, start in self.areas:
            if area.start_gpa <= gpa <= area.end_gpa:
                return start + gpa - area.start_gpa
        return None

    def page(self, gpa: int) -> npt.NDArray[np.uint64]:
        """The 512 words of a page of memory, as a view."""
        at = self.offset(gpa)
        if at is None:
            raise FormatError(f"page_gpa: {gpa:#x} is outside the machine's memory")
        return self.words[at // 8 : at // 8 + 512]

    def pdptes(self, cr3: int) -> npt.NDArray[np.uint64] | None:
        """The four PDPTEs that CR3 names in PAE paging, as a view; None outside memory."""
        at = self.offset(cr3 & 0xFFFFFFE0)
        return None if at is None else self.words[at // 8 : at // 8 + PDPTES]


class _PaeRoots:
    """The CR3 values a run loads while in PAE paging."""

    def __init__(self) -> None:
        self.pae = False
        self.cr3 = -1
        self.seen: set[int] = set()

    def _clean_stores(self, part: Chunk) -> None:
        """A guest that copies a PDPTE copies the bits the emulator set in it: no processor would have set them."""
        if not self.seen:
            return
        tables = np.array(sorted(self.seen), np.uint64)
        stores = (part.kind == Kind.PTSTORE) & ((part.b & np.uint64(7)) == 0)
        stores &= np.isin(part.b & ~np.uint64(8 * PDPTES - 1), tables)
        if stores.any():
            part.c[stores] &= ~PDPTE_AD

    def split(self, chunk: Chunk) -> Iterator[tuple[Chunk, int | None]]:
        """Cut a chunk before each record that loads a PAE root; yields (part, root that its first record loads)."""
        for part, root in self._cut(chunk):
            self._clean_stores(part)
            yield part, root

    def _cut(self, chunk: Chunk) -> Iterator[tuple[Chunk, int | None]]:
        first = 0
        root: int | None = None
        for at in np.flatnonzero((chunk.kind == Kind.STATE) | (chunk.kind == Kind.MOVCR)).tolist():
            cr3 = int(chunk.a[at]) & 0xFFFFFFE0
            if chunk.kind[at] == Kind.STATE:
                cr0, cr4 = int(chunk.b[at]) & 0xFFFFFFFF, int(chunk.b[at]) >> 32
                efer = int(chunk.c[at]) & 0xFFFFFFFF
                self.pae = bool(cr0 & TABLE["CR0_PG"] and cr4 & TABLE["CR4_PAE"] and not efer & TABLE["EFER_LMA"])
                if cr3 == self.cr3:
                    continue
            elif chunk.b[at] in (0, 4):
                cr3 = self.cr3  # MOV to CR0 and CR4 may read the PDPTEs again
            elif chunk.b[at] != 3:
                continue
            self.cr3 = cr3
            if self.pae and cr3 >= 0:
                self.seen.add(cr3)
                yield chunk.part(first, at), root
                first, root = at, cr3
        yield chunk.part(first, len(chunk)), root


def _machine(mmu: Mmu, mmio_scheme: MmioScheme | None, behaviour: str | Behaviour, tlb: Tlb | None) -> tuple[VM, VCpu]:
    """A VM with one vCPU that looks like the recorded one (40 address bits)."""
    vm = VM(mmu, host=HostCpu(maxphyaddr=46), behaviour=behaviour, mmio_scheme=mmio_scheme)
    return vm, vm.create_vcpu(GuestCpu(maxphyaddr=40), tlb=tlb)


def _stretches(chunk: Chunk, *every: int) -> Iterator[Chunk]:
    """Cut a chunk after each record whose number is a multiple of one of ``every``; 0 has none."""
    first = chunk.start
    end = first + len(chunk)
    while first < end:
        last = min([end, *(first - first % n + n for n in every if n)])
        yield chunk.part(first - chunk.start, last - chunk.start)
        first = last


def replay(
    trace: Trace,
    *,
    mmu: Mmu,
    mmio_scheme: MmioScheme | None = None,
    behaviour: str | Behaviour = "6.1",
    check_every: int = 0,
    slot_changes: SlotChanges | None = None,
    tlb: Tlb | None = None,
    progress: Progress | None = None,
) -> ReplayReport:
    """Send a recorded run through the model in one mode.

    Parameters
    ----------
    trace : Trace
    mmu : {"shadow", "ept", "npt"}
    mmio_scheme : str, optional
        How MMIO faults are cached; the behaviour profile's own scheme if not given.
    behaviour : str or Behaviour
        The behaviour profile, or one with switches of its own.
    check_every : int
        Ask ``vm.check`` for every invariant after each so many records, and after the last; 0 never asks.
    slot_changes : SlotChanges, optional
        Slots that the run does not use come and go meanwhile.
    tlb : Tlb, optional
        The processor caches translations; without one it reads the tables at each access.
    progress : callable, optional
        Called with (records done, records in all or None) after each chunk.

    Raises
    ------
    FormatError
        The trace is truncated or corrupt.
    ArgumentError
        ``check_every`` is negative, or the machine has something where ``slot_changes`` would put slots.
    InvariantError
        ``check_every`` found the machine inconsistent.
    """
    if check_every < 0:
        raise ArgumentError(f"check_every: {check_every} is below 0")
    memory = Memory(trace)
    vm, vcpu = _machine(mmu, mmio_scheme, behaviour, tlb)
    for area, start in memory.areas:
        part = memory.bytes[start : start + area.nbytes]
        vm.memslots.create(
            gpa=area.start_gpa,
            memory=part,
            readonly=area.kind == "rom",
            page_size="2M",
            # Host frames that agree with guest frames below 1 GiB, so that large pages can be mapped.
            pfn_offset=(area.start_gpa // PAGE) % (1 << 18),
        )
    changes = None if slot_changes is None else slot_changes.begin(vm, trace.memory_map)
    change_every = 0 if slot_changes is None else slot_changes.every
    roots = _PaeRoots()
    events = disagreements = exits = 0
    first: str | None = None
    seconds = cpu_seconds = 0.0
    for chunk in trace.chunks():
        for stretch in _stretches(chunk, check_every, change_every):
            # At a stretch's beginning, so that nothing changes after the last record.
            if changes is not None and stretch.start and stretch.start % change_every == 0:
                next(changes)
            for span, root in roots.split(stretch):
                if root is not None and (pdptes := memory.pdptes(root)) is not None:
                    pdptes &= ~PDPTE_AD
                if not len(span):
                    continue
                began, cpu_began = time.perf_counter(), time.thread_time()
                done = vcpu.replay(span, start=span.start, values=trace.is_raw)
                cpu_seconds += time.thread_time() - cpu_began
                seconds += time.perf_counter() - began
                events += done.events
                disagreements += done.disagreements
                exits += done.exits
                if first is None and done.first is not None:
                    first = _disagreement(done.first)
            if check_every and (stretch.start + len(stretch)) % check_every == 0:
                vm.check()
        if progress is not None:
            progress(events, trace.n_records)
    if check_every and events % check_every:
        vm.check()
    compared, different, where = _compare_tables(trace, memory, roots.seen)
    stats: Mapping[str, int] = vm.stats
    return ReplayReport(
        trace=trace.path.name,
        mmu=mmu,
        mmio_scheme=mmio_scheme,
        events=events,
        disagreements=disagreements,
        first=first or where,
        tables_compared=compared,
        tables_different=different,
        exits=exits,
        mmio={name: int(stats[key]) for name, key in _MMIO_SERVED.items()},
        faults={name: int(value) for name, value in stats.items() if name.startswith("pf_")},
        counters={
            name: int(value) for name, value in stats.items() if not name.startswith("pf_") and name not in TLB_COUNTERS
        },
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        tlb={} if tlb is None else {name: int(stats[name]) for name in TLB_COUNTERS},
    )


_MMIO_SERVED = {"vCPU cache": "mmio_cache_hit", "mmio spte": "mmio_spte_hit", "slow path": "mmio_slow"}


def _disagreement(first: tuple[Any, ...]) -> str:
    record, event, expected, got, *explanation = first
    lines = [f"record {record}: {event}: expected {expected}, got {got}", *map(str, explanation)]
    return "\n".join(lines)


def _compare_tables(trace: Trace, memory: Memory, roots: set[int]) -> tuple[int, int, str | None]:
    """Compare the final page tables; (entries compared, entries different, the first difference in words)."""
    if trace.page_t1 is None:
        return 0, 0, None
    different = 0
    where: str | None = None
    for gpa, expected in zip(trace.page_gpa.tolist(), trace.page_t1, strict=True):
        mask = np.full(512, TABLE["ALL_ONES"], np.uint64)
        for root in roots:
            if root - gpa in range(PAGE):
                mask[(root - gpa) // 8 : (root - gpa) // 8 + PDPTES] &= ~PDPTE_AD
        got = memory.page(gpa)
        wrong = np.flatnonzero((got ^ expected) & mask)
        different += len(wrong)
        if where is None and len(wrong):
            at = int(wrong[0])
            where = (
                f"final page table at gpa {gpa:#x}, entry {at}: expected {int(expected[at]):#x}, got {int(got[at]):#x}"
            )
    return 512 * len(trace.page_gpa), different, where


def check(path: str | Path, *, show: int = 5) -> FileReport:
    """Replay a trace in all three modes and count what agreed: every event and every entry of the final tables."""
    trace = open_trace(path)
    reports = [replay(trace, mmu=mmu) for mmu in MMUS]
    total = sum(report.events + report.tables_compared for report in reports)
    wrong = sum(report.disagreements + report.tables_different for report in reports)
    texts = [f"{report.mmu}: {report.first}" for report in reports if report.first is not None]
    return FileReport(str(path), "trace", total - wrong, total, texts[:show])
