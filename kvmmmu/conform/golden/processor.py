"""What one instruction asks of the model: fetches, data accesses, deliveries, register loads.

The only file that calls the vCPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from kvmmmu.conform.golden.configuration import Configuration
from kvmmmu.conform.golden.exits import Exits
from kvmmmu.conform.golden.pdptes import PdpteQuirks
from kvmmmu.conform.golden.recorder import Recorder
from kvmmmu.errors import ArgumentError, GuestFaultError
from kvmmmu.outcome import Outcome, Path
from kvmmmu.vcpu import Execution, VCpu

__all__ = ["Done", "Processor", "mmio_bytes"]

_GP = 13
_CR4_PCIDE = 1 << 17

_OPERATIONS: Final = MappingProxyType({"r": "load", "w": "store", "add": "add", "cas": "cmpxchg", "movs": "movs"})


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
    emulated : bool
        KVM made the access.
    """

    outcome: Outcome
    gpa: int | None = None
    value: int = 0
    error_code: int = 0
    gva: int = 0
    suberror: int = 0
    exits: int = 0
    mmio: list[tuple[bool, int, int, int]] = field(default_factory=list)
    emulated: bool = False


class Processor:
    """A vCPU at the level of instructions.

    Parameters
    ----------
    vcpu : VCpu
    configuration : Configuration
    recorder : Recorder
    """

    def __init__(self, vcpu: VCpu, configuration: Configuration, recorder: Recorder) -> None:
        self.vcpu = vcpu
        self.artefacts = artefacts = configuration.artefacts
        self.pcid = configuration.pcid
        self.shadow = configuration.mmu == "shadow"
        self.users_get_ud = "fetch_fault_fails" not in configuration.behaviour.switches
        self.exits = Exits(configuration.amd, not self.shadow, configuration.era == "3.1")
        self.note = recorder.note
        self.host = recorder.host
        self._pdptes = PdpteQuirks(vcpu, recorder.host, artefacts)
        self._split_rmw = "rmw_reads_first" in artefacts
        self._refetch = "empty_tlb" in artefacts

    def fetch(self, gva: int, rip: int) -> Done:
        """Fetch a byte of the instruction at ``rip``."""
        self._pdptes.walk(gva)
        return self._done(self.vcpu.execute("fetch", gva, size=1, code_gva=rip))

    def system(self, vector: int, gva: int, size: int, rip: int, *, write: bool = False) -> Done:
        """A supervisor's access to a system structure while an event is delivered."""
        kind = "store" if write else "load"
        self._pdptes.walk(gva)
        return self._done(self.vcpu.execute(kind, gva, size=size, cpl=0, code_gva=rip, vectoring=vector))

    def memory(
        self, kind: str, gva: int, size: int, rip: int, length: int, *, value: int = 0, old: int = 0, src: int = 0
    ) -> Done:
        """A load (``r``), store (``w``), ``add``, ``cas`` or ``movs`` that stands at ``rip``."""
        self._pdptes.walk(gva, src if kind == "movs" else gva)
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
                refetch=self._refetch,
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
            result.path == Path.EMULATED,
        )

    def inject(self, vector: int, error_code: int | None = None) -> None:
        """KVM injects an exception."""
        self.vcpu.inject(vector, error_code)

    # -- registers

    def set_sregs(
        self, *, cr0: int | None = None, cr3: int | None = None, cr4: int | None = None, efer: int | None = None
    ) -> None:
        """KVM_SET_SREGS with these values, or with those it has."""
        try:
            with self._pdptes.unseen():
                self.vcpu.set_sregs(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer)
        except GuestFaultError:
            # The ioctl does not report PDPTEs that cannot be loaded: the old ones stay, the rest happens.
            with self._pdptes.kept():
                self.vcpu.set_sregs(cr0=cr0, cr3=cr3, cr4=cr4, efer=efer)

    def mode(self, cpl: int, ac: bool) -> None:
        """The privilege level and RFLAGS.AC from now on."""
        self.vcpu.set_mode(cpl, ac)

    def invlpg(self, gva: int, rip: int, length: int) -> Done:
        """INVLPG."""
        if not self.shadow:
            self.vcpu.invlpg(gva)
            return Done(Outcome.OK)
        self.note(self.exits.invlpg_line(rip, gva))
        if self.exits.emulated("invlpg"):
            done = self._software_fetch(rip, length)
            if done.outcome != Outcome.OK:
                return done
        self.vcpu.invlpg(gva)
        return Done(Outcome.OK, exits=1)

    def load_register(self, name: str, value: int, rip: int, length: int) -> Done:
        """MOV to a control register, or WRMSR to EFER."""
        registers = self.vcpu.regs
        exits = self.exits.register(name, getattr(registers, name), value)
        if exits:
            self.note(self.exits.register_line(name, rip, registers.cr0))
            if self.exits.emulated(name):
                done = self._software_fetch(rip, length)
                if done.outcome != Outcome.OK:
                    return done
            if name != "efer":
                self.note(self.exits.value_line(name, value, False))
        refused = not self._load(name, value)
        if exits and name == "efer":
            self.note(self.exits.value_line(name, value, refused))
        if refused:
            if exits:
                self.vcpu.inject(_GP, 0)
            return Done(Outcome.GP, exits=int(exits))
        if exits and self.exits.skipped(name):
            done = self._software_fetch(rip, length)
            if done.outcome != Outcome.OK:
                return done
        return Done(Outcome.OK, exits=int(exits))

    def _load(self, name: str, value: int) -> bool:
        """False: #GP."""
        if name == "cr4" and value & _CR4_PCIDE and not self.pcid:
            return False
        if name == "cr3":
            with self._pdptes.stale(value):
                return self._try(self.vcpu.load_cr3, value)
        load = {"cr0": self.vcpu.mov_cr0, "cr4": self.vcpu.mov_cr4}
        with self._pdptes.accessed():
            return self._try(load.get(name, self.vcpu.write_efer), value)

    @staticmethod
    def _try(load: Callable[[int], None], value: int) -> bool:
        try:
            load(value)
        except (GuestFaultError, ArgumentError):
            return False
        return True

    def _software_fetch(self, rip: int, length: int) -> Done:
        """KVM fetches an instruction that it then carries out."""
        return self._done(self.vcpu.fetch_by_kvm(rip, length))

    def out(self, rip: int, port: int) -> None:
        """OUT ends the operation: user space takes over."""
        self.note(self.exits.io_line(rip, port))

    def halt(self, rip: int, length: int) -> None:
        """HLT ends it too."""
        self.note(self.exits.halt_line(rip))
        if self.exits.skipped("hlt"):
            self._software_fetch(rip, length)

    def shutdown(self, rip: int) -> None:
        """The processor triple-faults."""
        self.note(self.exits.shutdown_line(rip))
        if self.exits.amd:
            # The VMCB is undefined after a shutdown, so KVM resets the vCPU.
            self.vcpu.init()
