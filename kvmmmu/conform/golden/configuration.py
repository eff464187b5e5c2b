"""What a host of a golden run is to the model, and which quirks of its emulator the runner imitates.

Everything comes from the run's own ``setup.txt``.  An artefact belongs to the emulator that KVM ran on,
not to KVM and not to any processor: it is a switch of the runner, listed in its reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from kvmmmu.behaviour import Behaviour, MmioScheme
from kvmmmu.cpu import GuestCpu, HostCpu
from kvmmmu.errors import FormatError
from kvmmmu.golden import Setup

__all__ = ["ARTEFACTS", "PROFILES", "Configuration", "configure"]

#: The behaviour profile that stands for a kernel.
PROFILES: Final = MappingProxyType({(3, 1): "3.1", (6, 1): "6.1"})

#: What each switch imitates.
ARTEFACTS: Final = MappingProxyType(
    {
        "empty_tlb": "the TLB is empty at every VM entry",
        "rsvd_alone": "a reserved-bit fault of the processor has no P bit in its error code",
        "ad_first": "the guest's A/D bits are set before the address itself is translated by the second dimension",
        "ad_unchecked": "with EPT A/D off, the guest's A/D bits are set without asking EPT for W",
        "frames_unnamed": "a writable leaf recorded as the zero page is a frame that the recorder could not name",
        "rmw_reads_first": "a read-modify-write faults as a read, and again for its store",
        "rmw_as_write": "a read-modify-write reports a write alone in the exit qualification",
        "segments_unchecked": "a store through CS is not refused",
        "pdpte_accessed": "the processor sets bit 5 of PDPTEs it reads, so that KVM refuses to load the guest's later",
        "pdpte_unchecked": "MOV CR3 does not check PDPTEs; each walk reads them from memory",
    }
)

# Intel processors before 2019 cache 44 address bits and have the L1TF flaw (Intel security advisory SA-00161).
_L1_CACHE_BITS: Final = 44


@dataclass(frozen=True)
class Configuration:
    """One host.

    Attributes
    ----------
    mmu : {"shadow", "ept", "npt"}
    host : HostCpu
    guest : GuestCpu
    behaviour : Behaviour
    pcid : bool
        The guest may set CR4.PCIDE.
    artefacts : frozenset of str
        Names from ``ARTEFACTS``.
    era : str
        The kernel, by the profile that stands for it.
    """

    mmu: Literal["shadow", "ept", "npt"]
    host: HostCpu
    guest: GuestCpu
    behaviour: Behaviour
    pcid: bool
    artefacts: frozenset[str]
    era: str

    @property
    def amd(self) -> bool:
        """An AMD host."""
        return self.host.vendor == "amd"


def configure(setup: Setup, where: str) -> Configuration:
    """The configuration of a host.

    Raises
    ------
    FormatError
        Its kernel is one that no behaviour profile stands for.
    """
    if setup.kernel not in PROFILES:
        known = " and ".join(PROFILES.values())
        raise FormatError(f"{where}: kernel {setup.kernel[0]}.{setup.kernel[1]}: golden runs of {known} can be checked")
    profile = PROFILES[setup.kernel]
    amd = setup.vendor == "amd"
    tdp = setup.on("kvm_amd.npt" if amd else "kvm_intel.ept", True)
    scheme: MmioScheme | None = None
    # KVM itself turns the parameter off where no reserved address bit is left; that rule is the model's own.
    if not setup.on("kvm.mmio_caching", True) and setup.maxphyaddr < 52:
        scheme = "off"
    ept_ad = setup.on("kvm_intel.eptad", True)
    artefacts = _artefacts(amd, tdp, ept_ad)
    features = {name: name in setup.flags for name in ("nx", "smep", "smap", "la57")}
    return Configuration(
        mmu=("npt" if amd else "ept") if tdp else "shadow",
        host=HostCpu(
            maxphyaddr=setup.maxphyaddr,
            gbpages="pdpe1gb" in setup.flags,
            l1tf=not amd,
            cache_bits=None if amd else _L1_CACHE_BITS,
            ept_ad=ept_ad,
            vendor=setup.vendor,
            la57=features["la57"],
            ad_first="ad_first" in artefacts,
            ept_checks_updates="ad_unchecked" not in artefacts,
            rsvd_alone="rsvd_alone" in artefacts,
        ),
        guest=GuestCpu(
            maxphyaddr=setup.maxphyaddr,
            gbpages="pdpe1gb" in setup.flags,
            pku="pku" in setup.flags,
            vendor=setup.vendor,
            **features,
        ),
        behaviour=Behaviour(
            profile,
            mmio_scheme=scheme,
            tdp_mmu=None if profile == "3.1" else tdp and setup.on("kvm.tdp_mmu", True),
            nx_huge_pages=setup.on("kvm.nx_huge_pages", False),
        ),
        pcid="pcid" in setup.flags,
        artefacts=artefacts,
        era=profile,
    )


def _artefacts(amd: bool, tdp: bool, ept_ad: bool) -> frozenset[str]:
    names = {"empty_tlb"}
    if amd:
        names |= {"rsvd_alone", "rmw_reads_first", "pdpte_accessed", "segments_unchecked"}
        if tdp:
            names |= {"pdpte_unchecked", "ad_first"}
    elif tdp:
        names |= {"rmw_as_write", "ad_first"}
        if not ept_ad:
            names |= {"ad_unchecked", "frames_unnamed"}
    return frozenset(names)
