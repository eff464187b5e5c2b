"""The model's page-table tree beside KVM's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvmmmu.conform.golden.host import Host
from kvmmmu.constants import TABLE
from kvmmmu.golden.results import TableEntry, TablePage
from kvmmmu.trees import PageTables

__all__ = ["model_tree", "trees_differ"]

_ADDRESS: Final = 0x000F_FFFF_FFFF_F000
_SHADOW_AD: Final = 1 << 5 | 1 << 6
_EPT_AD: Final = 1 << 8 | 1 << 9
_ROOT_ACCESSED: Final = 1 << 5
_WRITABLE: Final = 1 << 1

_Row = tuple[int, int, str, str]


def model_tree(tables: PageTables, host: Host) -> tuple[TablePage, ...]:
    """Tables written as recordings write them."""
    number = {page.id: str(i) for i, page in enumerate(tables.pages)}
    pages = []
    for page in tables.pages:
        entries = []
        for entry in page.entries:
            ref = ""
            if entry.kind == "table":
                ref = number.get(entry.ref, "?")
            elif entry.kind == "leaf":
                ref = host.frame_name(entry.ref)
            spte = entry.spte if entry.kind == "mmio" else entry.spte & ~_ADDRESS
            entries.append(TableEntry(entry.index, entry.address, spte, entry.kind, ref))
        values = None
        if not page.special:
            values = {
                "gfn": page.gfn,
                "role": page.role,
                "tdp": int(page.tdp),
                "unsync": int(page.unsync),
                "gen": page.valid_gen,
                "root_count": page.root_count,
                "unsync_children": page.unsync_children,
                "wfc": page.write_flooding_count,
                "nxdis": int(page.nx_disallowed),
            }
        pages.append(TablePage(number[page.id], page.level, values, tuple(entries)))
    return tuple(pages)


def trees_differ(
    expected: Sequence[TablePage],
    got: Sequence[TablePage],
    *,
    accessed_dirty: bool,
    ept: bool,
    roots_accessed: bool,
    unnamed: bool,
) -> str | None:
    """None, or the first page or entry that differs.

    ``roots_accessed``: the emulator sets bit 5 of PAE roots, which it does not have.
    ``unnamed``: a writable leaf recorded as the zero page is a frame the recorder could not name.
    """
    mask = 0 if accessed_dirty else _EPT_AD if ept else _SHADOW_AD
    for i in range(max(len(expected), len(got))):
        if i >= len(got) or i >= len(expected):
            return f"{len(expected)} pages expected, {len(got)} got"
        left, right = expected[i], got[i]
        if (left.level, left.fields) != (right.level, right.fields):
            return f"page {i}: expected {_page(left)}; got {_page(right)}"
        difference = _entries_differ(
            left, right, _ROOT_ACCESSED if left.fields is None and roots_accessed else mask, unnamed
        )
        if difference is not None:
            return f"page {i} ({_page(left)}): {difference}"
    return None


def _unnamed(row: _Row | None) -> bool:
    """The zero page is never mapped writable, so this frame is another one."""
    return row is not None and row[3] == "zero" and bool(row[1] & TABLE["SPTE_HOST_WRITABLE_EPT"])


def _entries_differ(left: TablePage, right: TablePage, mask: int, unnamed: bool) -> str | None:
    a, b = (
        {entry.index: _row(entry, 0 if entry.kind == "mmio" else mask) for entry in page.entries}
        for page in (left, right)
    )
    for index in sorted(a.keys() | b.keys()):
        if unnamed and _unnamed(a.get(index)) and index in b:
            b[index] = (*b[index][:3], "zero")
        if a.get(index) != b.get(index):
            return f"entry {index}: expected {_entry(a.get(index))}; got {_entry(b.get(index))}"
    return None


def _unnamed(row: _Row | None) -> bool:
    """The recording could not name the frame: no host maps its zero page writable."""
    return row is not None and row[3] == "zero" and bool(row[1] & _WRITABLE)


def _row(entry: TableEntry, mask: int) -> _Row:
    return entry.address, entry.spte & ~mask, entry.kind, entry.ref


def _page(page: TablePage) -> str:
    if page.fields is None:
        return f"level {page.level}, no shadow page"
    return f"level {page.level} " + " ".join(f"{name} {value:x}" for name, value in page.fields.items())


def _entry(row: _Row | None) -> str:
    if row is None:
        return "nothing"
    address, spte, kind, ref = row
    return f"{address:x} {spte:x} {kind} {ref}"
