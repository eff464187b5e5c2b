"""The part of a vCPU that says in words how it translates."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

from kvmmmu._arguments import index_in
from kvmmmu._core import VcpuCore
from kvmmmu.explain import explain_walk
from kvmmmu.sptes import SpteFormat
from kvmmmu.walks import walk_result

if TYPE_CHECKING:
    from kvmmmu.vm import VM

__all__ = ["Explanations"]


class Explanations(VcpuCore):
    """What ``VCpu`` has of them: the guest's tables and those KVM built, entry by entry."""

    vm: VM

    def _cpl(self, cpl: SupportsIndex | None) -> int:
        return self.registers()[5] if cpl is None else index_in("cpl", cpl, 0, 3)

    def explain(self, gva: SupportsIndex, kind: str = "r", *, cpl: SupportsIndex | None = None) -> str:
        """Say in words how an address translates now: the guest's tables, then those KVM built.

        Nothing changes: no fault is taken, no accessed or dirty bit set.

        Parameters
        ----------
        gva : int
        kind : {"r", "w", "x"}
        cpl : int, optional
            The vCPU's own by default.
        """
        guest, built = self.walk_records(gva, kind, self._cpl(cpl))
        text = "guest tables: " + explain_walk(walk_result(guest))
        if built is None:
            return text + "\nno root is loaded: KVM has built no tables for this vCPU yet"
        shadow = self.vm.mmu == "shadow"
        title = "shadow page tables" if shadow else self.vm.mmu.upper() + " tables"
        words = explain_walk(
            walk_result(built), source="gva" if shadow else "gpa", target="host address", known=self._mmio_words
        )
        return f"{text}\n{title}: {words}"

    def _mmio_words(self, spte: int, level: int) -> str | None:
        words = SpteFormat.of(self.vm.host, self.vm.mmu).decode(spte, level=level)
        return str(words).partition(": ")[2] if words.kind == "mmio" else None
