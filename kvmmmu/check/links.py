"""Who points to what: reverse maps, parents, children, roots, and the counters of mapped pages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from kvmmmu.check.snapshot import ENTRIES, LIST_FREE, Role, Snapshot
from kvmmmu.errors import Violation

_REQ_FREE_OBSOLETE_ROOTS = 1


def spte_name(s: Snapshot, index: int) -> str:
    """How a message calls an spte."""
    page, entry = divmod(index, ENTRIES)
    value = int(s.sptes[page, entry]) if page < s.top else 0
    return f"spte {page}:{entry} ({value:#x})"


def rmap(s: Snapshot) -> Iterator[Violation]:
    """A present leaf of the shadow MMU is in the rmap of its gfn once; nothing else is in an rmap (I1)."""
    name = "rmap"
    wanted = s.leaf & s.shadow[:, None]
    listed = Counter[int]()
    for space in s.spaces:
        for slot in space.slots:
            for level, column in slot.rmap.items():
                for place in np.flatnonzero(column).tolist():
                    for index in s.list(int(column[place])):
                        listed[index] += 1
                        page, entry = divmod(index, ENTRIES)
                        if page >= s.top or not wanted[page, entry]:
                            yield Violation(name, spte_name(s, index), "is in an rmap, but maps nothing")
                            continue
                        first = (slot.base_gfn >> 9 * (level - 1)) + place
                        gfn, own = int(s.gfn[page, entry]), int(s.level[page])
                        if own != level or gfn >> 9 * (level - 1) != first or Role.as_id(s.role(page)) != space.as_id:
                            yield Violation(
                                name,
                                spte_name(s, index),
                                f"maps gfn {gfn:#x} at level {own}, but is in the rmap of "
                                f"{first << 9 * (level - 1):#x} at level {level} of address space {space.as_id}",
                            )
    for page, entry in np.argwhere(wanted).tolist():
        times = listed[page * ENTRIES + entry]
        if times != 1:
            yield Violation(
                name,
                spte_name(s, page * ENTRIES + entry),
                f"maps gfn {int(s.gfn[page, entry]):#x} and is in {times} rmaps, expected 1",
            )


def page_counters(s: Snapshot) -> Iterator[Violation]:
    """pages_4k, pages_2m and pages_1g count the present leaves of both MMUs (I2)."""
    for level, counter in ((1, "pages_4k"), (2, "pages_2m"), (3, "pages_1g")):
        found = int(s.leaf[s.level == level].sum())
        if found != s.stats[counter]:
            yield Violation("page counters", counter, f"is {s.stats[counter]}, expected {found}")
    split = int((s.live & (s.pages["nx_disallowed"] != 0)).sum())
    if split != s.stats["nx_lpage_splits"]:
        yield Violation("page counters", "nx_lpage_splits", f"is {s.stats['nx_lpage_splits']}, expected {split}")


def parents(s: Snapshot) -> Iterator[Violation]:
    """Every link of the shadow MMU is in its child's parent list once; the lists hold nothing else (I3)."""
    name = "parents"
    listed: dict[int, int] = {}
    for child in np.flatnonzero(s.live).tolist():
        for index in s.list(int(s.pages["parents"][child])):
            page, entry = divmod(index, ENTRIES)
            if index in listed:
                yield Violation(name, spte_name(s, index), f"is a parent of pages {listed[index]} and {child}")
            listed[index] = child
            if page >= s.top or not s.link[page, entry] or not s.shadow[page] or s.pfn[page, entry] != child:
                yield Violation(name, spte_name(s, index), f"is a parent of page {child}, but does not point there")
    for page, entry in np.argwhere(s.link & s.shadow[:, None]).tolist():
        index = page * ENTRIES + entry
        if index not in listed:
            yield Violation(name, spte_name(s, index), f"is not among the parents of page {int(s.pfn[page, entry])}")


def children(s: Snapshot) -> Iterator[Violation]:
    """A link leads to a valid page one level down whose role is its parent's but for what may differ."""
    name = "children"
    for page, entry in np.argwhere(s.link & s.shadow[:, None]).tolist():
        where, child, role = spte_name(s, page * ENTRIES + entry), int(s.pfn[page, entry]), s.role(page)
        if child >= s.top or not s.valid[child]:
            yield Violation(name, where, f"points to page {child}, which is not a valid page")
            continue
        other = s.role(child)
        if Role.level(other) != Role.level(role) - 1:
            yield Violation(name, where, f"is at level {Role.level(role)}, its child at level {Role.level(other)}")
        differ = (role ^ other) & ~(0xF | 0x700 | 0x60 | Role.DIRECT | Role.INVALID)
        if differ:
            yield Violation(name, where, f"role {role:#x}, child's role {other:#x}: bits {differ:#x} may not differ")
        if role & Role.DIRECT:
            if not other & Role.DIRECT:
                yield Violation(name, where, f"is direct, its child {child} is not")
            if s.pages["gfn"][child] != s.gfn[page, entry]:
                gfns = int(s.gfn[page, entry]), int(s.pages["gfn"][child])
                yield Violation(name, where, f"stands for gfn {gfns[0]:#x}, its child for {gfns[1]:#x}")
        elif Role.access(other) & ~Role.access(role) & ~2:
            yield Violation(name, where, f"has rights {Role.access(role)}, its child {Role.access(other)}")
        quarters = other & Role.FOUR_BYTE and not other & Role.DIRECT and Role.level(other) == 1
        if quarters and Role.quadrant(other) != entry & 1:
            yield Violation(name, where, f"has a child of quadrant {Role.quadrant(other)}, expected {entry & 1}")


def _root_references(s: Snapshot) -> Counter[int]:
    """How often each page is a root of some vCPU."""
    count = Counter[int]()
    for vcpu in s.vcpus:
        for page, _ in vcpu.roots:
            if not page:
                continue
            if s.pages["special"][page]:
                count.update(pfn for pfn in s.pfn[page, :4].tolist() if pfn)
            else:
                count[page] += 1
    return count


def roots(s: Snapshot) -> Iterator[Violation]:
    """root_count is the number of vCPU roots, one more for a valid root of the TDP MMU.

    A zapped page lives only as somebody's root, is empty, and that vCPU has been asked to let go.
    """
    name = "roots"
    count = _root_references(s)
    for page in np.flatnonzero(s.live).tolist():
        record = s.pages[page]
        invalid = bool(record["role"] & Role.INVALID)
        own = bool(record["tdp"]) and Role.level(int(record["role"])) >= 4 and not invalid and _is_tdp_root(s, page)
        if record["root_count"] != count[page] + own:
            yield Violation(name, f"page {page}", f"root_count is {record['root_count']}, expected {count[page] + own}")
        if invalid and record["root_count"] == 0:
            yield Violation(name, f"page {page}", "is zapped and nobody's root, expected freed")
        if invalid and (s.sptes[page] != s.nothing[page]).any():
            yield Violation(name, f"page {page}", "is zapped, expected all entries empty")
    for page in count:
        if page >= s.top or s.pages["on_list"][page] == LIST_FREE:
            yield Violation(name, f"page {page}", "is a root of a vCPU and free")
    for vcpu in s.vcpus:
        for page, _ in vcpu.roots:
            if page and _obsolete(s, page) and not vcpu.requests & _REQ_FREE_OBSOLETE_ROOTS:
                yield Violation(name, f"vCPU {vcpu.id}", f"root {page} is zapped, and nobody asked to drop it")


def _is_tdp_root(s: Snapshot, page: int) -> bool:
    at, seen = s.tdp_roots, set[int]()
    while at and at not in seen:
        if at == page:
            return True
        seen.add(at)
        at = int(s.pages["list_next"][at])
    return False


def _obsolete(s: Snapshot, page: int) -> bool:
    if s.pages["special"][page]:
        return any(pfn and s.role(pfn) & Role.INVALID for pfn in s.pfn[page, :4].tolist())
    return bool(s.role(page) & Role.INVALID)
