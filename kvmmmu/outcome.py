"""How an access of a guest can end, and who carried it out."""

from __future__ import annotations

from enum import IntEnum

__all__ = ["Outcome", "Path"]


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
    #: KVM_RUN fails with an errno.
    ERROR = 7


class Path(IntEnum):
    """Who carried an access out."""

    #: The processor, without a VM exit.
    HARDWARE = 0
    #: The processor, after page faults that KVM repaired.
    FAULT = 1
    #: KVM's emulator.
    EMULATED = 2
