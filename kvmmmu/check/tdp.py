"""The trees of the TDP MMU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvmmmu.check.links import spte_name
from kvmmmu.check.snapshot import ENTRIES, Role, Snapshot
from kvmmmu.errors import Violation


def tree(s: Snapshot) -> Iterator[Violation]:
    """Every table hangs from one entry of one root, one level down and at that entry's gfn (I3).

    Valid roots have different roles.
    """
    name = "tdp tree"
    reached: dict[int, str] = {}
    roles: dict[int, int] = {}
    root = s.tdp_roots
    while root:
        if root in reached or root >= s.top or not s.tdp[root]:
            yield Violation(name, f"page {root}", "is a root, but free, of the shadow MMU, or in the list twice")
            return
        reached[root] = "the list of roots"
        role = s.role(root)
        if not role & Role.INVALID:
            if role in roles:
                yield Violation(name, f"page {root}", f"is a second root of role {role:#x} besides {roles[role]}")
            roles[role] = root
        if s.pages["gfn"][root]:
            yield Violation(name, f"page {root}", f"is a root and begins at gfn {s.pages['gfn'][root]:#x}")
        root = int(s.pages["list_next"][root])
    waiting = list(reached)
    while waiting:
        page = waiting.pop()
        for entry in np.flatnonzero(s.link[page]).tolist():
            where, child = spte_name(s, page * ENTRIES + entry), int(s.pfn[page, entry])
            if child >= s.top or not s.tdp[child]:
                yield Violation(name, where, f"points to page {child}, which is no table of the TDP MMU")
                continue
            if child in reached:
                yield Violation(name, where, f"points to page {child}, which hangs from {reached[child]}")
                continue
            reached[child] = where
            waiting.append(child)
            if s.role(child) != s.role(page) - 1:
                yield Violation(name, where, f"role {s.role(page):#x} has a child of role {s.role(child):#x}")
            if s.pages["gfn"][child] != s.gfn[page, entry]:
                gfns = int(s.gfn[page, entry]), int(s.pages["gfn"][child])
                yield Violation(name, where, f"stands for gfn {gfns[0]:#x}, its child for {gfns[1]:#x}")
    for page in np.flatnonzero(s.tdp).tolist():
        if page not in reached:
            yield Violation(name, f"page {page}", "is a table of the TDP MMU, but hangs from no root")
