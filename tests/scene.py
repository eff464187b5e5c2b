"""A guest with one device page, watched from every side: outcome, counters, tracepoints, and the spte itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import kvmmmu as km
from kvmmmu.sptes import MmioSpte, SpteFormat
from machine import DATA, FLAT, LONG, MMIO, P32, PAE3, USER, Machine, Mode

OK, IO, PF, HANG = km.Outcome.OK, km.Outcome.MMIO, km.Outcome.PF, km.Outcome.HANG

#: What can happen on the way of an MMIO access.
TRACED = (
    "mark_mmio_spte",
    "check_mmio_spte",
    "handle_mmio_page_fault",
    "vcpu_match_mmio",
    "kvm_mmu_set_spte",
    "kvm_mmu_zap_all_fast",
    "kvm_inj_exception",
    "kvm_mmu_prepare_zap_page",
)
COUNTED = (
    "pf_taken",
    "pf_fixed",
    "pf_emulate",
    "pf_spurious",
    "pf_mmio_spte_created",
    "pf_guest",
    "mmio_exits",
    "mmio_cache_hit",
    "mmio_spte_hit",
    "mmio_slow",
    "mmu_shadow_zapped",
)
#: An access that searched the slots, and left an mmio spte or none; one that the vCPU's record answered; one that
#: the spte answered.
SLOW = {"pf_taken": 1, "pf_emulate": 1, "pf_mmio_spte_created": 1, "mmio_exits": 1, "mmio_slow": 1}
SLOW_WITHOUT_SPTE = {"pf_taken": 1, "pf_emulate": 1, "mmio_exits": 1, "mmio_slow": 1}
FROM_CACHE = {"mmio_exits": 1, "mmio_cache_hit": 1}
FROM_SPTE = {"mmio_exits": 1, "mmio_spte_hit": 1}
#: The page was mapped.
MAPPED = {"pf_taken": 1, "pf_fixed": 1}


@dataclass(frozen=True)
class Flavour:
    """One of KVM's MMUs and a paging mode of the guest."""

    mmu: str
    mode: Mode = LONG
    tdp_mmu: bool = True

    @property
    def direct(self) -> bool:
        """No guest table stands behind KVM's."""
        return self.mmu != "shadow" or self.mode is FLAT

    @property
    def by_gva(self) -> bool:
        """The vCPU's record keeps a gva besides the gfn."""
        return self.mmu == "shadow"

    def __str__(self) -> str:
        return f"{self.mmu}{'' if self.mmu == 'shadow' else int(self.tdp_mmu)}-{self.mode.name}"


SHADOW = tuple(Flavour("shadow", mode) for mode in (LONG, PAE3, P32))
TDP = tuple(Flavour(mmu, LONG, tdp_mmu) for mmu in ("ept", "npt") for tdp_mmu in (True, False))
FLAVOURS = (*SHADOW, Flavour("shadow", FLAT), *TDP)


@dataclass(frozen=True)
class Step:
    """One access and everything it did."""

    result: km.AccessResult
    counted: dict[str, int]
    events: list[str]

    @property
    def outcome(self) -> km.Outcome:
        """What became of it."""
        return self.result.outcome

    def of(self, *names: str) -> list[str]:
        """The lines of some tracepoints, in order."""
        return [line for line in self.events if line.partition(":")[0] in names]


class Scene(Machine):
    """``gva`` is mapped to ``gpa``; what the guest needs to get there has been touched already."""

    def __init__(self, flavour: Flavour, gpa: int = MMIO, bits: int = USER, **how: Any) -> None:
        self.flavour = flavour
        super().__init__(flavour.mmu, flavour.mode, tdp_mmu=flavour.tdp_mmu, **how)
        self.gpa = gpa
        self.gva = self.at(0, gpa, bits)
        # A neighbour outside the window of a prefetch brings the tables in.
        if flavour.mode.levels:
            self.at(16, DATA)
            assert self.access(self.mode.user + 16 * 4096).outcome is OK
        self.vm.events.enable(TRACED)

    def at(self, page: int, gpa: int, bits: int = USER) -> int:
        """Map a page beside the scene's; without paging an address is where it is."""
        if not self.mode.levels:
            return gpa
        self.map(self.mode.user + page * 4096, gpa, bits)
        return self.mode.user + page * 4096

    def another_vcpu(self) -> None:
        """The next steps are those of a vCPU that has just been made and touched the neighbour."""
        self.vcpu = self.vm.create_vcpu(self.vcpu.cpu)
        self.start()
        if self.mode.levels:
            assert self.access(self.mode.user + 16 * 4096).outcome is OK
        self.vm.events.drain()

    def step(self, kind: str = "r", gva: int | None = None, **how: Any) -> Step:
        """One access; every invariant is checked after it."""
        self.vm.events.drain()
        count = self.count(*COUNTED)
        result = self.access(self.gva if gva is None else gva, kind, **how)
        return Step(result, count.grown(), self.vm.events.text(self.vm.events.drain()).splitlines())

    # -- what the tables hold

    @property
    def key(self) -> int:
        """The address by which KVM's tables know the page."""
        return self.gpa if self.flavour.direct else self.gva

    def spte(self, address: int | None = None) -> int:
        """The level-1 spte of a page under the current root, 0 if it is empty or has no table."""
        where = (self.key if address is None else address) & ~0xFFF
        found = [e.spte for page in self.vm.page_tables(self.vcpu) if page.level == 1 for e in page.entries
                 if e.address == where]  # fmt: skip
        assert len(found) < 2
        return found[0] if found else 0

    @property
    def format(self) -> SpteFormat:
        """Where this host's sptes keep what."""
        return SpteFormat.of(self.vm.host, self.vm.mmu)

    def mmio_spte(self, address: int | None = None) -> MmioSpte | None:
        """What the page's mmio spte carries, None where the entry is none."""
        spte = self.spte(address)
        return self.format.mmio_decode(spte) if spte and self.format.is_mmio(spte) else None

    @property
    def kept(self) -> int:
        """Access bits that an mmio spte of a page with all rights keeps."""
        return 0 if self.vm.mmu == "ept" else 6

    # -- lines that tracepoints print

    def marked(self, generation: int, rights: int = 7) -> str:
        """An mmio spte was written; the low three bits are shown as they stand in it."""
        access = 6 if self.vm.mmu == "ept" else rights
        return f"mark_mmio_spte: gfn {self.gpa >> 12:x} access {access:x} gen {generation:x}"

    def matched(self, half: str | None = None, kind: str = "Read") -> str:
        """The vCPU's record gave the emulator the address."""
        half = half or ("GPA" if self.flavour.direct else "GVA")
        return f"vcpu_match_mmio: gva {self.gva:#x} gpa {self.gpa:#x} {kind} {half}"

    def checked(self, now: int, then: int) -> str:
        """A generation was compared."""
        spte = self.format.mmio_encode(self.gpa >> 12, self.kept, then)
        return f"check_mmio_spte: spte {spte:x} kvm_gen {now:x} spte-gen {then:x} valid {int(now == then)}"

    def handled(self) -> str:
        """An mmio spte answered."""
        address = 0 if self.flavour.direct else self.gva
        return f"handle_mmio_page_fault: addr:{address:x} gfn {self.gpa >> 12:x} access {self.kept:x}"


def page(value: int = 0) -> np.ndarray[Any, Any]:
    """Memory for a slot of one page."""
    return np.full(4096, value, np.uint8)
