"""Guest tables that are shadowed: who may write them, which pages lag behind, what the counts say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from kvmmmu.check.links import spte_name
from kvmmmu.check.snapshot import ENTRIES, Role, Snapshot
from kvmmmu.errors import Violation


def unsync_pages(s: Snapshot) -> Iterator[Violation]:
    """Only valid level-1 pages with a guest table lag behind it, and mmu_unsync counts them (I4)."""
    name = "unsync"
    for page in np.flatnonzero(s.live & (s.pages["unsync"] != 0)).tolist():
        if not s.valid[page] or s.level[page] != 1 or not Role.has_gptes(s.role(page)):
            yield Violation(name, f"page {page}", f"is unsync with role {s.role(page):#x}")
    found = int((s.live & (s.pages["unsync"] != 0)).sum())
    if found != s.stats["mmu_unsync"]:
        yield Violation(name, "mmu_unsync", f"is {s.stats['mmu_unsync']}, expected {found}")


def unsync_bits(s: Snapshot) -> Iterator[Violation]:
    """A parent counts its marked entries, and marks every child that is unsync or has such below (I4)."""
    name = "unsync bits"
    marked = s.unsync_bits.sum(axis=1)
    for page in np.flatnonzero(s.shadow & (marked != s.pages["unsync_children"])).tolist():
        yield Violation(name, f"page {page}", f"counts {s.pages['unsync_children'][page]}, marked are {marked[page]}")
    below = s.shadow & ((s.pages["unsync"] != 0) | (s.pages["unsync_children"] != 0))
    for page in np.flatnonzero(below).tolist():
        for index in s.list(int(s.pages["parents"][page])):
            parent, entry = divmod(index, ENTRIES)
            if parent < s.top and not s.unsync_bits[parent, entry]:
                yield Violation(name, spte_name(s, index), f"leads to the unsync page {page}, but is not marked")


def _tables(s: Snapshot) -> list[int]:
    """Valid pages with a guest table."""
    pages: list[int] = np.flatnonzero(s.valid & Role.has_gptes(s.pages["role"])).tolist()
    return pages


def write_protection(s: Snapshot) -> Iterator[Violation]:
    """No leaf maps a guest table writable, or may become so, while its shadow page is in sync (I5)."""
    bits = np.uint64(2 | s.mmu_writable)
    writable: dict[tuple[int, int, int], int] = {}
    for page, entry in np.argwhere(s.leaf & ((s.sptes & bits) != 0)).tolist():
        level = int(s.level[page])
        writable[Role.as_id(s.role(page)), level, int(s.gfn[page, entry]) >> 9 * (level - 1)] = page * ENTRIES + entry
    for table in _tables(s):
        if s.pages["unsync"][table]:
            continue
        gfn = int(s.pages["gfn"][table])
        for level in (1, 2, 3):
            index = writable.get((Role.as_id(s.role(table)), level, gfn >> 9 * (level - 1)))
            if index is not None:
                yield Violation(
                    "write protection",
                    spte_name(s, index),
                    f"may be written, but page {table} (role {s.role(table):#x}) shadows gfn {gfn:#x} and is in sync",
                )


def write_tracking(s: Snapshot) -> Iterator[Violation]:
    """write_track of a gfn counts the shadow pages above level 1 behind which it stands."""
    wanted = Counter((Role.as_id(s.role(t)), int(s.pages["gfn"][t])) for t in _tables(s) if s.level[t] > 1)
    for space in s.spaces:
        for slot in space.slots:
            first, end = slot.base_gfn, slot.base_gfn + slot.npages
            gfns = {first + place for place in np.flatnonzero(slot.write_track).tolist()}
            gfns |= {gfn for as_id, gfn in wanted if as_id == space.as_id and first <= gfn < end}
            for gfn in sorted(gfns):
                found, expected = int(slot.write_track[gfn - first]), wanted[space.as_id, gfn]
                if found != expected:
                    yield Violation("write tracking", f"gfn {gfn:#x}", f"write_track is {found}, expected {expected}")


def disallow_counts(s: Snapshot) -> Iterator[Violation]:
    """The reasons against a large page are the slot's borders and every shadowed guest table in it."""
    tables = _tables(s)
    for space in s.spaces:
        for slot in space.slots:
            for level, counts in slot.disallow.items():
                shift, mask = 9 * (level - 1), (1 << 9 * (level - 1)) - 1
                wanted = np.zeros(len(counts), np.int64)
                wanted[0] = bool(slot.base_gfn & mask)
                if slot.base_gfn + slot.npages & mask:
                    wanted[-1] = 1
                if (slot.base_gfn ^ slot.base_pfn) & mask:
                    wanted[:] = 1
                for table in tables:
                    gfn = int(s.pages["gfn"][table])
                    inside = slot.base_gfn <= gfn < slot.base_gfn + slot.npages
                    if inside and Role.as_id(s.role(table)) == space.as_id:
                        wanted[(gfn >> shift) - (slot.base_gfn >> shift)] += 1
                for place in np.flatnonzero(wanted != counts).tolist():
                    yield Violation(
                        "large page counts",
                        f"slot {slot.id} level {level} place {place}",
                        f"{counts[place]} reasons against a large page, expected {wanted[place]}",
                    )
