"""What a page walk saw and how it ended, as Python objects."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from kvmmmu.outcome import Fault, Rights

__all__ = ["Fault", "PagingFormat", "Rights", "WalkEntry", "WalkResult", "walk_result"]


class PagingFormat(IntEnum):
    """Formats of page tables."""

    NONE = 0
    PAGING_32 = 1
    PAE = 2
    LONG = 3
    EPT = 4


@dataclass(frozen=True)
class WalkEntry:
    """One table entry that a walk looked at.

    Attributes
    ----------
    level : int
        1 for the lowest table.
    gpa : int
        Where the entry stands.
    value : int
    rights_above : Rights
        What the entries above it permit together.
    rights : Rights
        What it permits itself.
    """

    level: int
    gpa: int
    value: int
    rights_above: Rights
    rights: Rights


@dataclass(frozen=True)
class WalkResult:
    """One page walk from its first entry to its end.

    Attributes
    ----------
    gva : int
        The address, cut to the width of the mode.
    access : {"r", "w", "x"}
    user : bool
        A user access (in an EPT walk: the access reads).
    implicit, ac : bool
        A supervisor access to a system structure; EFLAGS.AC.
    format : PagingFormat
    entries : tuple of WalkEntry
        Top first; empty when the walk ended before one.
    fault : Fault
    error_code : int
        Of #PF; the exit qualification of an EPT violation; EXITINFO1 of a nested page fault.
    gpa : int
        The result, 0 on a fault.
    page_shift : int
        log2 of the page size, 0 on a fault.
    rights : Rights
        What the entries permit together.
    reserved : int
        The reserved bits that the last entry had set.
    pending_gpa : int or None
        The address of the table entry that could not be fetched, when the second dimension refused that.
    second : WalkResult or None
        The last walk of the second dimension; its ``gpa`` is then the address in host memory.
    """

    gva: int
    access: str
    user: bool
    implicit: bool
    ac: bool
    format: PagingFormat
    entries: tuple[WalkEntry, ...]
    fault: Fault
    error_code: int
    gpa: int
    page_shift: int
    rights: Rights
    reserved: int
    pending_gpa: int | None = None
    second: WalkResult | None = None

    @property
    def ok(self) -> bool:
        """Whether the access was permitted."""
        return self.fault is Fault.NONE

    @property
    def convertible(self) -> bool:
        """An EPT violation that the guest learns of (#VE), on a processor with that control switched on.

        The entry that ended the walk has bit 63 (suppress #VE) clear: SDM vol. 3C, "Convertible EPT Violations".
        A misconfiguration always exits.
        """
        return self.fault is Fault.EPT_VIOLATION and bool(self.entries) and not self.entries[-1].value >> 63


def walk_result(record: dict[str, Any], second: dict[str, Any] | None = None) -> WalkResult:
    """Make a result of the engine's record of a walk (and of the second dimension's)."""
    access = record["access"]
    refused = second is not None and second["fault"] and record["level"] != record["seen"]
    pending = record["next_gpa"] if refused else None
    return WalkResult(
        gva=record["va"],
        access="x" if access & 0x10 else "w" if access & 0x2 else "r",
        user=bool(access & 0x4),
        implicit=bool(access >> 48 & 1),
        ac=record["ac"],
        format=PagingFormat(record["format"]),
        entries=tuple(
            WalkEntry(level, gpa, value, Rights(above), Rights(own))
            for level, gpa, value, above, own in record["entries"]
        ),
        fault=Fault(record["fault"]),
        error_code=record["error_code"],
        gpa=record["gpa"],
        page_shift=record["page_shift"],
        rights=Rights(record["acc"]),
        reserved=record["reserved"],
        pending_gpa=pending,
        second=walk_result(second) if second is not None else None,
    )
