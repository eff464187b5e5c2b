"""A small guest: RAM from gpa 0, its page tables in it, and a window through which it stores to them.

The guest's tables are laid out in ``ram`` before it starts.  Afterwards they change only by stores of the guest itself
(``store``, ``set_entry``), as KVM must see them, or by ``poke`` behind KVM's back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import kvmmmu as km

P, W, U, A, D, PS, G, NX = 1, 2, 4, 0x20, 0x40, 0x80, 0x100, 1 << 63
PE, WP, PG = 1, 1 << 16, 1 << 31
PSE, PAE, PGE, LA57, PCIDE, SMEP, SMAP, PKE = (1 << n for n in (4, 5, 7, 12, 17, 20, 21, 22))
LME, LMA, NXE = 0x100, 0x400, 0x800
USER = P | W | U | A | D
KERNEL = P | W | A | D
NOFLUSH = 1 << 63

MiB = 1 << 20
RAM = 8 * MiB
TABLES = 0x10_0000  # tables are taken from here upwards
DATA = 0x40_0000  # the upper half of RAM is free for data
MMIO = 0x1000_0000  # no slot here


@dataclass(frozen=True)
class Mode:
    """A paging mode."""

    name: str
    cr0: int
    cr4: int
    efer: int
    levels: int
    entry: int = 8  # bytes
    window: int = 0xC000_0000
    user: int = 0x40_0000  # a convenient gva for the tests' own page

    @property
    def bits(self) -> int:
        return 10 if self.entry == 4 else 9


FLAT = Mode("flat", PE, 0, 0, 0, window=0)
P32 = Mode("p32", PE | PG | WP, PSE, 0, 2, 4)
PAE3 = Mode("pae", PE | PG | WP, PAE, NXE, 3)
LONG = Mode("long", PE | PG | WP, PAE, LME | LMA | NXE, 4, window=0xFFFF_8000_0000_0000)
LONG5 = Mode("long5", PE | PG | WP, PAE | LA57, LME | LMA | NXE, 5, window=0xFF00_0000_0000_0000)
PAGING = (P32, PAE3, LONG, LONG5)
MODES = (FLAT, *PAGING)
MMUS = ("shadow", "ept", "npt")


class Machine:
    """A VM, one vCPU and a guest in it.  ``check`` runs after every step."""

    def __init__(
        self,
        mmu: str = "shadow",
        mode: Mode = LONG,
        *,
        cpu: km.GuestCpu | None = None,
        page_size: str | None = None,
        ram: int = RAM,
        start: bool = True,
        tlb: km.Tlb | None = None,
        **how: Any,
    ) -> None:
        self.mode = mode
        self.vm = km.VM(mmu=mmu, **how)  # type: ignore[arg-type]
        self.ram = np.zeros(ram, np.uint8)
        self.slot = self.vm.memslots.create(gpa=0, memory=self.ram, page_size=page_size)  # type: ignore[arg-type]
        self.vcpu = self.vm.create_vcpu(cpu, tlb=tlb)
        self.free = TABLES
        self.cr3 = 0
        if mode.levels:
            self.cr3 = self.new_space()
            self.open_window(self.cr3)
        if start:
            self.start()

    # -- building, behind KVM's back

    def poke(self, gpa: int, value: int, size: int | None = None) -> None:
        """The host writes guest memory."""
        n = size or self.mode.entry
        self.ram[gpa : gpa + n] = np.frombuffer(value.to_bytes(n, "little"), np.uint8)

    def peek(self, gpa: int, size: int | None = None) -> int:
        return int.from_bytes(self.ram[gpa : gpa + (size or self.mode.entry)].tobytes(), "little")

    def new_table(self) -> int:
        self.free += 4096
        return self.free - 4096

    def new_space(self) -> int:
        """An empty top table, for CR3.  PAE paging loads the PDPTEs with it, so they stand there from the start."""
        table = self.new_table()
        if self.mode is PAE3:
            for i in range(4):
                self.poke(table + 8 * i, self.new_table() | P)
        return table

    def shift(self, level: int) -> int:
        return 12 + self.mode.bits * (level - 1)

    def entry_gpa(self, gva: int, level: int = 1, cr3: int | None = None) -> int:
        """Where the guest's entry for an address stands; the tables above it must exist."""
        table = (self.cr3 if cr3 is None else cr3) & ~0xFFF & (1 << 52) - 1
        for at in range(self.mode.levels, 0, -1):
            width = 2 if self.mode is PAE3 and at == 3 else self.mode.bits
            where = table + (gva >> self.shift(at) & (1 << width) - 1) * self.mode.entry
            if at == level:
                return where
            table = self.peek(where) & 0x000F_FFFF_FFFF_F000
        raise AssertionError(f"no level {level}")

    def map(
        self, gva: int, gpa: int, bits: int = USER, *, level: int = 1, upper: int = USER, cr3: int | None = None
    ) -> int:
        """Lay out a mapping; returns where its entry stands."""
        for at in range(self.mode.levels, level, -1):
            where = self.entry_gpa(gva, at, cr3)
            if not self.peek(where) & P:
                self.poke(where, self.new_table() | upper & ~(D | PS))
        where = self.entry_gpa(gva, level, cr3)
        self.poke(where, gpa | bits | (PS if level > 1 else 0))
        return where

    def track(self, gpa: int) -> None:
        """Use the level-1 table that holds ``gpa`` as a directory as well: KVM then makes every store to it."""
        assert self.mode in (LONG, LONG5)
        gva, table = 5 << 39, gpa & ~0xFFF
        level3, level1 = self.new_table(), self.new_table()
        if self.mode is LONG5:
            self.poke((self.peek(self.cr3) & ~0xFFF) + 8 * 5, level3 | USER)
        else:
            self.poke(self.cr3 + 8 * 5, level3 | USER)
        self.poke(level3, table | USER)
        self.poke(table + 8 * 511, level1 | USER)
        self.poke(level1, DATA | USER)
        assert self.access(gva + (511 << 21)).gpa == DATA

    def open_window(self, cr3: int, size: int | None = None) -> None:
        """Map all of RAM at ``mode.window``, 4 KiB at a time, for the supervisor."""
        for gpa in range(0, size or self.ram.size, 4096):
            self.map(self.mode.window + gpa, gpa, KERNEL, cr3=cr3)

    # -- running

    def start(self, **registers: int) -> None:
        mode = self.mode
        self.vcpu.set_sregs(**({"cr0": mode.cr0, "cr3": self.cr3, "cr4": mode.cr4, "efer": mode.efer} | registers))

    def access(self, gva: int, kind: str = "r", **how: Any) -> km.AccessResult:
        result = self.vcpu.access(gva, kind, **how)
        self.vm.check()
        return result

    def store(self, gpa: int, value: int, size: int | None = None) -> km.AccessResult:
        """The guest stores to its RAM through the window."""
        result = self.access(self.mode.window + gpa, "w", size=size or self.mode.entry, value=value, cpl=0)
        assert result.outcome is km.Outcome.OK, result
        return result

    def set_entry(self, gva: int, value: int, level: int = 1, cr3: int | None = None) -> km.AccessResult:
        """The guest changes one of its page-table entries."""
        return self.store(self.entry_gpa(gva, level, cr3), value)

    def invlpg(self, gva: int) -> None:
        self.vcpu.invlpg(gva)
        self.vm.check()

    def load_cr3(self, value: int) -> None:
        self.vcpu.load_cr3(value)
        self.vm.check()

    def count(self, *names: str) -> Counts:
        """The named counters from now on: ``with``-free, ask the result for what they grew by."""
        return Counts(self, names)


class Counts:
    """What counters grew by since this was made."""

    def __init__(self, machine: Machine, names: tuple[str, ...]) -> None:
        self._stats, self._names = machine.vm.stats, names
        self._before = dict(machine.vm.stats)

    def __getitem__(self, name: str) -> int:
        return self._stats[name] - self._before[name]

    def grown(self) -> dict[str, int]:
        """Those of the named counters (all without names) that changed."""
        names = self._names or tuple(self._before)
        return {name: self[name] for name in names if self[name]}


def reference(machine: Machine, memory: npt.NDArray[np.uint8] | None = None, dialect: str | None = None) -> km.Paging:
    """A plain walk over the guest's tables as they are, by the rules that decide for this MMU."""
    regs = machine.vcpu.regs
    return km.Paging(
        regs.cr0,
        regs.cr3,
        regs.cr4,
        regs.efer,
        machine.vcpu.cpu,
        pkru=regs.pkru,
        compat=regs.compat,
        memory=machine.ram if memory is None else memory,
        dialect=dialect or ("kvm" if machine.vm.mmu == "shadow" else "sdm"),
        pdptes=regs.pdptes,
    )
