"""The mitigation that keeps huge pages from being executed, and the tables it costs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvmmmu.check.links import spte_name
from kvmmmu.check.snapshot import ENTRIES, Snapshot
from kvmmmu.errors import Violation


def nx_list(s: Snapshot) -> Iterator[Violation]:
    """Exactly the tables marked as standing in a huge page's place are in recovery's list, both ways."""
    name = "nx list"
    at, before, seen = s.nx_head, 0, set[int]()
    while at:
        if at in seen or not 0 < at < s.top:
            yield Violation(name, f"page {at}", "closes a circle or is outside the arena")
            return
        seen.add(at)
        if not s.live[at] or not s.pages["nx_disallowed"][at]:
            yield Violation(name, f"page {at}", "is in the list, but free or not marked")
        if s.pages["nx_prev"][at] != before:
            yield Violation(name, f"page {at}", f"has page {s.pages['nx_prev'][at]} before it, expected {before}")
        before, at = at, int(s.pages["nx_next"][at])
    if s.nx_tail != before:
        yield Violation(name, "nx_tail", f"is page {s.nx_tail}, expected {before}")
    for page in np.flatnonzero(s.live & (s.pages["nx_disallowed"] != 0)).tolist():
        if page not in seen:
            yield Violation(name, f"page {page}", "is marked, but not in the list")


def nx_leaves(s: Snapshot) -> Iterator[Violation]:
    """While the mitigation is on, no huge page can be executed."""
    if not s.nx_huge_pages:
        return
    fetch = (s.sptes & np.uint64(s.x | s.nx)) == np.uint64(s.x)
    for page, entry in np.argwhere(s.leaf & fetch & (s.level > 1)[:, None]).tolist():
        yield Violation("nx leaves", spte_name(s, page * ENTRIES + entry), "is a huge page that can be executed")
