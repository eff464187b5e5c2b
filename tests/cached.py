"""Machines whose vCPUs cache translations, and what an access costs there."""

from __future__ import annotations

from typing import Any

import pytest

import kvmmmu as km
from machine import DATA, LONG, MMUS, Machine, Mode

OK, IO, PF = km.Outcome.OK, km.Outcome.MMIO, km.Outcome.PF
TDP = ("ept", "npt")
mmus = pytest.mark.parametrize("mmu", MMUS)
tdp = pytest.mark.parametrize("mmu", TDP)
PAGE, LARGE = 0x1000, 0x20_0000
OTHER = DATA + 0x10_0000
#: No array but the smallest that there must be: each access walks every level.
BARE = km.Tlb((1, 1), None, None, None, None, None, None, None, None)


def machine(mmu: str = "ept", mode: Mode = LONG, *, tlb: km.Tlb | None = None, cr4: int = 0, **how: Any) -> Machine:
    m = Machine(mmu, mode, tlb=tlb or km.Tlb(), start=False, **how)
    m.start(cr4=mode.cr4 | cr4)
    return m


def references(m: Machine) -> int:
    return sum(count for name, count in m.vcpu.stats.items() if "walk_refs" in name)


def cost(m: Machine, gva: int, kind: str = "r") -> int:
    """Table entries read by one access that needs no exit; -1: it was a hit."""
    before, hits = references(m), m.vcpu.stats["tlb_hit"]
    result = m.access(gva, kind)
    assert (result.outcome, result.exits) == (OK, 0)
    if m.vcpu.stats["tlb_hit"] > hits:
        assert references(m) == before
        return -1
    return references(m) - before


def behind(m: Machine, gva: int, value: int, level: int = 1, cr3: int | None = None) -> None:
    """Change an entry where no cache and no KVM sees it: a store from elsewhere."""
    m.poke(m.entry_gpa(gva, level, cr3), value)
