"""What a vCPU tells of itself: its registers, an instruction's end, a recorded run's totals."""

from __future__ import annotations

from dataclasses import dataclass

from kvmmmu._core import AccessResult

__all__ = ["Execution", "MmioExit", "Registers", "ReplayTotals"]


@dataclass(frozen=True)
class Registers:
    """The registers that the MMU depends on."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    pkru: int
    cpl: int
    ac: bool
    compat: bool
    pdptes: tuple[int, int, int, int]
    smm: bool


@dataclass(frozen=True)
class ReplayTotals:
    """What a stretch of a recorded run showed.

    Attributes
    ----------
    events, disagreements : int
    mmio, mmio_cache, mmio_spte, mmio_slow : int
        MMIO accesses, and how they were served: from the vCPU's record of the last page, from an
        mmio spte, by a memslot search.
    page_faults : int
        Guest page faults reproduced.
    exits : int
        VM exits of all accesses.
    first : tuple or None
        The first disagreement: record number, what differs, expected, got, explanation of the walk.
    """

    events: int
    disagreements: int
    mmio: int
    mmio_cache: int
    mmio_spte: int
    mmio_slow: int
    page_faults: int
    exits: int
    first: tuple[int, str, str, str, str] | None


@dataclass(frozen=True)
class MmioExit:
    """One exit to user space for a device: ``data`` is what a write stores, 0 for a read."""

    write: bool
    gpa: int
    size: int
    data: int


@dataclass(frozen=True)
class Execution:
    """What became of an instruction.

    Attributes
    ----------
    result : AccessResult
        Its outcome; ``Outcome.MMIO`` when it ended with MMIO (``mmio`` lists all exits, reads answered).
    suberror : int
        Of ``Outcome.INTERNAL_ERROR``: 1 emulation failed, 3 an exit during exception delivery.
    mmio : tuple of MmioExit
        In order.
    value : int
        What a load or ``cmpxchg`` saw.
    """

    result: AccessResult
    suberror: int
    mmio: tuple[MmioExit, ...]
    value: int
