"""The named errors of kvmmmu: what was wrong, where, and what is allowed.

Every one leaves the state as it was.  ``KvmmmuError`` catches them all.
"""

from __future__ import annotations

__all__ = [
    "ArenaFullError",
    "ArgumentError",
    "FormatError",
    "GuestFaultError",
    "KvmmmuError",
    "MemslotError",
    "MmioUnhandledError",
    "VCpuBusyError",
    "VmBusyError",
    "VmClosedError",
]


class KvmmmuError(Exception):
    """Base of every error raised by this package (Python's own TypeError and OverflowError apart)."""


class ArgumentError(KvmmmuError, ValueError):
    """An argument is outside its legal range; the message names it, its value and the range."""


class FormatError(KvmmmuError, ValueError):
    """A file is not what it should be; the message names the file, the field and what was expected."""


class MemslotError(KvmmmuError, OSError):
    """A memslot change was refused by KVM's own rules.

    ``errno`` is what ``KVM_SET_USER_MEMORY_REGION`` (or the dirty-log call) would return.
    """


class GuestFaultError(KvmmmuError):
    """The guest would take an exception, or KVM would stop: nothing was completed.

    ``result`` is the ``AccessResult``, or None for a register load.
    """

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class MmioUnhandledError(KvmmmuError):
    """An MMIO access that no registered device takes; ``result.mmio`` holds its (gpa, size) pieces."""

    def __init__(self, message: str, result: object = None) -> None:
        super().__init__(message)
        self.result = result


class ArenaFullError(KvmmmuError, MemoryError):
    """No shadow page is left under the hard limit, even after recycling."""


class VCpuBusyError(KvmmmuError, RuntimeError):
    """A vCPU is one thread's at a time; a second one tried to use it."""


class VmBusyError(KvmmmuError, RuntimeError):
    """The VM cannot be closed while a vCPU runs."""


class VmClosedError(KvmmmuError, RuntimeError):
    """The VM was closed; nothing of it can be used."""
