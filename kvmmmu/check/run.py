"""All invariants at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Final

from kvmmmu._core import VmCore
from kvmmmu.check import leaves, links, lists, nx, tdp, unsync
from kvmmmu.check.snapshot import Snapshot
from kvmmmu.check.tlb import tlb_entries
from kvmmmu.errors import InvariantError, Violation

__all__ = ["INVARIANTS", "check_snapshot", "check_vm"]

#: Every invariant by name.  Lists come first: the others follow chains and trust ids.
INVARIANTS: Final = MappingProxyType[str, Callable[[Snapshot], Iterator[Violation]]](
    {
        "active list": lists.active_list,
        "hash": lists.hash_chains,
        "free list": lists.free_list,
        "list blocks": lists.list_blocks,
        "used pages": lists.used_pages,
        "rmap": links.rmap,
        "page counters": links.page_counters,
        "parents": links.parents,
        "children": links.children,
        "roots": links.roots,
        "unsync": unsync.unsync_pages,
        "unsync bits": unsync.unsync_bits,
        "write protection": unsync.write_protection,
        "write tracking": unsync.write_tracking,
        "large page counts": unsync.disallow_counts,
        "writability": leaves.writability,
        "large leaves": leaves.large_leaves,
        "rights": leaves.rights,
        "frames": leaves.frames,
        "encryption": leaves.encryption,
        "mmio": leaves.mmio,
        "generation": leaves.generation,
        "dirty log": leaves.dirty_log,
        "tdp tree": tdp.tree,
        "nx list": nx.nx_list,
        "nx leaves": nx.nx_leaves,
    }
)


def check_snapshot(snapshot: Snapshot) -> list[Violation]:
    """Every violation in a copy of the state.

    An invariant that cannot even be evaluated, because what it follows leads nowhere, is violated.
    """
    found: list[Violation] = []
    for name, invariant in INVARIANTS.items():
        try:
            found += invariant(snapshot)
        except (IndexError, ValueError, KeyError, OverflowError) as e:
            found.append(Violation(name, "the whole machine", f"cannot be evaluated: {type(e).__name__}: {e}"))
    return found


def check_vm(core: VmCore, *, holes: bool = False) -> None:
    """Check every invariant; raises InvariantError with all violations, KVM's own holes only on request."""
    snapshot = Snapshot(core.snapshot())
    found = [v for v in check_snapshot(snapshot) if holes or not v.hole]
    for vcpu in range(len(snapshot.vcpus)):
        found += tlb_entries(vcpu, core.tlb_list(vcpu))
    if found:
        raise InvariantError(found)
