"""How strictly an operation is compared: outcomes, counters, trees, tracepoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from kvmmmu.conform.golden.guest import Outcomes

__all__ = ["LEVELS", "PARTS", "counters_differ", "outcomes_differ"]

#: What is counted at every level; level 2 and 3 in two parts.
PARTS: Final = MappingProxyType(
    {
        "1": "outcomes",
        "2": "counters",
        "2-flush": "counters without the two of TLB flushes",
        "3": "trees without accessed and dirty bits",
        "3-ad": "trees",
        "4": "structural tracepoints",
        "5": "all tracepoints",
    }
)
LEVELS: Final = (1, 2, 3, 4, 5)

# User space's business, or counted per instruction rather than by the MMU.
_NOT_MMU: Final = frozenset({"io_exits", "mmio_exits", "insn_emulation", "halt_exits"})
FLUSHES: Final = frozenset({"tlb_flush", "vm.remote_tlb_flush_requests"})


def outcomes_differ(expected: Sequence[tuple[str, dict[str, str]]], got: Outcomes) -> str | None:
    """None, or both sides in words."""
    if list(expected) == got:
        return None
    return f"expected {_words(expected)}; got {_words(got)}"


def _words(outcomes: Sequence[tuple[str, dict[str, str]]]) -> str:
    if not outcomes:
        return "nothing"
    return ", ".join(" ".join([what, *(f"{name}={value}" for name, value in f.items())]) for what, f in outcomes)


def counters_differ(expected: Mapping[str, int], got: Mapping[str, int], *, flushes: bool) -> str | None:
    """None, or the counters that differ."""
    skipped = _NOT_MMU if flushes else _NOT_MMU | FLUSHES
    parts = [
        f"{name} expected {expected.get(name, 0)} got {got.get(name, 0)}"
        for name in sorted(set(expected) | set(got))
        if name not in skipped and expected.get(name, 0) != got.get(name, 0)
    ]
    return ", ".join(parts) or None
