"""Slots that a recorded run does not use, made, moved and deleted while it is replayed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvmmmu._arguments import index_in
from kvmmmu.errors import ArgumentError
from kvmmmu.memslots import MemSlot
from kvmmmu.traces import MemoryArea
from kvmmmu.vm import VM

__all__ = ["SlotChanges"]

# Far above the memory of a recorded machine, and below the 2^40 that its processor addresses.
BASE = 1 << 38
STEP = 1 << 20
PLACES = 1024
NBYTES = 64 << 10


@dataclass(frozen=True)
class SlotChanges:
    """One spare slot of 64 KiB that is made, then moved or deleted, at random but the same for the same seed.

    It stands between 2^38 and 2^38 + 2^30, where no recorded machine has memory or devices.

    Parameters
    ----------
    every : int
        Records between two changes.
    seed : int

    Raises
    ------
    ArgumentError
        ``every`` is 0.
    OverflowError
        A number is negative or has more than 64 bits.
    """

    every: int
    seed: int = 1

    def __post_init__(self) -> None:
        index_in("every", self.every, 1, 2**64 - 1)
        index_in("seed", self.seed, 0, 2**64 - 1)

    def begin(self, vm: VM, memory_map: Sequence[MemoryArea]) -> Iterator[None]:
        """Each ``next`` is one change of ``vm``.

        Raises
        ------
        ArgumentError
            Something of the machine stands there.
        """
        for area in memory_map:
            if area.end_gpa >= BASE and area.start_gpa < BASE + STEP * PLACES:
                raise ArgumentError(
                    f"slot_changes: {area.name} stands at {area.start_gpa:#x}…{area.end_gpa:#x}; "
                    f"slots would come and go from {BASE:#x} to {BASE + STEP * PLACES - 1:#x}"
                )
        return self._changes(vm)

    def _changes(self, vm: VM) -> Iterator[None]:
        chance = random.Random(self.seed)
        spare = np.zeros(NBYTES, np.uint8)
        slot: MemSlot | None = None
        while True:
            gpa = BASE + chance.randrange(PLACES) * STEP
            if slot is None:
                slot = vm.memslots.create(gpa=gpa, memory=spare)
            elif chance.random() < 0.5:
                vm.memslots.move(slot, gpa=gpa)
            else:
                vm.memslots.delete(slot)
                slot = None
            yield
