"""Behaviour profiles: small tables of named switches, each settable alone."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, SupportsIndex, get_args

from kvmmmu._arguments import index_in
from kvmmmu.errors import ArgumentError

__all__ = ["Behaviour", "MmioScheme"]

MmioScheme = Literal["off", "zap_all", "generation", "unguarded"]

#: The engine's numbers for the schemes (MMIO_*).
MMIO_SCHEMES: Final = MappingProxyType({"off": 0, "zap_all": 1, "generation": 2, "unguarded": 3})

#: kvm.nx_huge_pages_recovery_ratio as Linux 6.1 sets it.
RECOVERY_RATIO: Final = 60

_PROFILES: Final = MappingProxyType(
    {
        "6.1": {"mmio_scheme": "generation", "tdp_mmu": True, "nx_huge_pages": False},
        "3.1": {"mmio_scheme": "zap_all", "tdp_mmu": False, "nx_huge_pages": False},
        "seed": {"mmio_scheme": "unguarded", "tdp_mmu": False, "nx_huge_pages": False},
    }
)


@dataclass(frozen=True, init=False)
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

    Raises
    ------
    ArgumentError
        For an unknown profile or an illegal value of a switch.
    """

    profile: str
    mmio_scheme: MmioScheme
    tdp_mmu: bool
    nx_huge_pages: bool
    nx_huge_pages_recovery_ratio: int

    def __init__(
        self,
        profile: str = "6.1",
        *,
        mmio_scheme: MmioScheme | None = None,
        tdp_mmu: bool | None = None,
        nx_huge_pages: bool | None = None,
        nx_huge_pages_recovery_ratio: SupportsIndex = RECOVERY_RATIO,
    ) -> None:
        if profile not in _PROFILES:
            raise ArgumentError(f"behaviour = {profile!r}: allowed are {', '.join(map(repr, _PROFILES))}")
        values: dict[str, object] = {"profile": profile, **_PROFILES[profile]}
        wanted = {"mmio_scheme": mmio_scheme, "tdp_mmu": tdp_mmu, "nx_huge_pages": nx_huge_pages}
        values.update((name, value) for name, value in wanted.items() if value is not None)
        if values["mmio_scheme"] not in MMIO_SCHEMES:
            allowed = ", ".join(map(repr, get_args(MmioScheme)))
            raise ArgumentError(f"mmio_scheme = {values['mmio_scheme']!r}: allowed are {allowed}")
        for name in ("tdp_mmu", "nx_huge_pages"):
            if not isinstance(values[name], bool):
                raise ArgumentError(f"{name} = {values[name]!r}: allowed are True and False")
        ratio = index_in("nx_huge_pages_recovery_ratio", nx_huge_pages_recovery_ratio, 0, 2**32 - 1)
        values["nx_huge_pages_recovery_ratio"] = ratio
        for name, value in values.items():
            object.__setattr__(self, name, value)
