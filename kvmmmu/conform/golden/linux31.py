"""How recordings of Linux 3.1 write what the model says: counters, role words, tables, tracepoints.

The tracepoints' own rendering is ``kvmmmu.events31``; here stands what recordings leave out or put differently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from kvmmmu.constants import TABLE
from kvmmmu.events31 import role_31
from kvmmmu.golden.results import TableEntry, TablePage

__all__ = ["counters", "lines", "tree"]

#: The counters that Linux 3.1 has and that do not count user space's business.
_COUNTERS: Final = frozenset(
    "pf_fixed pf_guest tlb_flush invlpg mmio_exits insn_emulation insn_emulation_fail vm.mmu_shadow_zapped "
    "vm.mmu_pte_write vm.mmu_pte_updated vm.mmu_pde_zapped vm.mmu_flooded vm.mmu_recycled vm.mmu_cache_miss "
    "vm.mmu_unsync vm.largepages".split()
)
_MMIO: Final = re.compile(r"^(kvm_mmio: mmio \S+ len (\d+) gpa \S+ val 0x)([0-9a-f]+)$")
_FIELDS: Final = ("gfn", "role", "unsync", "root_count", "unsync_children")
# KVM's own notes in an spte that Linux 3.1 does not make.
_LATER: Final = TABLE["SPTE_MMU_PRESENT"] | TABLE["SPTE_MMU_WRITABLE_LEGACY"]


def counters(model: Mapping[str, int]) -> dict[str, int]:
    """The model's counters as Linux 3.1 keeps them: large pages are counted together."""
    both = dict(model)
    both["vm.largepages"] = both.get("vm.pages_2m", 0) + both.get("vm.pages_1g", 0)
    return {name: count for name, count in both.items() if name in _COUNTERS}


def lines(recorded: Sequence[str]) -> list[str]:
    """Tracepoints with the value of an MMIO access cut to its length.

    Linux 3.1 prints eight bytes from where the data are; those behind them are left over from earlier accesses.
    """
    return [_MMIO.sub(_cut, line) for line in recorded]


def _cut(match: re.Match[str]) -> str:
    return f"{match[1]}{int(match[3], 16) & (1 << 8 * int(match[2])) - 1:x}"


def tree(pages: Sequence[TablePage]) -> tuple[TablePage, ...]:
    """Tables with 3.1's role words, without fields and software bits of later kernels."""
    return tuple(
        TablePage(
            page.id,
            page.level,
            None
            if page.fields is None
            else MappingProxyType(
                {name: role_31(page.fields[name]) if name == "role" else page.fields[name] for name in _FIELDS}
            ),
            tuple(
                TableEntry(e.index, e.address, e.spte if e.kind == "mmio" else e.spte & ~_LATER, e.kind, e.ref)
                for e in page.entries
            ),
        )
        for page in pages
    )
