"""The virtual machine: memory, MMU, counters, events."""

from __future__ import annotations

import os
from dataclasses import replace
from types import MappingProxyType, TracebackType
from typing import Final, Literal, Self, SupportsIndex, get_args
from weakref import ReferenceType, ref

import numpy as np
import numpy.typing as npt

from kvmmmu._arguments import bytes_of, column_u64, index_in
from kvmmmu._core import VmCore
from kvmmmu.behaviour import MMIO_SCHEMES, Behaviour, MmioScheme
from kvmmmu.check import check_vm
from kvmmmu.cpu import GuestCpu, HostCpu
from kvmmmu.errors import ArgumentError, MemslotError
from kvmmmu.events import Events
from kvmmmu.memslots import MemSlot, MemSlots, slot_number
from kvmmmu.mmio import Mmio
from kvmmmu.sptes import SpteFormat
from kvmmmu.stats import VmStats
from kvmmmu.tlb import Tlb
from kvmmmu.trees import PageTables
from kvmmmu.vcpu import VCpu

__all__ = ["VM"]

Mmu = Literal["shadow", "ept", "npt"]
_MMUS: Final = MappingProxyType({"shadow": 0, "ept": 1, "npt": 2})

ReaderProtocol = Literal["exchange", "membarrier"]
_PROTOCOLS: Final = ("none", "exchange", "membarrier")  # by number; the first is of a benchmark's control


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
    tdx : bool
        The VM is a TDX guest (EPT, TDP MMU and a host of Intel): the tables are those of its shared memory.  The empty
        entry is bit 63 (suppress #VE) and mmio sptes have value 0, so that an access where no memory is exits once and
        ends in ``Outcome.VE``, later ones without an exit.  KVM has it since Linux 6.16; all else is as ``behaviour``
        says.  Private memory, and with it the bit of a gpa that says "shared", is not modelled.
    reader_protocol : {"exchange", "membarrier"}
        How a vCPU tells those who free tables that it reads: KVM's full barrier at each walk and entry, or a plain
        store and membarrier(2) by who frees (``docs/lockless-walk.md``).  Results are the same; only the cost moves.

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
    spte_format : SpteFormat
        Where the sptes of this VM keep what; the masks of 2011 (``mmio_wide``, ``mmio_constant``) are not in it.

    Raises
    ------
    ArgumentError
        An option is unknown or does not suit the others.
    MemoryError
        About 70 GiB of address space (not memory) cannot be reserved.

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
        tdx: bool = False,
        reader_protocol: ReaderProtocol = "exchange",
    ) -> None:
        if mmu not in _MMUS:
            raise ArgumentError(f"mmu = {mmu!r}: allowed are {', '.join(map(repr, get_args(Mmu)))}")
        if reader_protocol not in get_args(ReaderProtocol):
            names = ", ".join(map(repr, get_args(ReaderProtocol)))
            raise ArgumentError(f"reader_protocol = {reader_protocol!r}: allowed are {names}")
        host = HostCpu() if host is None else host
        if not isinstance(host, HostCpu):
            raise TypeError(f"host must be a HostCpu, not {type(host).__name__}")
        if isinstance(behaviour, Behaviour):
            behaviour = behaviour.changed(mmio_scheme=mmio_scheme, tdp_mmu=tdp_mmu, nx_huge_pages=nx_huge_pages)
        else:
            behaviour = Behaviour(behaviour, mmio_scheme=mmio_scheme, tdp_mmu=tdp_mmu, nx_huge_pages=nx_huge_pages)
        if host.mmio_masks is not None and not SpteFormat.of(host, mmu).mmio_faults:
            words = ", ".join(map(hex, host.mmio_masks))
            raise ArgumentError(f"HostCpu.mmio_masks is ({words}): under {mmu!r} such entries would not fault")
        if not isinstance(tdx, bool):
            raise TypeError(f"tdx must be True or False, not {tdx!r}")
        if tdx:
            _check_tdx(mmu, host, behaviour)
        self._mmu: Mmu = mmu
        self._host = host
        self._behaviour = behaviour
        self._tdx = tdx
        self.spte_format = SpteFormat.of(host, mmu, mmio_caching=behaviour.mmio_scheme != "off", ve=tdx)
        self._core = VmCore(
            _MMUS[mmu],
            _host_fields(host),
            MMIO_SCHEMES[behaviour.mmio_scheme],
            behaviour.tdp_mmu,
            behaviour.nx_huge_pages,
            era=behaviour.bits,
            tdx=tdx,
            plain_marks=reader_protocol == "membarrier",
        )
        self.memslots = MemSlots(self._core)
        self.mmio = Mmio()
        self.stats = VmStats(self._core)
        self.events = Events(self._core, "6.1" if behaviour.profile == "6.1" else "3.1")
        # Weak: a vCPU holds its VM, and a circle would keep both until the garbage collector comes by.
        self._vcpus: list[ReferenceType[VCpu]] = []

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
    def tdx(self) -> bool:
        """It is a TDX guest."""
        return self._tdx

    @property
    def reader_protocol(self) -> str:
        """The reader protocol in use: "exchange" too where "membarrier" was asked for and the system has none."""
        return _PROTOCOLS[self._core.reader_protocol]

    @property
    def closed(self) -> bool:
        """The VM was closed."""
        return self._core.is_closed

    def create_vcpu(self, cpu: GuestCpu | None = None, *, tlb: Tlb | None = None) -> VCpu:
        """Add a vCPU with paging off; at most 64.

        Parameters
        ----------
        cpu : GuestCpu, optional
            What its CPUID says.  Under shadow paging KVM offers no protection keys: ``vcpu.cpu.pku`` is False there.
        tlb : Tlb, optional
            The processor's caches of translations; by default it caches nothing and reads the tables at each access
            (``access_many`` remembers them while the vCPU stays in the guest).

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
        if tlb is not None and not isinstance(tlb, Tlb):
            raise TypeError(f"tlb must be a Tlb or None, not {type(tlb).__name__}")
        if self.mmu == "shadow":
            guest = replace(guest, pku=False)
        vcpu = VCpu(self._core, guest.model(), self, guest)
        if tlb is not None:
            vcpu.use_tlb(tlb)
        self._vcpus.append(ref(vcpu))
        return vcpu

    def page_tables(self, vcpu: VCpu | None = None, *, all: bool = False, previous: int | None = None) -> PageTables:
        """Copy the tables KVM built for a vCPU.

        Parameters
        ----------
        vcpu : VCpu, optional
            The only one by default.
        all : bool
            Previous roots too, and pages that no root reaches.
        previous : int, optional
            Begin at the previous root 0, 1 or 2 (the latest first) instead of the current one.

        Returns
        -------
        PageTables
            Pages under the current root; none before the vCPU first ran.

        Raises
        ------
        ArgumentError
            No ``vcpu`` is given and the VM has not exactly one, or it is another VM's.
        VmClosedError
            The VM was closed.
        """
        if vcpu is None:
            vcpus = [alive for alive in (weak() for weak in self._vcpus) if alive is not None]
            if len(vcpus) != 1:
                raise ArgumentError(f"vcpu is not given and the VM has {len(vcpus)} vCPUs")
            vcpu = vcpus[0]
        if not isinstance(vcpu, VCpu):
            raise TypeError(f"vcpu must be a VCpu, not {type(vcpu).__name__}")
        if vcpu.vm is not self:
            raise ArgumentError("vcpu belongs to another VM")
        if previous is not None:
            previous = index_in("previous", previous, 0, 2)
        return PageTables(vcpu, bool(all), previous)

    # -- shadow pages, dirty log, host pages

    def set_nr_mmu_pages(self, pages: int) -> None:
        """Pin the number of shadow pages (KVM_SET_NR_MMU_PAGES); pages over it are recycled at once.

        Raises
        ------
        ArgumentError
            Below 64.
        """
        if not self._core.set_nr_mmu_pages(pages):
            raise ArgumentError(f"pages is {pages}; allowed are 64 and more")

    def set_nx_huge_pages(self, on: bool) -> None:
        """Switch the mitigation of the running VM (the module parameter ``nx_huge_pages``); a change zaps everything.

        ``behaviour`` goes on saying what the VM began with.
        """
        if not isinstance(on, bool):
            raise TypeError(f"on must be True or False, not {on!r}")
        self._core.set_nx_huge_pages(on)

    def recover_nx_huge_pages(self, ratio: SupportsIndex | None = None) -> int:
        """Do what KVM's recovery worker does in one period.

        Tables that stand where a huge page would, had nothing been executed there (``nx_lpage_splits`` counts them),
        are zapped, oldest first; the next access maps a huge page again.

        Parameters
        ----------
        ratio : int, optional
            One table in how many, rounded up; 0 none.  By default that of the behaviour, 60.

        Returns
        -------
        int
            How many were zapped.

        Raises
        ------
        ArgumentError, OverflowError
            ``ratio`` has more than 32 bits, or is negative.
        """
        default = self._behaviour.nx_huge_pages_recovery_ratio
        return self._core.nx_recover(default if ratio is None else index_in("ratio", ratio, 0, 2**32 - 1))

    def set_manual_dirty_protect(self, *, initially_set: bool = False) -> None:
        """Clear dirty logs by hand (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).

        Parameters
        ----------
        initially_set : bool
            Logs begin with every page dirty, and nothing is protected until a page is cleared.
        """
        self._core.set_manual_protect(3 if initially_set else 1)

    def get_dirty_log(self, slot: int | MemSlot) -> npt.NDArray[np.uint64]:
        """The dirty bitmap of a slot, bit *n* of word *n* // 64 a page (KVM_GET_DIRTY_LOG).

        The log starts over and its pages are protected again, unless it is cleared by hand.

        Raises
        ------
        MemslotError
            EINVAL for a bad slot number, ENOENT without a slot or a log.
        """
        number = slot_number(slot)
        found = self.memslots.get(number)
        words = (0 if found is None else found.size >> 12) + 63 >> 6
        out = np.zeros(words, np.uint64)
        self._dirty_error(self._core.dirty_get(number, out), number)
        return out

    def clear_dirty_log(
        self, slot: int | MemSlot, bitmap: npt.ArrayLike, *, first_page: int = 0, npages: int | None = None
    ) -> None:
        """Forget the pages whose bits are set, and protect them again (KVM_CLEAR_DIRTY_LOG).

        Parameters
        ----------
        slot : int or MemSlot
        bitmap : array of uint64
            Bit 0 is ``first_page``.
        first_page : int
            A multiple of 64.
        npages : int, optional
            A multiple of 64, or up to the slot's end; by default all from ``first_page`` on.

        Raises
        ------
        MemslotError
            EINVAL for a range that is not aligned or not in the slot, ENOENT without a log.
        """
        number = slot_number(slot)
        found = self.memslots.get(number)
        pages = 0 if found is None else found.size >> 12
        count = max(pages - first_page, 0) if npages is None else npages
        bits = column_u64("bitmap", bitmap)
        self._dirty_error(self._core.dirty_clear(number, first_page, count, bits), number)

    @staticmethod
    def _dirty_error(err: int, number: int) -> None:
        if err:
            raise MemslotError(err, f"dirty log of slot {number}: {os.strerror(err)}")

    def host_untouched(self, slot: int | MemSlot, *, first_page: int = 0, npages: int | None = None) -> None:
        """Declare pages of a slot's memory untouched by the host so far.

        A read then maps the shared zero page, and the first write makes the host copy it, as in Linux.
        """
        self._host_pages(slot, first_page, npages, True)

    def host_dontneed(self, slot: int | MemSlot, *, first_page: int = 0, npages: int | None = None) -> None:
        """Give pages of a slot's memory back to the host (``madvise(MADV_DONTNEED)``): they become zero.

        KVM hears of it through the MMU notifier and drops what maps them.
        """
        self._host_pages(slot, first_page, npages, False)

    def _host_pages(self, slot: int | MemSlot, first_page: int, npages: int | None, untouched: bool) -> None:
        number = slot_number(slot)
        found = self.memslots.get(number)
        if found is None:
            raise ArgumentError(f"slot {number} does not exist")
        count = (found.size >> 12) - first_page if npages is None else npages
        self._core.host_pages(number, first_page, count, untouched)

    def host_write(self, gpa: int, data: bytes, *, as_id: int = 0) -> None:
        """Write guest memory as the user process does: no MMU, no dirty log, no write tracking.

        Raises
        ------
        ArgumentError
            No slot stands at some byte, or its buffer is read-only; nothing was written.
        """
        self._core.host_store(gpa, bytes_of("data", data), index_in("as_id", as_id, 0, 1))

    def check(self, *, holes: bool = False) -> None:
        """Check every invariant of the shadow pages, roots, slots and counters on a copy of the state.

        Parameters
        ----------
        holes : bool
            Report also what KVM's own rules lead to, such as an mmio spte that a sync renews although a slot
            stands there by now.

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
        check_vm(self._core, holes=holes)

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
        tdx = ", tdx=True" if self._tdx else ""
        return f"VM(mmu={self._mmu!r}, behaviour={self._behaviour.profile!r}{tdx}: {state})"


def _check_tdx(mmu: Mmu, host: HostCpu, behaviour: Behaviour) -> None:
    """Refuse what has no TDX guests.  KVM does not offer them without mmio sptes."""
    of_2011 = behaviour.switches & {"mmio_wide", "mmio_constant"}
    for wrong, name, value, allowed in (
        (mmu != "ept", "mmu", mmu, "'ept'"),
        (host.vendor != "intel", "HostCpu.vendor", host.vendor, "'intel'"),
        (host.mmio_masks is not None, "HostCpu.mmio_masks", host.mmio_masks, "None"),
        (not behaviour.tdp_mmu, "tdp_mmu", behaviour.tdp_mmu, "True"),
        (behaviour.mmio_scheme == "off", "mmio_scheme", behaviour.mmio_scheme, "a scheme with mmio sptes"),
        (bool(of_2011), "behaviour.switches", sorted(of_2011), "[]"),
    ):
        if wrong:
            raise ArgumentError(f"tdx is True and {name} is {value!r}; allowed is {allowed}")


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
        host.ad_first,
        host.ept_checks_updates,
        host.rsvd_alone,
        host.c_bit or 0,
        host.sme,
        host.mmio_masks is not None,
        *(host.mmio_masks or (0, 0, 0)),
    )
