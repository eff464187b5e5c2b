"""The model's tracepoints beside KVM's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Final

__all__ = ["all_lines", "events_differ", "structural_lines"]

_STRUCTURAL: Final = frozenset(
    "kvm_mmu_get_page kvm_mmu_prepare_zap_page kvm_mmu_sync_page kvm_mmu_unsync_page kvm_mmu_set_spte "
    "kvm_mmu_spte_requested mark_mmio_spte check_mmio_spte handle_mmio_page_fault kvm_mmu_walker_error "
    "kvm_inj_exception fast_page_fault kvm_mmu_zap_all_fast".split()
)
# A removed table of the TDP MMU logs every entry, most of them from nothing to frozen.
_FROZEN_FROM_NOTHING: Final = " old_spte 0 new_spte 5a0"


def structural_lines(lines: Iterable[str]) -> list[str]:
    """Lines about tables, sptes and injected faults."""
    return [line for line in lines if line.partition(":")[0] in _STRUCTURAL]


def all_lines(lines: Iterable[str]) -> list[str]:
    """Every line but the recordings' noise."""
    return [
        line
        for line in lines
        if not (line.startswith("kvm_tdp_mmu_spte_changed") and line.endswith(_FROZEN_FROM_NOTHING))
    ]


def events_differ(expected: Sequence[str], got: Sequence[str], *, livelock: bool) -> str | None:
    """None, or the first differing lines with those around them.

    Of a livelock only a beginning was recorded, and the model stops somewhere: the shorter is compared.
    """
    if livelock:
        both = min(len(expected), len(got))
        expected, got = expected[:both], got[:both]
    if list(expected) == list(got):
        return None
    lines = difflib.unified_diff(expected, got, "expected", "got", lineterm="", n=2)
    shown = [line for i, line in enumerate(lines) if 2 <= i < 26]
    return "\n    " + "\n    ".join(shown)
