"""A virtual processor of a VM."""

from __future__ import annotations

from kvmmmu._core import VcpuCore
from kvmmmu.stats import VCpuStats

__all__ = ["VCpu"]


class VCpu:
    """A vCPU; made by ``VM.create_vcpu``."""

    def __init__(self, core: VcpuCore) -> None:
        self._core = core
        #: Counters of this vCPU.
        self.stats = VCpuStats(core)

    @property
    def id(self) -> int:
        """Number of the vCPU, from 0 in order of creation."""
        return self._core.id
