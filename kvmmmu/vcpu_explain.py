"""The part of a vCPU that says in words how it translates."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

from kvmmmu._arguments import index_in, index_u64
from kvmmmu._core import VcpuCore
from kvmmmu.constants import TABLE
from kvmmmu.explain import explain_walk
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
            walk_result(built),
            source="gva" if shadow else "gpa",
            target="host address",
            known=self._mmio_words,
            ve=self.vm.tdx and bool(self.registers()[0] & TABLE["CR0_PE"]),
        )
        return f"{text}\n{title}: {words}"

    def explain_sptes(self, address: SupportsIndex) -> str:
        """Say in words which sptes KVM's lockless walk of an address meets, root first.

        It is what KVM (handle_mmio_page_fault) prints when reserved bits are set in an spte that it made itself, before
        KVM_RUN fails: after an access that ended in ``Outcome.ERROR`` with errno 22 the entries still stand.

        Parameters
        ----------
        address : int
            What the processor looks up in KVM's tables: a gva under shadow paging, a gpa under EPT and NPT.

        Raises
        ------
        OverflowError
            ``address`` is outside 0…2^64−1.
        """
        word = index_u64("address", address)
        title = f"sptes of {'gva' if self.vm.mmu == 'shadow' else 'gpa'} {word:#x}"
        sptes = self.walk_sptes(word)
        if not sptes:
            return f"{title}: KVM has built no tables for this address"
        form = self.vm.spte_format
        lines = [f"{title}:"]
        for level, spte, reserved in sptes:
            words = form.decode(spte, level=level)
            if reserved:  # by the rules of these tables, which PAE paging has more of
                words.facts["reserved bits"] = f"{reserved:#x}"
            lines.append(str(words))
        return "\n  ".join(lines)

    def _mmio_words(self, spte: int, level: int) -> str | None:
        words = self.vm.spte_format.decode(spte, level=level)
        return str(words).partition(": ")[2] if words.kind == "mmio" else None
