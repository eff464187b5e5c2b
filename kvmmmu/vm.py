"""The virtual machine: memory, MMU, counters, events."""

from __future__ import annotations

from types import MappingProxyType, TracebackType
from typing import Final, Literal, Self, get_args

from kvmmmu._core import VmCore
from kvmmmu.behaviour import MMIO_SCHEMES, Behaviour, MmioScheme
from kvmmmu.check import check_vm
from kvmmmu.cpu import GuestCpu, HostCpu
from kvmmmu.errors import ArgumentError
from kvmmmu.events import Events
from kvmmmu.memslots import MemSlots
from kvmmmu.mmio import Mmio
from kvmmmu.stats import VmStats
from kvmmmu.vcpu import VCpu

__all__ = ["VM"]

Mmu = Literal["shadow", "ept", "npt"]
_MMUS: Final = MappingProxyType({"shadow": 0, "ept": 1, "npt": 2})


class VM:
    """A virtual machine with KVM's MMU.

    Parameters
    ----------
    mmu : {"shadow", "ept", "npt"}
        How guest memory is virtualised: shadow page tables, or the second dimension of Intel or AMD.
    host : HostCpu, optional
        The processor KVM runs on.
    behaviour : str or Behaviour
        The era; "6.1" by default.
    mmio_scheme, tdp_mmu, nx_huge_pages : optional
        Single switches of the behaviour, see ``Behaviour``.

    Attributes
    ----------
    memslots : MemSlots
        Guest memory.
    stats : VmStats
        Counters under KVM's names.
    events : Events
        Tracepoints.
    mmio : Mmio
        Devices that complete MMIO accesses.

    Raises
    ------
    ArgumentError
        An option is unknown or does not suit the others.
    MemoryError
        About 10 GiB of address space (not memory) cannot be reserved.

    Notes
    -----
    Methods may be called from any thread.  A VM is a context manager; leaving it closes it.
    """

    def __init__(
        self,
        mmu: Mmu = "shadow",
        *,
        host: HostCpu | None = None,
        behaviour: str | Behaviour = "6.1",
        mmio_scheme: MmioScheme | None = None,
        tdp_mmu: bool | None = None,
        nx_huge_pages: bool | None = None,
    ) -> None:
        if mmu not in _MMUS:
            raise ArgumentError(f"mmu = {mmu!r}: allowed are {', '.join(map(repr, get_args(Mmu)))}")
        host = HostCpu() if host is None else host
        if not isinstance(host, HostCpu):
            raise TypeError(f"host must be a HostCpu, not {type(host).__name__}")
        if isinstance(behaviour, Behaviour):
            behaviour = Behaviour(
                behaviour.profile,
                mmio_scheme=behaviour.mmio_scheme if mmio_scheme is None else mmio_scheme,
                tdp_mmu=behaviour.tdp_mmu if tdp_mmu is None else tdp_mmu,
                nx_huge_pages=behaviour.nx_huge_pages if nx_huge_pages is None else nx_huge_pages,
            )
        else:
            behaviour = Behaviour(behaviour, mmio_scheme=mmio_scheme, tdp_mmu=tdp_mmu, nx_huge_pages=nx_huge_pages)
        self._mmu: Mmu = mmu
        self._host = host
        self._behaviour = behaviour
        self._core = VmCore(
            _MMUS[mmu],
            _host_fields(host),
            MMIO_SCHEMES[behaviour.mmio_scheme],
            behaviour.tdp_mmu,
            behaviour.nx_huge_pages,
        )
        self.memslots = MemSlots(self._core)
        self.mmio = Mmio()
        self.stats = VmStats(self._core)
        self.events = Events(self._core)

    @property
    def mmu(self) -> Mmu:
        """How guest memory is virtualised."""
        return self._mmu

    @property
    def host(self) -> HostCpu:
        """The processor KVM runs on."""
        return self._host

    @property
    def behaviour(self) -> Behaviour:
        """The era, switch by switch."""
        return self._behaviour

    @property
    def closed(self) -> bool:
        """The VM was closed."""
        return self._core.is_closed

    def create_vcpu(self, cpu: GuestCpu | None = None) -> VCpu:
        """Add a vCPU with paging off; at most 64.

        Parameters
        ----------
        cpu : GuestCpu, optional
            What its CPUID says.

        Raises
        ------
        ArgumentError
            There are 64 already.
        VmClosedError
            The VM was closed.
        """
        guest = GuestCpu() if cpu is None else cpu
        if not isinstance(guest, GuestCpu):
            raise TypeError(f"cpu must be a GuestCpu, not {type(guest).__name__}")
        return VCpu(self._core, guest.model(), self, guest)

    def check(self) -> None:
        """Check every invariant of the shadow pages, roots, slots and counters on a copy of the state.

        Raises
        ------
        InvariantError
            Something is not consistent; ``violations`` lists each invariant, page and expectation.
        VmBusyError
            A vCPU is running.
        VmClosedError
            The VM was closed.

        Notes
        -----
        Takes time and memory in proportion to the shadow pages ever used at once and to the slots.
        """
        check_vm(self._core)

    def close(self) -> None:
        """Let go of every slot and every buffer; counters and events can still be read.

        Raises
        ------
        VmBusyError
            A vCPU is running.
        """
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{len(self.memslots)} slots"
        return f"VM(mmu={self._mmu!r}, behaviour={self._behaviour.profile!r}: {state})"


def _host_fields(host: HostCpu) -> tuple[int, ...]:
    """The host as the engine's struct orders it."""
    phys_bits = host.maxphyaddr if host.phys_bits is None else host.phys_bits
    cache_bits = phys_bits if host.cache_bits is None else host.cache_bits
    return (
        host.maxphyaddr,
        phys_bits,
        host.gbpages,
        host.l1tf,
        cache_bits,
        host.ept_ad,
        host.ept_exec_only,
        host.ept_1g,
        host.ept_2m,
        host.vendor == "amd",
        host.la57,
    )
