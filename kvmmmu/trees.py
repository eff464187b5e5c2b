"""The tables that KVM built, as a picture: ``vm.page_tables()``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from kvmmmu._core import tree_copy_of

if TYPE_CHECKING:
    from kvmmmu.vcpu import VCpu

__all__ = ["PageTables", "TableEntry", "TablePage"]

_MMU_PRESENT: Final = 1 << 11
_LARGE: Final = 1 << 7
_DIRECT: Final = 1 << 7
_ACCESS: Final = ("---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux")


@dataclass(frozen=True)
class TableEntry:
    """An entry that is not empty.

    Attributes
    ----------
    index : int
        0 to 511.
    address : int
        First address it translates: a gva in shadow tables of a paging guest, else a gpa.
    spte : int
    kind : {"table", "leaf", "mmio", "np"}
        Points at another page, maps memory, caches an MMIO fault, or none of these (frozen).
    ref : int
        Table: id of the page; leaf: frame number (pfn); else 0.
    """

    index: int
    address: int
    spte: int
    kind: str
    ref: int


@dataclass(frozen=True)
class TablePage:
    """A page of sptes.

    Attributes
    ----------
    id : int
    level : int
        1 = entries map 4 KiB, ... 5.
    gfn : int
        The guest table it shadows, or the first gfn it maps (direct).
    role : int
        The role word.
    unsync : bool
        The guest may have written its table since.
    root_count, unsync_children, write_flooding_count, valid_gen : int
    nx_disallowed : bool
        It stands where a huge page would if huge pages could be executed.
    tdp : bool
        It belongs to the TDP MMU.
    special : bool
        A table of four PAE roots: entries, and nothing else that is a shadow page's.
    reached : bool
        The current root (with ``all=True``: or a previous one) leads here.
    entries : tuple of TableEntry
    """

    id: int
    level: int
    gfn: int
    role: int
    unsync: bool
    root_count: int
    unsync_children: int
    write_flooding_count: int
    valid_gen: int
    nx_disallowed: bool
    tdp: bool
    special: bool
    reached: bool
    entries: tuple[TableEntry, ...] = field(repr=False)

    @property
    def direct(self) -> bool:
        """It maps gpas linearly: no guest table stands behind it."""
        return bool(self.role & _DIRECT)


class PageTables:
    """A copy of a vCPU's tables; made by ``VM.page_tables``.

    Attributes
    ----------
    pages : tuple of TablePage
        The root first, every page before those it leads to, in order of entries.
    records : ndarray, shape (n,)
        Their fields as columns.
    sptes : ndarray of uint64, shape (n, 512)
    """

    def __init__(self, vcpu: VCpu, everything: bool, previous: int | None = None) -> None:
        self.records, self.sptes = tree_copy_of(vcpu, everything, -1 if previous is None else previous)
        self.records.flags.writeable = False
        self.sptes.flags.writeable = False
        vm = vcpu.vm
        form = vm.spte_format
        self._empty = np.uint64(form.empty)
        self._address = form.masks["address"]
        self._mmio = (form.masks["mmio_mask"], form.masks["mmio_value"]) if form.mmio_caching else None
        self._canonical = vm.mmu == "shadow"

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[TablePage]:
        return iter(self.pages)

    @cached_property
    def pages(self) -> tuple[TablePage, ...]:
        """See the class."""
        start: dict[int, int] = {}
        pages = []
        for row, record in enumerate(self.records):
            number, level, special = int(record["id"]), int(record["level"]), bool(record["special"])
            entries = self._entries(row, level, special, start.get(number, 0))
            for entry in entries:
                if entry.kind == "table":
                    start.setdefault(entry.ref, entry.address)
            pages.append(
                TablePage(
                    id=number,
                    level=level,
                    gfn=int(record["gfn"]),
                    role=int(record["role"]),
                    unsync=bool(record["unsync"]),
                    root_count=int(record["root_count"]),
                    unsync_children=int(record["unsync_children"]),
                    write_flooding_count=int(record["write_flooding"]),
                    valid_gen=int(record["valid_gen"]),
                    nx_disallowed=bool(record["nx_disallowed"]),
                    tdp=bool(record["tdp"]),
                    special=special,
                    reached=bool(record["reached"]),
                    entries=entries,
                )
            )
        return tuple(pages)

    def _entries(self, row: int, level: int, special: bool, base: int) -> tuple[TableEntry, ...]:
        words: npt.NDArray[np.uint64] = self.sptes[row, :4] if special else self.sptes[row]
        found = np.flatnonzero(words != self._empty)
        shift = 12 + 9 * (level - 1)
        entries = []
        for index, spte in zip(found.tolist(), words[found].tolist(), strict=True):
            address = base + (index << shift)
            if self._canonical and level >= 4 and address >> (shift + 8) & 1 and not base:
                # Upper halves of 48- and 57-bit address spaces are written with their sign.
                address |= (1 << 64) - (1 << (shift + 9))
            entries.append(TableEntry(index, address, spte, *self._kind(spte, level, special)))
        return tuple(entries)

    def _kind(self, spte: int, level: int, special: bool) -> tuple[str, int]:
        if self._mmio is not None and not special and spte & self._mmio[0] == self._mmio[1]:
            return "mmio", 0
        if special:
            return "table", (spte & self._address) >> 12
        if not spte & _MMU_PRESENT:
            return "np", 0
        if level == 1 or spte & _LARGE:
            return "leaf", (spte & self._address) >> 12
        return "table", (spte & self._address) >> 12

    def __str__(self) -> str:
        lines = []
        for page in self.pages:
            if page.special:
                lines.append(f"page {page.id} level {page.level}: PAE roots")
            else:
                marks = "".join(
                    f" {name}" for name in ("direct", "unsync", "tdp", "nx_disallowed") if getattr(page, name)
                )
                lines.append(
                    f"page {page.id} level {page.level} gfn {page.gfn:#x} role {page.role:#x}"
                    f" {_ACCESS[page.role >> 8 & 7]}{marks} roots {page.root_count}"
                    f" unsync children {page.unsync_children} floods {page.write_flooding_count}"
                    f"{'' if page.reached else ' not reached'}"
                )
            for entry in page.entries:
                target = {"table": f" page {entry.ref}", "leaf": f" pfn {entry.ref:#x}"}.get(entry.kind, "")
                lines.append(f"  {entry.index:3} {entry.address:#018x} {entry.spte:#018x} {entry.kind}{target}")
        return "\n".join(lines)
