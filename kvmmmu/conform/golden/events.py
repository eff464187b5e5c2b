"""The model's tracepoints beside KVM's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

__all__ = ["all_lines", "events_differ", "lines_without_present", "structural_lines"]

_STRUCTURAL: Final = frozenset(
    "kvm_mmu_get_page kvm_mmu_prepare_zap_page kvm_mmu_sync_page kvm_mmu_unsync_page kvm_mmu_set_spte "
    "kvm_mmu_spte_requested mark_mmio_spte check_mmio_spte handle_mmio_page_fault kvm_mmu_walker_error "
    "kvm_inj_exception fast_page_fault kvm_mmu_zap_all_fast".split()
)
# A removed table of the TDP MMU logs every entry, most of them from nothing to frozen.
_FROZEN_FROM_NOTHING: Final = " old_spte 0 new_spte 5a0"
_PAGE_FAULT: Final = re.compile(r"(kvm_page_fault: .* error_code 0x)([0-9a-f]+)(.*)")
_EXIT: Final = re.compile(r"(kvm_exit: (?:PF excp|npf) rip [0-9a-f]+ info1 )([0-9a-f]+)(.*)")


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


def lines_without_present(lines: Iterable[str]) -> Iterator[str]:
    """Lines of the model as an emulator shows them whose reserved-bit faults lack P.

    The code is seen in the exit, in KVM's line for the fault, and in the walk that follows a stale mmio spte.
    """
    stale = False
    for line in lines:
        for pattern in (_PAGE_FAULT, _EXIT):
            match = pattern.fullmatch(line)
            if match and int(match[2], 16) & 8:
                line = f"{match[1]}{int(match[2], 16) & ~1:x}{match[3]}"
        if stale and line.startswith("kvm_mmu_pagetable_walk"):
            head, _, code = line.partition(" pferr ")
            number, _, flags = code.partition(" ")
            line = f"{head} pferr {int(number, 16) & ~1:x} {flags.removeprefix('P').removeprefix('|')}"
        stale = line.startswith("check_mmio_spte") and line.endswith("valid 0")
        yield line


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
