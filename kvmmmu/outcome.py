"""How walks and accesses of a guest can end, who carried them out, and what they permit."""

from __future__ import annotations

from enum import IntEnum, IntFlag

__all__ = ["Fault", "Outcome", "Path", "Rights"]


class Outcome(IntEnum):
    """The end of one access."""

    #: Done.
    OK = 0
    #: No memory stands there: the caller completes it, as user space does after KVM_EXIT_MMIO.
    MMIO = 1
    #: The guest gets a page fault.
    PF = 2
    #: The guest gets a general protection fault: the address is not canonical.
    GP = 3
    #: KVM gives up (KVM_EXIT_INTERNAL_ERROR): a fetch from where no memory is.
    INTERNAL_ERROR = 4
    #: Triple fault: CR3 points outside memory.
    SHUTDOWN = 5
    #: Exits without progress; real KVM would go round for ever.
    HANG = 6
    #: KVM_RUN fails with an errno; with EINVAL (22) after an spte was found broken: see ``VCpu.explain_sptes``.
    ERROR = 7
    #: A TDX guest gets a virtualization exception (#VE): no memory stands there, and it is to ask for what it wants.
    VE = 8


class Path(IntEnum):
    """Who carried an access out."""

    #: The processor, without a VM exit.
    HARDWARE = 0
    #: The processor, after page faults that KVM repaired.
    FAULT = 1
    #: KVM's emulator.
    EMULATED = 2


class Fault(IntEnum):
    """How a walk can end other than well (the numbers of ``Paging.translate``'s ``fault`` column)."""

    NONE = 0
    PF = 1
    GP = 2
    PDPTE = 3
    EPT_VIOLATION = 4
    EPT_MISCONFIG = 5
    NPF = 6


class Rights(IntFlag):
    """What a translation permits.  In EPT ``U`` stands for "may be read"."""

    X = 1
    W = 2
    U = 4
