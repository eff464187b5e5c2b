"""What one instruction asks of the model: fetches, data accesses, deliveries, register loads.

The only file that calls the vCPU.  ``VCpu.execute`` carries out an instruction with KVM's emulation behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvmmmu.errors import ArgumentError, GuestFaultError
from kvmmmu.outcome import Outcome, Path
from kvmmmu.vcpu import VCpu

__all__ = ["Done", "Processor", "mmio_bytes"]


def mmio_bytes(_gpa: int, length: int, _offset: int = 0) -> bytes:
    """What the test program answers to an MMIO read."""
    return bytes(range(0xC0, 0xC0 + length))


@dataclass
class Done:
    """How an instruction or access ended.

    Attributes
    ----------
    outcome : Outcome
    gpa : int or None
    value : int
        What was read.
    error_code, gva : int
        Of a fault.
    exits : int
        VM exits it cost.
    mmio : list of (kind, gpa, length, data)
        Exits to user space, in order.
    by_processor : bool
        A guest fault was found by the processor itself, not by KVM.
    """

    outcome: Outcome
    gpa: int | None = None
    value: int = 0
    error_code: int = 0
    gva: int = 0
    exits: int = 0
    mmio: list[tuple[str, int, int, bytes]] = field(default_factory=list)
    by_processor: bool = False


class Processor:
    """A vCPU at the level of instructions.

    Parameters
    ----------
    vcpu : VCpu
    artefacts : frozenset of str
    """

    def __init__(self, vcpu: VCpu, artefacts: frozenset[str]) -> None:
        self.vcpu: Any = vcpu
        self.artefacts = artefacts
        self._execute: Callable[..., Any] | None = getattr(vcpu, "execute", None)

    def fetch(self, rip: int) -> Done:
        """Fetch an instruction's first byte."""
        result = self.vcpu.access(rip, "x")
        return self._done(result)

    def system(self, gva: int, size: int, value: int | None = None) -> Done:
        """An access to a system structure while an event is delivered."""
        kind = "r" if value is None else "w"
        result = self.vcpu.access(gva, kind, size=size, value=value, implicit=True)
        return self._done(result)

    def _done(self, result: Any) -> Done:
        by_processor = self.vcpu.vm.mmu != "shadow" and result.path != Path.EMULATED
        return Done(
            result.outcome, result.gpa, 0, result.error_code, result.gva, result.exits, by_processor=by_processor
        )

    def memory(
        self, kind: str, gva: int, size: int, *, value: int = 0, old: int = 0, src: int | None = None, rip: int = 0
    ) -> Done:
        """A load (``r``), store (``w``), ``add``, ``cas`` or ``movs``."""
        if self._execute is None:
            return self._pieces(kind, gva, size, value, old, src)
        result = self._execute(
            kind, gva=gva, size=size, value=value, old=old, src=src, code_gva=rip, mmio_read=mmio_bytes,
            rmw_reads_first="rmw_reads_first" in self.artefacts,
        )
        done = self._done(result)
        done.value = result.value
        done.mmio = list(result.exits_mmio)
        return done

    # -- without VCpu.execute: separate accesses

    def _move(self, gva: int, size: int, value: int | None) -> Done:
        write = value is not None
        data = None if value is None else value.to_bytes(size, "little")
        result, part = self.vcpu.move(gva, size, data, self.vcpu.cpl, write)
        done = self._done(result)
        piece = bytearray(part)
        for (gpa, length), offset in zip(result.mmio, self.vcpu.mmio_offsets(result), strict=True):
            if write:
                done.mmio.append(("w", gpa, length, bytes(data or b"")[offset : offset + length]))
            else:
                answer = mmio_bytes(gpa, length)
                done.mmio.append(("r", gpa, length, answer))
                piece[offset : offset + length] = answer
        if result.outcome == Outcome.MMIO:
            done.outcome = Outcome.OK
        if result.path == Path.EMULATED:
            done.exits += 1
        done.value = int.from_bytes(piece, "little")
        return done

    def _pieces(self, kind: str, gva: int, size: int, value: int, old: int, src: int | None) -> Done:
        if kind == "w":
            return self._move(gva, size, value)
        first = self._move(gva if src is None else src, size, None)
        if kind == "r" or first.outcome != Outcome.OK:
            return first
        if kind == "add":
            stored = (first.value + value) & (1 << 8 * size) - 1
        elif kind == "cas":
            stored = value if first.value == old else first.value
        else:
            stored = first.value
        second = self._move(gva, size, stored)
        second.mmio = first.mmio + second.mmio
        second.exits += first.exits
        second.value = first.value
        return second

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
        return int(self.vcpu.vm.mmu == "shadow")

    def load_register(self, register: str, value: int, rip: int) -> Done:
        """MOV to a control register, or WRMSR to EFER."""
        load = {"cr0": self.vcpu.mov_cr0, "cr3": self.vcpu.load_cr3, "cr4": self.vcpu.mov_cr4}.get(
            register, self.vcpu.write_efer
        )
        # With the second dimension in hardware MOV CR3 is the guest's own business.
        exits = int(register != "cr3" or self.vcpu.vm.mmu == "shadow")
        try:
            load(value)
        except (GuestFaultError, ArgumentError):
            return Done(Outcome.GP, exits=exits)
        return Done(Outcome.OK, exits=exits)

    @property
    def efer(self) -> int:
        """EFER as it is."""
        return int(self.vcpu.regs.efer)
