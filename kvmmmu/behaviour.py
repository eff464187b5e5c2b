"""Behaviour profiles: small tables of named switches, each settable alone."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, Literal, SupportsIndex, get_args

from kvmmmu._arguments import index_in
from kvmmmu.constants import TABLE
from kvmmmu.errors import ArgumentError

__all__ = ["SWITCHES", "Behaviour", "MmioScheme"]

MmioScheme = Literal["off", "zap_all", "generation", "unguarded"]

#: The engine's numbers for the schemes (MMIO_*).
MMIO_SCHEMES: Final = MappingProxyType({"off": 0, "zap_all": 1, "generation": 2, "unguarded": 3})

#: kvm.nx_huge_pages_recovery_ratio as Linux 6.1 sets it.
RECOVERY_RATIO: Final = 60

#: Decisions that kernels of 2011 take otherwise: what each switch turns on.  The engine reads them as bits ``ERA_*``.
SWITCHES: Final = MappingProxyType(
    {
        "mmio_wide": "mmio sptes carry every bit from the host's MAXPHYADDR to 62 (EPT: 49 to 56), and no generation",
        "mmio_constant": "mmio sptes carry bits 49 to 56 and bit 0 on every host",
        "mmio_miss_faults": "a reserved-bit fault that finds no mmio spte goes on as an ordinary fault",
        "mmio_bug_other": "a reserved-bit fault of a direct table is a bug unless its spte is mmio or empty",
        "mmio_bug_present": "a reserved-bit fault of a direct table is a bug if its spte is present",
        "mmio_survives": "INVLPG and the synchronising of tables leave mmio sptes alone",
        "cache_simple": "the vCPU's record of the last MMIO page is checked by W, U and CR0.WP alone",
        "entry_installs": "an emulated store to a last-level table installs the new entry, an mmio spte too",
        "invlpg_rewrites": "INVLPG brings every page of the table up to date, as an emulated store would",
        "sync_empty_zaps": "synchronising a table that maps nothing any more zaps it",
        "accessed_early": "KVM's walk sets A bits level by level, down to the first level that refuses",
        "pdptes_fresh": "KVM reads the PDPTEs of an SVM guest from memory at each walk of its own",
        "pdpte_lax": "bits 5 and 6 of a PDPTE are not reserved",
        "path_access": "every page of a walk carries the rights of the whole path, not of the levels above it",
        "protect_late": "a store to a shadowed table maps the page first and is then emulated",
        "protect_drops_large": "write-protecting a gfn drops writable large leaves instead of protecting them",
        "prefetch_unsync": "entries filled ahead may make a table unsync",
        "prefetch_skips": "filling ahead skips unusable guest entries instead of ending there",
        "prefetch_no_tail": "filling direct pages ahead leaves out what follows the last present entry of the window",
        "lookup_syncs": "unsync pages of a gfn that becomes an upper table are synchronised instead of zapped",
        "flood_by_vcpu": "repeated stores to one table are counted by the vCPU, at every level",
        "dirty_by_cpu": "D is left to the processor, and survives rewriting an entry",
        "log_whole_slot": "dirty logging write-protects whole shadow pages of a slot, and drops large leaves",
        "wp0_unlogged": "a store under CR0.WP=0 to a read-only page is not entered in the dirty log",
        "zap_at_once": "zapping all goes through the pages, newest first, without a generation of valid pages",
        "nx_by_guest": "the processor runs with the guest's EFER.NX; roles learn it by WRMSR only",
        "one_root": "no previous roots are kept",
        "cr3_needs_slot": "CR3 must point into a slot, else #GP",
        "cr0_lax": "paging may be switched off from 64-bit code",
        "cr4_strict": "SMAP, PKE, PCIDE and LA57 are unknown bits; PGE resets the context",
        "no_retry": "an instruction is always emulated, never resumed after unprotecting its page",
        "fetch_fault_fails": "an instruction KVM cannot fetch fails for users too, or resumes where data has memory",
        "no_shortcut": "the emulator walks the guest's tables even where the fault told the address",
        "mmio_whole": "an MMIO read is one piece whatever pages it crosses; of a crossing write the last piece leaves",
        "fault_keeps": "injecting a page fault drops no stale leaf",
        "rmw_fault_reads": "the read of a read-modify-write faults as a read",
        "no_fast_fault": "no lockless repair of write-protected leaves",
        "role_plain": "direct pages have no guest entry size in their role; CR0.WP is in it without paging too",
        "count_old": "pf_fixed counts every mapping made, tlb_flush the flushes a vCPU asks for itself",
    }
)

_OF_2011: Final = frozenset(SWITCHES) - {
    *("mmio_wide", "mmio_constant", "mmio_miss_faults", "mmio_bug_other", "mmio_bug_present", "mmio_survives")
}
_PROFILES: Final = MappingProxyType(
    {
        "6.1": ("generation", True, frozenset[str]()),
        "3.1": ("zap_all", False, _OF_2011 | {"mmio_wide", "mmio_bug_other"}),
        "seed": (
            "unguarded",
            False,
            _OF_2011 | {"mmio_constant", "mmio_miss_faults", "mmio_bug_present", "mmio_survives"},
        ),
    }
)


class Behaviour:
    """What one era of KVM does, switch by switch.

    Parameters
    ----------
    profile : {"6.1", "3.1", "seed"}
        Linux 6.1; Linux 3.1, the first with MMIO faults cached in sptes; the patch as
        first mailed on 2011-06-22.
    mmio_scheme : {"off", "zap_all", "generation", "unguarded"}, optional
        How cached MMIO faults are kept right when slots change: nothing is cached; every
        shadow page is zapped (Linux 3.1); a generation number in the spte (Linux 3.14 and
        later); not at all (the mail).
    tdp_mmu : bool, optional
        EPT and NPT tables belong to the TDP MMU rather than to the shadow MMU's direct pages.
    nx_huge_pages : bool, optional
        Huge mappings are not executable (the iTLB multihit mitigation).
    nx_huge_pages_recovery_ratio : int
        One in how many of the tables that this costs a period of recovery zaps; 0 none.
    switches : bool
        Any of ``kvmmmu.behaviour.SWITCHES``, each on or off whatever the profile says.

    Attributes
    ----------
    switches : frozenset of str
        Those that are on.

    Raises
    ------
    ArgumentError
        For an unknown profile or switch, or an illegal value of one.
    """

    profile: str
    mmio_scheme: MmioScheme
    tdp_mmu: bool
    nx_huge_pages: bool
    nx_huge_pages_recovery_ratio: int
    switches: frozenset[str]

    def __init__(
        self,
        profile: str = "6.1",
        *,
        mmio_scheme: MmioScheme | None = None,
        tdp_mmu: bool | None = None,
        nx_huge_pages: bool | None = None,
        nx_huge_pages_recovery_ratio: SupportsIndex = RECOVERY_RATIO,
        **switches: bool,
    ) -> None:
        if profile not in _PROFILES:
            raise ArgumentError(f"behaviour = {profile!r}: allowed are {', '.join(map(repr, _PROFILES))}")
        scheme, tdp, on = _PROFILES[profile]
        scheme = scheme if mmio_scheme is None else mmio_scheme
        if scheme not in MMIO_SCHEMES:
            allowed = ", ".join(map(repr, get_args(MmioScheme)))
            raise ArgumentError(f"mmio_scheme = {scheme!r}: allowed are {allowed}")
        named = {"tdp_mmu": tdp_mmu, "nx_huge_pages": nx_huge_pages}
        for name, value in {**named, **switches}.items():
            if name not in SWITCHES and name not in named:
                raise ArgumentError(f"switch {name!r} is unknown: allowed are {', '.join([*named, *SWITCHES])}")
            if value is not None and not isinstance(value, bool):
                raise ArgumentError(f"{name} = {value!r}: allowed are True and False")
        on = (on | {name for name, value in switches.items() if value}) - {
            name for name, value in switches.items() if not value
        }
        # A host has one mask: naming one of them replaces the profile's.
        if switches.get("mmio_wide") and not switches.get("mmio_constant"):
            on -= {"mmio_constant"}
        ratio = index_in("nx_huge_pages_recovery_ratio", nx_huge_pages_recovery_ratio, 0, 2**32 - 1)
        set_ = object.__setattr__
        set_(self, "profile", profile)
        set_(self, "mmio_scheme", scheme)
        set_(self, "tdp_mmu", tdp if tdp_mmu is None else tdp_mmu)
        set_(self, "nx_huge_pages", bool(nx_huge_pages))
        set_(self, "nx_huge_pages_recovery_ratio", ratio)
        set_(self, "switches", frozenset(on))

    @property
    def bits(self) -> int:
        """The switches as the engine reads them."""
        return sum(TABLE[f"ERA_{name.upper()}"] for name in self.switches)

    def changed(
        self,
        *,
        mmio_scheme: MmioScheme | None = None,
        tdp_mmu: bool | None = None,
        nx_huge_pages: bool | None = None,
    ) -> Behaviour:
        """This behaviour with other values."""
        return Behaviour(
            self.profile,
            mmio_scheme=self.mmio_scheme if mmio_scheme is None else mmio_scheme,
            tdp_mmu=self.tdp_mmu if tdp_mmu is None else tdp_mmu,
            nx_huge_pages=self.nx_huge_pages if nx_huge_pages is None else nx_huge_pages,
            nx_huge_pages_recovery_ratio=self.nx_huge_pages_recovery_ratio,
            **{name: name in self.switches for name in SWITCHES},
        )

    def _key(self) -> tuple[object, ...]:
        ratio = self.nx_huge_pages_recovery_ratio
        return self.profile, self.mmio_scheme, self.tdp_mmu, self.nx_huge_pages, ratio, self.switches

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Behaviour cannot be changed: {name}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Behaviour) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        on = "".join(f", {name}=True" for name in sorted(self.switches - _PROFILES[self.profile][2]))
        off = "".join(f", {name}=False" for name in sorted(_PROFILES[self.profile][2] - self.switches))
        return (
            f"Behaviour({self.profile!r}, mmio_scheme={self.mmio_scheme!r}, tdp_mmu={self.tdp_mmu}, "
            f"nx_huge_pages={self.nx_huge_pages}, "
            f"nx_huge_pages_recovery_ratio={self.nx_huge_pages_recovery_ratio}{on}{off})"
        )
