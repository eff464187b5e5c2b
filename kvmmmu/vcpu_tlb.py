"""The part of a vCPU that concerns its caches of translations."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

import numpy as np
import numpy.typing as npt

from kvmmmu._arguments import index_in, index_u64
from kvmmmu._core import VcpuCore
from kvmmmu.errors import ArgumentError, GuestFaultError
from kvmmmu.tlb import Tlb, entries_of

if TYPE_CHECKING:
    from kvmmmu.cpu import GuestCpu
    from kvmmmu.vm import VM

__all__ = ["TranslationCaches"]


class TranslationCaches(VcpuCore):
    """What ``VCpu`` has of them: what is cached, and the instructions that flush by more than one address."""

    vm: VM
    cpu: GuestCpu
    tlb: Tlb | None

    def use_tlb(self, tlb: Tlb) -> None:
        """Give the processor caches of translations; what ``VM.create_vcpu(tlb=…)`` does, once.

        Raises
        ------
        ArgumentError
            It has some already.
        """
        if self.tlb is not None:
            raise ArgumentError(f"tlb: the vCPU has one already, {self.tlb}")
        self.tlb_start(tlb.geometry(), tlb.spurious_faults)
        self.tlb = tlb

    def tlb_entries(self) -> npt.NDArray[np.void]:
        """What is cached now.

        Returns
        -------
        structured array
            Fields of ``kvmmmu.tlb.TLB_ENTRY``.  ``address`` is linear (of a paging-structure cache: shifted down to
            what the entry stands for), or guest-physical in ``guest_physical`` and ``nested …``; ``pcid`` is -1 for
            global pages and -2 for guest-physical mappings; ``refuses`` has 1, 2, 4 for reads, writes, fetches that
            must be walked whatever ``access`` allows.

        Raises
        ------
        VmBusyError
            A vCPU is running.
        """
        return entries_of(self.core.tlb_list(self.id))

    def invpcid(self, kind: SupportsIndex, pcid: SupportsIndex = 0, gva: SupportsIndex = 0) -> None:
        """INVPCID (SDM vol. 2A).

        Parameters
        ----------
        kind : {0, 1, 2, 3}
            One address of a PCID, a whole PCID, everything, everything but global pages.
        pcid, gva : int

        Raises
        ------
        GuestFaultError
            #GP: a type above 3, a PCID of more than 12 bits, one other than 0 without CR4.PCIDE, an address that is
            not canonical.
        """
        what = index_u64("kind", kind), index_u64("pcid", pcid), index_u64("gva", gva)
        if what[0] > 3 or not self.tlb_instruction(2, *what):
            raise GuestFaultError(f"#GP: INVPCID type {what[0]}, pcid {what[1]:#x}, gva {what[2]:#x}; nothing changed")

    def invept(self) -> None:
        """INVEPT of the current EPTP, as KVM executes it: guest-physical and combined mappings go.

        Raises
        ------
        ArgumentError
            The VM has no EPT.
        """
        if self.vm.mmu != "ept":
            raise ArgumentError(f"INVEPT needs a VM with mmu='ept'; this one has {self.vm.mmu!r}")
        self.tlb_instruction(0, 0, 0, 0)

    def invvpid(self, kind: SupportsIndex, gva: SupportsIndex = 0) -> None:
        """INVVPID of the vCPU's VPID (APM: flushing its ASID), as KVM executes it; guest-physical mappings stay.

        Parameters
        ----------
        kind : {0, 1, 2, 3}
            One address, the VPID, every VPID, the VPID but global pages.
        gva : int

        Raises
        ------
        ArgumentError
            A kind above 3, or one address that is not canonical: the instruction fails (SDM vol. 3C, INVVPID).
        """
        what, address = index_in("kind", kind, 0, 3), index_u64("gva", gva)
        width = 57 if self.cpu.la57 else 48
        if what == 0 and address >> (width - 1) not in (0, (1 << 65 - width) - 1):
            raise ArgumentError(f"gva: {address:#x} is not canonical ({width} bits); nothing changed")
        self.tlb_instruction(1, what, 0, address)
