"""What one emulator does to the four top entries of PAE paging under nested paging.

It takes them for entries like any other: reads them from memory at each walk, sets their accessed bit (5, which is
reserved there), and does not check them when CR3 is loaded.  KVM does check, so that it later refuses what the
emulator wrote.  Real processors do none of this.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kvmmmu.conform.golden.host import Host
from kvmmmu.vcpu import VCpu

__all__ = ["PdpteQuirks"]

_PG, _PAE, _LMA = 1 << 31, 1 << 5, 1 << 10
_PRESENT, _ACCESSED = 1, 1 << 5
_ENTRIES = 4


class PdpteQuirks:
    """The quirks, if the artefacts name them; otherwise nothing happens.

    Parameters
    ----------
    vcpu : VCpu
    host : Host
    artefacts : frozenset of str
    """

    def __init__(self, vcpu: VCpu, host: Host, artefacts: frozenset[str]) -> None:
        self.vcpu = vcpu
        self.host = host
        # Where the processor found a present entry, and what it was.
        self.walked: dict[int, int] = {}
        self.on = {"pdpte_accessed", "pdpte_unchecked"} <= artefacts

    def walk(self, *gvas: int) -> None:
        """The processor is about to walk the guest's tables for these addresses."""
        if not self.on or not self._pae():
            return
        for gva in gvas:
            place = self._table(self.vcpu.regs.cr3) + 8 * (gva >> 30 & 3)
            entry = self._entry(place)
            if entry & _PRESENT:
                self.walked[place] = entry

    @contextmanager
    def accessed(self) -> Iterator[None]:
        """KVM reads the entries as the emulator left them.

        The model's processor would not run with them, so they stand in memory only meanwhile.
        """
        marked = {place: entry for place, entry in self.walked.items() if self._entry(place) == entry}
        for place, entry in marked.items():
            self._put(place, entry | _ACCESSED)
        try:
            yield
        finally:
            for place, entry in marked.items():
                self._put(place, entry)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """KVM would read the entries and refuse them: for it they stay what they were."""
        table = self._table(self.vcpu.regs.cr3)
        marked = any(place in self.walked for place in range(table, table + 8 * _ENTRIES, 8))
        if not (self.on and self._pae() and marked):
            yield
            return
        with self._replaced(table, self.vcpu.regs.pdptes):
            yield

    @contextmanager
    def kept(self) -> Iterator[None]:
        """KVM goes on with the entries it has, whatever stands in memory."""
        with self._replaced(self._table(self.vcpu.regs.cr3), self.vcpu.regs.pdptes):
            yield

    @contextmanager
    def stale(self, cr3: int) -> Iterator[None]:
        """The same for a CR3 that is about to be loaded.

        MOV CR3 does not reach KVM, and by its next look the processor has walked, and marked, the new entries.
        """
        if not (self.on and self._pae()):
            yield
            return
        with self._replaced(self._table(cr3), self.vcpu.regs.pdptes):
            yield

    @contextmanager
    def _replaced(self, table: int, entries: tuple[int, ...]) -> Iterator[None]:
        places = [place for place in range(table, table + 8 * _ENTRIES, 8) if self.host.slot_bytes(place) is not None]
        before = [self._entry(place) for place in places]
        for place, entry in zip(places, entries, strict=False):
            self._put(place, entry)
        try:
            yield
        finally:
            for place, entry in zip(places, before, strict=True):
                self._put(place, entry)

    def _pae(self) -> bool:
        registers = self.vcpu.regs
        return bool(registers.cr0 & _PG and registers.cr4 & _PAE and not registers.efer & _LMA)

    @staticmethod
    def _table(cr3: int) -> int:
        return cr3 & 0xFFFFFFE0

    def _entry(self, place: int) -> int:
        return int.from_bytes(self.host.read(place, 8), "little")

    def _put(self, place: int, entry: int) -> None:
        self.host.store(place, entry.to_bytes(8, "little"))
