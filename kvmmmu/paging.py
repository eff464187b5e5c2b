"""Page tables in plain memory, with no VM around them: crash dumps, forensics, teaching."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvmmmu import _core
from kvmmmu._arguments import column_u64, index_of
from kvmmmu.cpu import GuestCpu, HostCpu
from kvmmmu.errors import ArgumentError
from kvmmmu.explain import explain_walk
from kvmmmu.records import TRANSLATION
from kvmmmu.walks import WalkResult, walk_result

__all__ = ["EptTables", "NptTables", "Paging"]

_DIALECTS = {"sdm": 0, "kvm": 1}
_CHUNK = 1 << 16

if os.environ.get("KVMMMU_KERNEL") and os.environ["KVMMMU_KERNEL"] not in _core.KERNELS_HERE:
    warnings.warn(
        f"KVMMMU_KERNEL is {os.environ['KVMMMU_KERNEL']!r} and ignored; allowed are "
        f"{', '.join(map(repr, _core.KERNELS_HERE))} here",
        RuntimeWarning,
        stacklevel=2,
    )

Memory = Any  # one buffer, {gpa: buffer} or (gpa, buffer) pairs


@dataclass(frozen=True)
class EptTables:
    """Extended page tables under a guest.

    Parameters
    ----------
    eptp : int
        The EPT pointer: memory type, levels less one in bits 5:3, A/D in bit 6, table address.
    cpu : HostCpu
    """

    eptp: int
    cpu: HostCpu = field(default_factory=HostCpu)

    def second(self) -> tuple[object, ...]:
        """The form in which the engine takes it."""
        return ("ept", self.eptp, self.cpu.model())


@dataclass(frozen=True)
class NptTables:
    """AMD nested page tables under a guest (the host has NXE = 1).

    Parameters
    ----------
    ncr3 : int
        Address of the top table.
    levels : {4, 5}
    cpu : HostCpu

    Raises
    ------
    ArgumentError
        Other numbers of levels.
    """

    ncr3: int
    levels: int = 4
    cpu: HostCpu = field(default_factory=lambda: HostCpu(maxphyaddr=48, vendor="amd"))

    def __post_init__(self) -> None:
        if self.levels not in (4, 5):
            raise ArgumentError(f"NptTables.levels is {self.levels!r}; allowed are 4 and 5")

    def second(self) -> tuple[object, ...]:
        """The form in which the engine takes it."""
        return ("npt", self.ncr3, self.levels, self.cpu.model())


def _areas(memory: Memory) -> list[tuple[int, Any]]:
    if memory is None:
        return []
    if isinstance(memory, Mapping):
        return list(memory.items())
    if not isinstance(memory, (list, tuple)) and not isinstance(memory, Iterable):
        return [(0, memory)]  # e.g. mmap: a buffer that is no iterable of areas
    if isinstance(memory, (bytes, bytearray, memoryview, np.ndarray)) or hasattr(memory, "__buffer__"):
        return [(0, memory)]
    areas = list(memory)
    for area in areas:
        if not isinstance(area, tuple) or len(area) != 2:
            raise ArgumentError(f"memory holds {area!r}; expected (gpa, buffer) pairs")
    return areas


class Paging(_core.PagingCore):
    """Translate addresses through page tables that lie in plain memory.

    Parameters
    ----------
    cr0, cr3, cr4, efer : int
        Control registers; they choose the paging mode (SDM vol. 3A section 4.1.1).
    cpu : GuestCpu
    pkru : int
        Protection-key rights (4- and 5-level paging with CR4.PKE).
    memory : buffer, mapping or iterable, optional
        Where the tables are: one buffer that begins at address 0, or ``{gpa: buffer}``, or (gpa, buffer) pairs in
        any order.  Buffers are contiguous, whole 4 KiB pages, 8-byte aligned; areas do not overlap.  They are
        held, not copied.  Where no memory stands, entries read as 0.  Under ``nested`` this is host memory.
    compat : bool
        CS.L = 0: in long mode addresses are 32 bits wide.
    dialect : {"sdm", "kvm"}
        The processor's rules as the manuals give them, or those of KVM's software walker.
    nested : EptTables or NptTables, optional
        A second dimension below.
    pdptes : sequence of four int, optional
        PDPTE registers of PAE paging; by default they are loaded from ``memory`` at CR3.

    Raises
    ------
    OverflowError
        A register or address that is negative or wider than 64 bits.
    ArgumentError
        Memory that is not as described, an unknown dialect, control bits of features the CPU lacks, an invalid EPTP,
        a PDPTE with reserved bits.

    Notes
    -----
    Reading is thread-safe.  Walks write to memory only with ``set_ad``, by compare-exchange.
    """

    def __init__(
        self,
        cr0: int,
        cr3: int,
        cr4: int,
        efer: int,
        cpu: GuestCpu | None = None,
        *,
        pkru: int = 0,
        memory: Memory = None,
        compat: bool = False,
        dialect: str = "sdm",
        nested: EptTables | NptTables | None = None,
        pdptes: Sequence[int] | None = None,
    ) -> None:
        if dialect not in _DIALECTS:
            raise ArgumentError(f"dialect is {dialect!r}; allowed are 'sdm' and 'kvm'")
        if pdptes is not None and len(pdptes) != 4:
            raise ArgumentError(f"pdptes has {len(pdptes)} values; PAE paging has 4 PDPTE registers")
        cpu = GuestCpu() if cpu is None else cpu
        if not isinstance(cpu, GuestCpu):
            raise TypeError(f"cpu must be a GuestCpu, not {type(cpu).__name__}")
        if not isinstance(nested, EptTables | NptTables | None):
            raise TypeError(f"nested must be EptTables or NptTables, not {type(nested).__name__}")
        super().__init__(
            _areas(memory),
            (cr0, cr3, cr4, efer, pkru, compat),
            cpu.model(),
            _DIALECTS[dialect],
            () if nested is None else nested.second(),
            pdptes,
        )
        cpu.check_registers(index_of("cr4", cr4), index_of("efer", efer))
        self.cpu = cpu
        self.dialect = dialect

    def translate(
        self,
        gvas: npt.ArrayLike,
        access: str = "r",
        cpl: int = 0,
        *,
        ac: bool = False,
        implicit: bool = False,
        set_ad: bool = False,
    ) -> npt.NDArray[Any]:
        """Translate many addresses; the GIL is released meanwhile.

        Parameters
        ----------
        gvas : array_like of uint64
            Guest virtual addresses, any shape.
        access, cpl, ac, implicit, set_ad
            As in ``walk_for``.

        Returns
        -------
        numpy.ndarray
            Same shape, structured: ``gva``; ``gpa`` (0 on a fault); ``error_code``; ``fault_gpa``, the
            guest-physical address that a second dimension refused; ``entry``, the last entry read; ``fault``
            (``walks.Fault``); ``page_shift``; ``access`` (``walks.Rights``); ``level`` of that entry.

        Raises
        ------
        TypeError, OverflowError
            Addresses that are no integers, or outside 0 .. 2**64 - 1.
        ArgumentError
            No array at all, unknown access or privilege level.
        """
        addresses = column_u64("gvas", gvas)
        out = np.empty(addresses.shape, TRANSLATION)
        self.translate_into(addresses, out, access, cpl, ac, implicit, set_ad)
        return out

    def walk_result(
        self,
        gva: int,
        access: str = "r",
        cpl: int = 0,
        *,
        ac: bool = False,
        implicit: bool = False,
        set_ad: bool = False,
    ) -> WalkResult:
        """Walk one address and return everything the walk saw; parameters as in ``walk_for``."""
        return walk_result(*self.walk_record(gva, access, cpl, ac, implicit, set_ad))

    def explain(self, gva: int, access: str = "r", cpl: int = 0, *, ac: bool = False, implicit: bool = False) -> str:
        """Say in words how one address is translated, entry by entry, and why the walk ended."""
        return explain_walk(self.walk_result(gva, access, cpl, ac=ac, implicit=implicit))

    def mappings(self, start: int = 0, *, limit: int = 1 << 20, max_walks: int = 1 << 26) -> npt.NDArray[Any]:
        """List what is mapped: every leaf that the tables reach, whatever it permits, in ascending order.

        Parameters
        ----------
        start : int
            First address to look at.
        limit : int
            Most leaves to return; for the rest call again with ``start`` behind the last one.
        max_walks : int
            Bound on the work: a table used many times over can describe 2**36 holes.

        Returns
        -------
        numpy.ndarray
            Structured as in ``translate``; ``gva`` and ``gpa`` are those of the page.

        Raises
        ------
        ArgumentError
            ``max_walks`` did not reach the end (the message says where to go on), or the tables are nested.
        """
        found: list[npt.NDArray[Any]] = []
        count, walks, gva = 0, 0, start
        while count < limit:
            chunk = np.empty(min(_CHUNK, limit - count), TRANSLATION)
            n, following = self.mappings_into(gva, chunk, _CHUNK)
            found.append(chunk[:n])
            count += n
            if following is None:
                break
            gva = following
            walks += _CHUNK
            if walks >= max_walks:
                raise ArgumentError(f"max_walks is {max_walks}; the walks so far reached gva {gva:#x}, not the end")
        return np.concatenate(found) if found else np.empty(0, TRANSLATION)


for _name in ("walk", "walk_for", "translate_one"):
    _core.own_method(Paging, _name)
