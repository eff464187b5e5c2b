"""What one instruction asks of the model: fetches, data accesses, deliveries, register loads.

The only file that calls the vCPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from kvmmmu.errors import ArgumentError, GuestFaultError
from kvmmmu.outcome import Outcome, Path
from kvmmmu.vcpu import Execution, VCpu

__all__ = ["Done", "Processor", "mmio_bytes"]

_OPERATIONS: Final = MappingProxyType({"r": "load", "w": "store", "x": "fetch", "add": "add", "cas": "cmpxchg", "movs": "movs"})


def mmio_bytes(_gpa: int, length: int) -> bytes:
    """What the test program answers to an MMIO read."""
    return bytes(range(0xC0, 0xC0 + length))


@dataclass
class Done:
    """How an instruction or access ended.

    Attributes
    ----------
    outcome : Outcome
        MMIO that was answered counts as OK.
    gpa : int or None
    value : int
        What was read.
    error_code, gva : int
        Of a fault.
    suberror : int
        Of an internal error.
    exits : int
        VM exits it cost.
    mmio : list of (write, gpa, size, data)
        Exits to user space, in order.
    by_processor : bool
        A guest fault was found by the processor itself, not by KVM.
    """

    outcome: Outcome
    gpa: int | None = None
    value: int = 0
    error_code: int = 0
    gva: int = 0
    suberror: int = 0
    exits: int = 0
    mmio: list[tuple[bool, int, int, int]] = field(default_factory=list)
    by_processor: bool = False


class Processor:
    """A vCPU at the level of instructions.

    Parameters
    ----------
    vcpu : VCpu
    artefacts : frozenset of str
    """

    def __init__(self, vcpu: VCpu, artefacts: frozenset[str]) -> None:
        self.vcpu = vcpu
        self.artefacts = artefacts
        self.shadow = vcpu.vm.mmu == "shadow"
        self._split_rmw = "rmw_reads_first" in artefacts

    def fetch(self, rip: int) -> Done:
        """Fetch an instruction's first byte."""
        return self._done(self.vcpu.execute("fetch", rip, size=1, code_gva=rip))

    def system(self, gva: int, size: int, rip: int, *, write: bool = False) -> Done:
        """A supervisor's access to a system structure while an event is delivered."""
        kind = "store" if write else "load"
        return self._done(self.vcpu.execute(kind, gva, size=size, cpl=0, code_gva=rip, vectoring=True))

    def memory(
        self, kind: str, gva: int, size: int, rip: int, length: int, *, value: int = 0, old: int = 0, src: int = 0
    ) -> Done:
        """A load (``r``), store (``w``), ``add``, ``cas`` or ``movs`` that stands at ``rip``."""
        return self._done(
            self.vcpu.execute(
                _OPERATIONS[kind],
                gva,
                size=size,
                value=value,
                expected=old,
                src=src,
                code_gva=rip,
                code_size=length,
                split_rmw=self._split_rmw,
                mmio_read=mmio_bytes,
            )
        )

    def _done(self, execution: Execution) -> Done:
        result = execution.result
        return Done(
            Outcome.OK if result.outcome == Outcome.MMIO else result.outcome,
            result.gpa,
            execution.value,
            result.error_code,
            result.gva,
            execution.suberror,
            result.exits,
            [(exit.write, exit.gpa, exit.size, exit.data) for exit in execution.mmio],
            not self.shadow and result.path != Path.EMULATED,
        )

    # -- registers

    def set_sregs(self, **registers: int) -> None:
        """KVM_SET_SREGS with these values, or with those it has."""
        self.vcpu.set_sregs(**registers)

    def mode(self, cpl: int, ac: bool) -> None:
        """The privilege level and RFLAGS.AC from now on."""
        self.vcpu.set_mode(cpl, ac)

    def invlpg(self, gva: int, rip: int) -> int:
        """INVLPG; VM exits it cost."""
        self.vcpu.invlpg(gva)
        return int(self.shadow)

    def load_register(self, register: str, value: int, rip: int) -> Done:
        """MOV to a control register, or WRMSR to EFER."""
        load = {"cr0": self.vcpu.mov_cr0, "cr3": self.vcpu.load_cr3, "cr4": self.vcpu.mov_cr4}.get(
            register, self.vcpu.write_efer
        )
        # With the second dimension in hardware MOV CR3 is the guest's own business.
        exits = int(register != "cr3" or self.shadow)
        try:
            load(value)
        except (GuestFaultError, ArgumentError):
            return Done(Outcome.GP, exits=exits)
        return Done(Outcome.OK, exits=exits)
