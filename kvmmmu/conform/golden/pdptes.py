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
        self.on = {"pdpte_accessed", "pdpte_unchecked"} <= artefacts

    def walk(self, *gvas: int) -> None:
        """The processor is about to walk the guest's tables for these addresses."""
        if not self.on or not self._pae():
            return
        for gva in gvas:
            place = self._table(self.vcpu.regs.cr3) + 8 * (gva >> 30 & 3)
            entry = self._entry(place)
            if entry & _PRESENT and not entry & _ACCESSED:
                self._put(place, entry | _ACCESSED)

    @contextmanager
    def unchecked(self, cr3: int | None = None) -> Iterator[None]:
        """KVM's checks find nothing wrong meanwhile."""
        table = self._table(self.vcpu.regs.cr3 if cr3 is None else cr3)
        places = [table + 8 * n for n in range(_ENTRIES)] if self.on else []
        before = [self._entry(place) for place in places]
        # SDM vol. 3A section 4.4.1: bits 2:1, 8:5 and those from MAXPHYADDR up are reserved.
        legal = (1 << self.vcpu.cpu.maxphyaddr) - 1 & ~(0b110 | 0b1111 << 5)
        for place, entry in zip(places, before, strict=True):
            if entry & _PRESENT and entry & ~legal:
                self._put(place, entry & legal)
        try:
            yield
        finally:
            for place, entry in zip(places, before, strict=True):
                if self._entry(place) != entry:
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
