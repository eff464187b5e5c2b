"""Counters under KVM's names, read live from the engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kvmmmu._core import VCPU_STATS_ORDER, VM_STATS_ORDER, VmCore

__all__ = ["TLB_COUNTERS", "VCpuStats", "VmStats"]

#: Not KVM's: what a processor with a ``Tlb`` did.
TLB_COUNTERS = (
    "tlb_hit",
    "tlb_miss",
    "tlb_nested_hit",
    "tlb_nested_miss",
    "walk_cache_hit",
    *(f"{walk}_l{level}" for walk in ("walk_refs", "nested_walk_refs") for level in range(1, 6)),
)
_VM_INDEX = {name: i for i, name in enumerate(VM_STATS_ORDER)}
_VCPU_INDEX = {name: i for i, name in enumerate(VCPU_STATS_ORDER)}


class VmStats(Mapping[str, int]):
    """Counters of a VM; those of its vCPUs appear here added up.

    Read-only.  Values are live; a copy (``dict(vm.stats)``) is consistent when no vCPU runs.
    ``mmu_unsync``, ``pages_4k``, ``pages_2m``, ``pages_1g`` and ``nx_lpage_splits`` are levels,
    ``max_*`` are peaks, all others only grow.
    """

    def __init__(self, core: VmCore) -> None:
        self._core = core

    def __getitem__(self, name: str) -> int:
        if name in _VM_INDEX:
            return self._core.vm_stats()[_VM_INDEX[name]]
        return self._core.vcpu_stats(-1)[_VCPU_INDEX[name]]

    def __iter__(self) -> Iterator[str]:
        yield from VM_STATS_ORDER
        yield from VCPU_STATS_ORDER

    def __len__(self) -> int:
        return len(VM_STATS_ORDER) + len(VCPU_STATS_ORDER)

    def __repr__(self) -> str:
        return f"VmStats({ {name: count for name, count in self.items() if count} })"


class VCpuStats(Mapping[str, int]):
    """Counters of one vCPU; read-only and live."""

    def __init__(self, core: VmCore, vcpu_id: int) -> None:
        # Not the vCPU itself: a circle would keep the VM and its memory until the garbage collector comes by.
        self._core = core
        self._id = vcpu_id

    def __getitem__(self, name: str) -> int:
        return self._core.vcpu_stats(self._id)[_VCPU_INDEX[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(VCPU_STATS_ORDER)

    def __len__(self) -> int:
        return len(VCPU_STATS_ORDER)

    def __repr__(self) -> str:
        return f"VCpuStats({ {name: count for name, count in self.items() if count} })"
