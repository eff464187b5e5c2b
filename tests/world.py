"""A guest whose page tables may say anything, and the walk that knows the answer.

Two address spaces share sixteen table pages.  Indices, frames and entries come from small pools, so that tables point
to each other, to themselves, to data, to slots that come and go, to MMIO and to nowhere.  Only the window through which
the guest stores stays as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import kvmmmu as km
from kvmmmu.errors import InvariantError
from kvmmmu.walks import Fault
from machine import LONG, LONG5, MMIO, NX, P32, PAE3, PS, Machine, Mode, P

N_TABLES = 16
RAM = 4 << 20
GUEST_SLOT = 1 << 24  # a slot that comes and goes, four pages
ROM = 2 << 24  # a slot the guest cannot write, four pages
INDICES = (0, 1, 2, 3)  # of table entries that are used
ENTRY_FLAGS = 1 | 2 | 4 | 0x20 | 0x40 | 0x80 | 0x100


class World(Machine):
    """``tables[0]`` and ``tables[1]`` are the top tables."""

    def __init__(self, mmu: str, mode: Mode, *, vcpus: int = 1, cpu: km.GuestCpu | None = None, **how: Any) -> None:
        if cpu is None:
            # KVM's walker gives 4 MiB pages four more address bits, the processor as many as it has.
            cpu = km.GuestCpu(maxphyaddr=36 if mode is P32 else 40)
        super().__init__(mmu, mode, ram=RAM, cpu=cpu, start=False, **how)
        self.rom = np.arange(4 * 4096, dtype=np.uint32).view(np.uint8)[: 4 * 4096].copy()
        self.rom_slot = None
        if mmu == "shadow":  # under EPT and NPT a guest table in read-only memory never lets go (G9)
            self.rom_slot = self.vm.memslots.create(gpa=ROM, memory=self.rom, readonly=True)
        self.extra = np.zeros(4 * 4096, np.uint8)
        self.extra_slot: km.MemSlot | None = None
        self.renewed = False
        self.tables = [self.cr3]
        if mode.levels:
            second = self.new_space()
            self.open_window(second)
            self.tables.append(second)
        while len(self.tables) < N_TABLES:
            self.tables.append(self.new_table())
        if mode is PAE3:
            self.low = [self.peek(self.tables[i] + 8 * j) & ~0xFFF for i in (0, 1) for j in (0, 1)]
        self.vcpus = [self.vcpu] + [self.vm.create_vcpu(cpu) for _ in range(vcpus - 1)]
        self.all = self.vcpus
        for vcpu in self.vcpus:
            self.vcpu = vcpu
            self.start()
        self.vcpu = self.vcpus[0]

    # -- raw choices (integers of any size) made into things

    def level(self, table: int) -> int:
        """Where a table page is meant to be used; entries that keep to it make deep walks likely."""
        if table < 2:
            return 2 if self.mode is PAE3 else self.mode.levels
        if self.mode.levels < 4:
            return 1
        return 1 if table >= 8 else 2 + table % max(self.mode.levels - 2, 1)

    def frame(self, n: int) -> int:
        """A gpa by number, of any kind of place."""
        kind, rest = n % 8, n // 8
        if kind < 2:
            # Not the PDPTs of PAE paging: used as a table they would get accessed bits, which a PDPTE must not have.
            return self.tables[2 + rest % (N_TABLES - 2) if self.mode is PAE3 else rest % N_TABLES]
        if kind == 2:
            return 0x30_0000 + (rest % 8) * 4096
        if kind == 3:
            return GUEST_SLOT + (rest % 6) * 4096
        if kind == 4:
            return ROM + (rest % 6) * 4096
        if kind == 5:
            return MMIO + (rest % 4) * 4096
        if kind == 6:
            return (rest % 4) * 0x20_0000
        return (rest << 12) & (1 << 52) - 4096

    def target(self, table: int, n: int) -> int:
        """Mostly what belongs into a table of that level."""
        level, rest = self.level(table % N_TABLES), n // 4
        if n % 4 == 0:
            return self.frame(rest)
        if level > 1:
            lower = [i for i in range(2, N_TABLES) if self.level(i) == level - 1]
            return self.tables[lower[rest % len(lower)]]
        places = (0x30_0000, 0x30_1000, 0x30_2000, MMIO, GUEST_SLOT, ROM, self.tables[8 + rest // 8 % 8])
        return places[rest % len(places)]

    def entry(self, table: int, frame: int, flags: int) -> int:
        """A table entry; most of them allow much, so that walks get somewhere."""
        value, bits = self.target(table, frame), flags >> 2 & ENTRY_FLAGS
        if flags & 3:
            bits |= 0x67
            if flags >> 12 & 7:
                bits &= ~(PS | 0x100)
        if self.mode.entry == 4:
            return (value & 0xFFFF_F000) | bits
        return value | bits | (NX if flags >> 16 & 7 == 7 else 0)

    def place(self, table: int, index: int) -> int:
        """gpa of an entry that may be changed."""
        at = table % N_TABLES
        if self.mode is PAE3 and at < 2:
            # The PDPT itself is read at CR3 loads: its two low directories stand in for it.
            return self.low[2 * at + index % 2] + 8 * INDICES[index // 2 % 4]
        return self.tables[at] + INDICES[index % 4] * self.mode.entry

    def gva(self, n: int) -> int:
        """An address through the entries that are used, at an odd offset (no shortcut by offset then)."""
        value = 0
        for level in range(1, max(self.mode.levels, 2) + 1):
            value |= INDICES[n % 4] << (12 + (self.mode.bits if self.mode.levels else 9) * (level - 1))
            n //= 4
        if self.mode.levels == 0:
            value = self.frame(n) & 0xFFFF_F000
        if self.mode in (LONG, LONG5) and n % 16 == 1:
            value ^= 1 << 62  # not canonical
        return (value + (n * 8 & 0xFF8) + 1) & ((1 << 64) - 1 if self.mode in (LONG, LONG5) else (1 << 32) - 1)

    def lay_out(self, numbers: list[int]) -> None:
        """Before the guest runs: every entry that is used, from a list of choices."""
        for table in range(N_TABLES if self.mode.levels else 0):
            for index in range(8 if self.mode is PAE3 and table < 2 else 4):
                n = numbers[(table * 8 + index) % len(numbers)]
                self.lay(table, index, n, n >> 20)

    # -- steps

    def lay(self, table: int, index: int, frame: int, flags: int) -> None:
        """Before the guest runs: an entry of its tables."""
        self.poke(self.place(table, index), self.entry(table, frame, flags))

    def guest_writes_entry(self, table: int, index: int, frame: int, flags: int) -> None:
        self.guest_stores(self.place(table, index), self.entry(table, frame, flags), self.mode.entry)

    def guest_stores(self, gpa: int, value: int, size: int) -> None:
        value &= (1 << 8 * size) - 1
        if self.mode.levels == 0:
            result = self.vcpu.access(gpa, "w", size=size, value=value, cpl=0)
        else:
            regs = self.vcpu.regs
            assert regs.cr3 & ~0xFFF in (self.tables[0], self.tables[1])
            result = self.vcpu.access(self.mode.window + gpa, "w", size=size, value=value, cpl=0)
        assert result.outcome is km.Outcome.OK, result
        assert self.peek(gpa, size) == value
        self.vm.check()

    def toggle_slot(self, forget: bool = False) -> None:
        """The slot that comes and goes; ``forget``: with everything that was cached while it was not there."""
        if self.extra_slot is None:
            self.extra_slot = self.vm.memslots.create(gpa=GUEST_SLOT, memory=self.extra)
            # KVM renews the mmio sptes of a page that it synchronises without a look at the slots.
            self.renewed = self.vm.mmu == "shadow"
            if forget:
                self.vm.memslots.delete(self.vm.memslots.create(gpa=ROM + (1 << 24), memory=np.zeros(4096, np.uint8)))
                self.renewed = False
        else:
            self.vm.memslots.delete(self.extra_slot)
            self.extra_slot = None
        self.vm.check()

    # -- the answer

    def memory(self) -> dict[int, Any]:
        areas: dict[int, Any] = {0: self.ram.copy()}
        if self.rom_slot is not None:
            areas[ROM] = bytes(self.rom)
        if self.extra_slot is not None:
            areas[self.extra_slot.gpa] = self.extra.copy()
        return areas

    def expected(self, gva: int, kind: str, cpl: int, memory: dict[int, Any]) -> tuple[Any, ...]:
        """Outcome, gpa, error code; sets accessed and dirty bits in ``memory``."""
        regs = self.vcpu.regs
        paging = km.Paging(
            regs.cr0, regs.cr3, regs.cr4, regs.efer, self.vcpu.cpu, pkru=regs.pkru, compat=regs.compat, memory=memory,
            dialect="kvm" if self.vm.mmu == "shadow" else "sdm", pdptes=regs.pdptes,
        )  # fmt: skip
        walk = paging.walk_result(gva, kind, cpl, ac=regs.ac)
        if walk.fault is Fault.GP:
            return (km.Outcome.GP,)
        if walk.fault is Fault.PF:
            return km.Outcome.PF, walk.error_code, walk.gva
        paging.walk_for(gva, kind, cpl, ac=regs.ac, set_ad=True)
        slot = self.vm.memslots.at(walk.gpa)
        if slot is None or (kind == "w" and slot.readonly):
            if kind == "x":
                return (km.Outcome.INTERNAL_ERROR,)
            return km.Outcome.MMIO, walk.gpa
        return km.Outcome.OK, walk.gpa

    def in_extra_slot(self, answer: tuple[Any, ...]) -> bool:
        return answer[0] is km.Outcome.OK and GUEST_SLOT <= answer[1] < GUEST_SLOT + self.extra.size

    def got(self, result: km.AccessResult) -> tuple[Any, ...]:
        if result.outcome is km.Outcome.PF:
            return result.outcome, result.error_code, result.gva
        if result.outcome is km.Outcome.MMIO:
            assert result.mmio == ((result.gpa, 1),)
        if result.outcome in (km.Outcome.MMIO, km.Outcome.OK):
            return result.outcome, result.gpa
        return (result.outcome,)

    def compare(self, gva: int, kind: str, cpl: int) -> None:
        """Flush as a guest must, access, and compare answer and memory with the plain walk."""
        self.vcpu.invlpg(gva)
        memory = self.memory()
        wanted = self.expected(gva, kind, cpl, memory)
        result = self.vcpu.access(gva, kind, cpl=cpl)
        if self.renewed and self.got(result) != wanted and self.in_extra_slot(wanted):
            assert result.outcome in (km.Outcome.MMIO, km.Outcome.INTERNAL_ERROR)
            with pytest.raises(InvariantError, match="a sync renews"):
                self.vm.check(holes=True)
            self.vm.check()
            return
        why = f"{result}, expected {wanted}\n{self.vcpu.explain(gva, kind, cpl=cpl)}"
        assert self.got(result) == wanted, why
        # MMIO: an mmio spte keeps the rights of its first walk, so with CR0.WP = 0 a write through it leaves D;
        # under EPT and NPT KVM knows the gpa from the exit, and nobody finished a walk of the guest's tables.
        mmio = result.outcome in (km.Outcome.MMIO, km.Outcome.INTERNAL_ERROR)
        if not mmio or (self.vm.mmu == "shadow" and self.vcpu.regs.cr0 >> 16 & 1):
            assert np.array_equal(self.ram, memory[0])
            if self.extra_slot is not None:
                assert np.array_equal(self.extra, memory[self.extra_slot.gpa])
        self.vm.check()


__all__ = ["N_TABLES", "P", "World"]
