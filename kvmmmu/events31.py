"""Tracepoints as Linux 3.1 prints them: fewer, and with fewer fields."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

__all__ = ["PRINTED", "page_31", "role_31"]

#: The tracepoints that Linux 3.1 has (``arch/x86/kvm/mmutrace.h`` and ``trace.h`` of that kernel name them).
PRINTED: Final = frozenset(
    "kvm_mmu_pagetable_walk kvm_mmu_paging_element kvm_mmu_set_accessed_bit kvm_mmu_set_dirty_bit "
    "kvm_mmu_walker_error kvm_mmu_get_page kvm_mmu_sync_page kvm_mmu_unsync_page kvm_mmu_prepare_zap_page "
    "mark_mmio_spte handle_mmio_page_fault kvm_age_page kvm_page_fault vcpu_match_mmio kvm_mmio kvm_inj_exception "
    "kvm_emulate_insn kvm_exit kvm_cr kvm_msr".split()
)

_ACCESS: Final = ("---", "--x", "w--", "w-x", "-u-", "-ux", "wu-", "wux")

# Bits of Linux 6.1's role word and of Linux 3.1's: (there, width, here).
_MOVED: Final = ((0, 4, 0), (5, 2, 5), (7, 1, 13), (8, 3, 14), (11, 1, 17), (12, 1, 18), (13, 1, 19), (14, 1, 20))
_LEVEL: Final = 15
_DIRECT: Final = 1 << 7
_FOUR_BYTE_GPTE: Final = 1 << 4
_CR4_PAE: Final = 1 << 4
_LETTERS: Final = MappingProxyType({"access": 14, "invalid": 17, "nxe": 18})


def role_31(role: int) -> int:
    """A role word in Linux 3.1's layout, which says "PAE entries" where later ones say "4-byte entries"."""
    word = sum((role >> there & (1 << width) - 1) << here for there, width, here in _MOVED)
    if not role & (_FOUR_BYTE_GPTE | _DIRECT):
        word |= _CR4_PAE
    return word


def page_31(gfn: int, role: int, root_count: int, unsync: bool) -> str:
    """The text of a shadow page."""
    word = role_31(role)
    parts = (
        f"sp gfn {gfn:x} {word & _LEVEL}{' pae' if word & _CR4_PAE else ''} q{word >> 5 & 3}",
        " direct" if role & _DIRECT else "",
        f" {_ACCESS[word >> _LETTERS['access'] & 7]}",
        " invalid" if word >> _LETTERS["invalid"] & 1 else "",
        " nxe" if word >> _LETTERS["nxe"] & 1 else " !nxe",
        f" root {root_count} {'unsync' if unsync else 'sync'}",
    )
    return "".join(parts)
