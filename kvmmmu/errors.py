"""The named errors of kvmmmu: what was wrong, where, and what is allowed.

Every one leaves the state as it was.  ``KvmmmuError`` catches them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "ArenaFullError",
    "ArgumentError",
    "FormatError",
    "GuestFaultError",
    "InvariantError",
    "KvmmmuError",
    "MemslotError",
    "MmioUnhandledError",
    "VCpuBusyError",
    "Violation",
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


@dataclass(frozen=True)
class Violation:
    """One invariant that does not hold.

    Attributes
    ----------
    invariant : str
        Its name.
    where : str
        The page, spte, counter or list.
    found : str
        What stands there and what was expected.
    hole : str
        When KVM itself gets there: the rule that leads to it.  Empty for what must never be.
    """

    invariant: str
    where: str
    found: str
    hole: str = ""

    def __str__(self) -> str:
        known = f" (a hole of KVM's: {self.hole})" if self.hole else ""
        return f"{self.invariant}: {self.where} {self.found}{known}"


_SHOWN = 10


class InvariantError(KvmmmuError, AssertionError):
    """The machine's own state is not consistent; ``violations`` lists where."""

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        lines = [str(violation) for violation in self.violations[:_SHOWN]]
        if len(self.violations) > _SHOWN:
            lines.append(f"and {len(self.violations) - _SHOWN} more")
        super().__init__(f"{len(self.violations)} invariants violated\n  " + "\n  ".join(lines))
