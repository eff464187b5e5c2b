"""The sptes behind a vCPU's address, in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsIndex

from kvmmmu._arguments import index_u64
from kvmmmu._core import VcpuCore
from kvmmmu.sptes import SpteFormat

if TYPE_CHECKING:
    from kvmmmu.vm import VM

__all__ = ["SptesInWords"]


class SptesInWords(VcpuCore):
    """What ``VCpu`` says of KVM's own entries."""

    vm: VM

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
        form = self._spte_format()
        lines = [f"{title}:"]
        for level, spte, reserved in sptes:
            words = form.decode(spte, level=level)
            if reserved:  # by the rules of these tables, which PAE paging has more of
                words.facts["reserved bits"] = f"{reserved:#x}"
            lines.append(str(words))
        return "\n  ".join(lines)

    def _mmio_words(self, spte: int, level: int) -> str | None:
        words = self._spte_format().decode(spte, level=level)
        return str(words).partition(": ")[2] if words.kind == "mmio" else None

    def _spte_format(self) -> SpteFormat:
        return SpteFormat.of(self.vm.host, self.vm.mmu, mmio_caching=self.vm.behaviour.mmio_scheme != "off")
