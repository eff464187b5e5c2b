"""A stand-in for the machine, for tests of what is around it.

It answers every event as recorded, stores PTSTORE values into its slots, and does nothing else: what it is fed and what
is made of its answers can be tested without the engine.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmmmu.traces import Chunk


@dataclass
class Done:
    events: int
    disagreements: int
    first: tuple[Any, ...] | None = None
    exits: int = 0


@dataclass
class StandInSlots:
    slots: list[tuple[int, npt.NDArray[np.uint8], bool]] = field(default_factory=list)

    def create(self, *, gpa: int, memory: npt.NDArray[np.uint8], readonly: bool, **_: Any) -> None:
        self.slots.append((gpa, memory, readonly))

    def words(self, gpa: int) -> npt.NDArray[np.uint64]:
        for start, memory, _ in self.slots:
            if start <= gpa < start + len(memory):
                at = gpa - start & ~0xFFF
                return memory[at : at + 4096].view(np.uint64)
        raise AssertionError(f"{gpa:#x} is in no slot")


class StandIn:
    """VM and vCPU in one."""

    def __init__(self, *, wrong_at: int | None = None) -> None:
        self.memslots = StandInSlots()
        self.fed: list[tuple[int, int]] = []
        self.pdptes_at_load: dict[int, list[int]] = {}
        self.wrong_at = wrong_at
        self.stats = {
            "pf_taken": 7,
            "pf_fixed": 5,
            "mmu_unsync": 1,
            "mmio_cache_hit": 30,
            "mmio_spte_hit": 20,
            "mmio_slow": 10,
        }

    def replay(self, chunk: Chunk, *, start: int, values: bool) -> Done:
        kind, a, b, c, size = chunk.kind, chunk.a, chunk.b, chunk.c, chunk.size
        assert start == chunk.start
        self.fed.append((start, len(kind)))
        for i in np.flatnonzero(kind == 10).tolist():
            gpa = int(b[i])
            self.memslots.words(gpa).view(np.uint8)[gpa & 0xFFF :][: 1 << size[i]] = (
                np.uint64(c[i]).reshape(1).view(np.uint8)[: 1 << size[i]]
            )
        for i in np.flatnonzero(kind == 2).tolist():
            cr3 = int(a[i])
            self.pdptes_at_load.setdefault(cr3, self.memslots.words(cr3)[(cr3 & 0xFE0) // 8 :][:4].tolist())
        if self.wrong_at is not None and start <= self.wrong_at < start + len(kind):
            return Done(len(kind), 1, (self.wrong_at, "load at gva 0x1000", "gpa 0x2000", "gpa 0x3000", "the walk"))
        return Done(len(kind), 0)
