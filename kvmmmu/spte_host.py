"""What of a host decides how its sptes look."""

from __future__ import annotations

from typing import Protocol

__all__ = ["SpteHost"]


class SpteHost(Protocol):
    """What of a host CPU decides the layout of its sptes; ``HostCpu`` is one."""

    @property
    def maxphyaddr(self) -> int:
        """CPUID's MAXPHYADDR, before memory-encryption key bits are taken away."""

    @property
    def phys_bits(self) -> int | None:
        """Address bits left for memory; None: all of them."""

    @property
    def l1tf(self) -> bool:
        """The CPU has the L1TF flaw."""

    @property
    def cache_bits(self) -> int | None:
        """Address bits the L1 cache compares; None: as many as ``phys_bits``."""

    @property
    def ept_ad(self) -> bool:
        """EPT sets accessed and dirty bits."""

    @property
    def ept_exec_only(self) -> bool:
        """EPT allows execute-only entries."""

    @property
    def gbpages(self) -> bool:
        """Ordinary and nested (NPT) tables have 1 GiB pages."""

    @property
    def ept_2m(self) -> bool:
        """EPT has 2 MiB pages."""

    @property
    def ept_1g(self) -> bool:
        """EPT has 1 GiB pages."""

    @property
    def c_bit(self) -> int | None:
        """The address bit that marks encrypted memory; None: memory cannot be encrypted."""

    @property
    def sme(self) -> bool:
        """Where there is such a bit: the host's kernel sets it, also in KVM's own tables."""

    @property
    def mmio_masks(self) -> tuple[int, int, int] | None:
        """Value, mask and access mask of mmio sptes set by hand; None: what the host would choose."""
