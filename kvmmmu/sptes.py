"""KVM's own page-table entries, read and written outside a machine.

An **mmio spte** is an entry that always faults and carries what the fault handler needs: the gfn, the access rights and
the memslot generation at the time it was made.  Where the bits stand depends on the host, so everything starts from a
``SpteFormat``.

The layout is that of Linux 5.17 and later (``arch/x86/kvm/mmu/spte.h`` and ``spte.c`` describe it): generation bits
0…7 in entry bits 3…10 and 8…18 in 52…62, the gfn from bit 12 up.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal, NamedTuple, SupportsIndex, TypeGuard, overload

import numpy as np
import numpy.typing as npt

from kvmmmu import _core
from kvmmmu._arguments import Words, column_u64, index_in, index_u64
from kvmmmu._core import SplitSpte
from kvmmmu.constants import TABLE
from kvmmmu.errors import ArgumentError
from kvmmmu.spte_host import SpteHost

__all__ = ["MmioColumns", "MmioSpte", "Mmu", "SplitSpte", "SpteFormat", "SpteHost", "SpteWords", "decode"]

Mmu = Literal["shadow", "ept", "npt"]
_MMUS = ("shadow", "ept", "npt")
_PAGE_NAMES = {1: "4 KiB", 2: "2 MiB", 3: "1 GiB", 4: "512 GiB", 5: "256 TiB"}
_MEMORY_TYPES = {0: "UC", 1: "WC", 4: "WT", 5: "WP", 6: "WB"}


class MmioSpte(NamedTuple):
    """What one mmio spte carries."""

    gfn: int
    access: int
    gen: int


class MmioColumns(NamedTuple):
    """What an array of mmio sptes carries; each column has the shape of the input."""

    gfn: npt.NDArray[np.uint64]
    access: npt.NDArray[np.uint32]
    gen: npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class SpteWords:
    """An spte in words: ``kind``, and the facts that hold for that kind.

    Attributes
    ----------
    spte : int
    level : int
        The level the entry stands at: 1 = 4 KiB … 5 = 256 TiB.
    kind : str
        ``"empty"``, ``"removed"``, ``"mmio"``, ``"leaf"``, ``"table"`` or ``"not present"``.
    facts : dict
        Named facts; an entry that does not apply is absent.
    """

    spte: int
    level: int
    kind: str
    facts: dict[str, int | str | bool]

    def __str__(self) -> str:
        facts = "; ".join(f"{name} {_shown(name, value)}" for name, value in self.facts.items())
        head = f"{self.spte:#018x} level {self.level} ({_PAGE_NAMES[self.level]}): {self.kind}"
        return f"{head}: {facts}" if facts else head


def _shown(name: str, value: int | str | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:#x}" if isinstance(value, int) and name in ("gfn", "gpa", "pfn", "hpa") else str(value)


class SpteFormat:
    """Where a host's sptes keep what.

    Parameters
    ----------
    mmu : {"shadow", "ept", "npt"}
        Who reads the tables: the processor as its own page tables, Intel's EPT, AMD's nested paging.
    maxphyaddr : int
        The host's MAXPHYADDR by CPUID, 32…52.  At 52 shadow paging and NPT have no reserved address bit left, and so no
        mmio sptes.
    phys_bits : int, optional
        Address bits after memory-encryption keys; ``maxphyaddr`` if not given.
    l1tf : bool
        The CPU has the L1TF flaw: address bits move away from what its L1 cache compares.
    cache_bits : int, optional
        Address bits the L1 cache compares; ``phys_bits`` if not given.
    ept_ad, ept_exec_only : bool
        EPT accessed/dirty bits; execute-only entries.
    mmio_caching : bool
        KVM's module parameter of that name.
    gbpages, ept_2m, ept_1g : bool
        Large pages: 1 GiB in ordinary and NPT tables, 2 MiB and 1 GiB under EPT.
    c_bit : int, optional
        The address bit that marks encrypted memory (SME, SEV), 32…51: outside EPT the bits of mmio sptes are then
        those from ``phys_bits`` up to 51 and P, from one higher where ``c_bit`` equals ``phys_bits``; none if that
        is 52.  The bit itself is neither reserved nor part of a frame's address.
    sme : bool
        With a ``c_bit``: every mapping and link carries it (``masks["me"]``).
    mmio_masks : (int, int, int), optional
        Value, mask and access mask set by hand.  As in KVM there are no mmio sptes unless the access mask fits 32
        bits, the mask is within bits 63, 51…12 and 2…0, the value is within the mask and clear of both places of the
        address, and an entry being torn down does not look like one.
    ve : bool
        The tables of a TDX guest (EPT only): its mmio sptes have value 0 and bit 63 clear, so that the processor raises
        #VE in the guest; every other entry has bit 63, also the empty one.

    Raises
    ------
    ArgumentError
        A number is outside its range, or ``ve`` is asked for without EPT or together with ``mmio_masks``.
    """

    def __init__(
        self,
        mmu: Mmu = "shadow",
        *,
        maxphyaddr: SupportsIndex = 46,
        phys_bits: SupportsIndex | None = None,
        l1tf: bool = False,
        cache_bits: SupportsIndex | None = None,
        ept_ad: bool = True,
        ept_exec_only: bool = True,
        mmio_caching: bool = True,
        gbpages: bool = True,
        ept_2m: bool = True,
        ept_1g: bool = True,
        c_bit: SupportsIndex | None = None,
        sme: bool = True,
        mmio_masks: tuple[int, int, int] | None = None,
        ve: bool = False,
    ) -> None:
        if mmu not in _MMUS:
            raise ArgumentError(f"mmu: {mmu!r} is none of {', '.join(_MMUS)}")
        self.mmu: Mmu = mmu
        self.maxphyaddr = index_in("maxphyaddr", maxphyaddr, 32, 52)
        self.phys_bits = self.maxphyaddr if phys_bits is None else index_in("phys_bits", phys_bits, 32, self.maxphyaddr)
        self.cache_bits = self.phys_bits if cache_bits is None else index_in("cache_bits", cache_bits, 32, 52)
        self.l1tf = bool(l1tf)
        self.c_bit = None if c_bit is None else index_in("c_bit", c_bit, 32, 51)
        if mmio_masks is not None and len(mmio_masks) != 3:
            raise ArgumentError(f"mmio_masks has {len(mmio_masks)} words; allowed are 3")
        if ve and (mmu != "ept" or mmio_masks is not None):
            raise ArgumentError(f"ve is True; with mmu {mmu!r} and mmio_masks {mmio_masks} allowed is False")
        self.ve = bool(ve)
        value, mask, access = mmio_masks or (0, 0, 0)
        words = (index_u64("mmio_masks", value), index_u64("mmio_masks", mask), index_u64("mmio_masks", access))
        self._core = _core.SpteCodec(
            mmu == "ept",
            self.maxphyaddr,
            self.phys_bits,
            self.l1tf,
            self.cache_bits,
            bool(ept_ad),
            bool(ept_exec_only),
            bool(mmio_caching),
            bool(gbpages),
            bool(ept_2m),
            bool(ept_1g),
            self.c_bit or 0,
            bool(sme),
            None if mmio_masks is None else words,
            self.ve,
        )

    @classmethod
    def of(cls, host: SpteHost, mmu: Mmu = "shadow", *, mmio_caching: bool = True, ve: bool = False) -> SpteFormat:
        """Return the format of a host CPU."""
        return cls(
            mmu,
            maxphyaddr=host.maxphyaddr,
            phys_bits=host.phys_bits,
            l1tf=host.l1tf,
            cache_bits=host.cache_bits,
            ept_ad=host.ept_ad,
            ept_exec_only=host.ept_exec_only,
            mmio_caching=mmio_caching,
            gbpages=host.gbpages,
            ept_2m=host.ept_2m,
            ept_1g=host.ept_1g,
            c_bit=host.c_bit,
            sme=host.sme,
            mmio_masks=host.mmio_masks,
            ve=ve,
        )

    @property
    def mmio_caching(self) -> bool:
        """Whether this host can make mmio sptes at all."""
        return self._core.mmio_caching

    @property
    def max_gfn(self) -> int:
        """The largest gfn that an mmio spte of this host gives back unchanged."""
        return self._core.max_gfn

    @property
    def masks(self) -> dict[str, int]:
        """Every mask by name, as a new dict."""
        return self._core.fields()

    @property
    def empty(self) -> int:
        """An entry that maps nothing: 0, with ``ve`` bit 63."""
        return TABLE["EPT_SUPPRESS_VE"] if self.ve else 0

    def raises_ve(self, spte: SupportsIndex, *, level: SupportsIndex = 1) -> bool:
        """Whether an access that this entry does not permit is told to the guest (#VE), not to the hypervisor.

        The rule of SDM vol. 3C section 26.5.7.1 for the entry that ends the walk, on a processor with EPT-violation #VE
        switched on: no misconfiguration, and bit 63 is clear.  False without ``ve``.

        Raises
        ------
        OverflowError
            ``spte`` is outside 0…2^64−1.
        ArgumentError
            ``level`` is outside 1…5.
        """
        word, at = index_u64("spte", spte), index_in("level", level, 1, 5)
        return self.ve and not word & TABLE["EPT_SUPPRESS_VE"] and not self._core.reserved(word, at)

    @property
    def mmio_faults(self) -> bool:
        """Whether the processor refuses every mmio spte that the masks allow, and no mapping looks like one.

        True of what a host chooses itself, and where there are no mmio sptes.  KVM takes masks set by hand on trust.
        """
        value, mask, access = (self.masks[name] for name in ("mmio_value", "mmio_mask", "mmio_access"))
        if not self.mmio_caching or self.ve:
            return True
        width = self.phys_bits if self.c_bit is not None and self.mmu != "ept" else self.maxphyaddr
        if value & ((1 << 52) - (1 << width)) & self.masks["address"]:
            return True
        rights = 7  # R, W, X
        return (
            self.mmu == "ept"
            and mask & rights == rights
            and all(self.is_reserved(value & rights | granted & access) for granted in range(8))
        )

    def __repr__(self) -> str:
        l1tf = f", l1tf=True, cache_bits={self.cache_bits}" if self.l1tf else ""
        return f"SpteFormat({self.mmu!r}, maxphyaddr={self.maxphyaddr}, phys_bits={self.phys_bits}{l1tf})"

    def _need_caching(self) -> None:
        if not self.mmio_caching:
            why = "MAXPHYADDR 52, masks refused, or mmio_caching off"
            raise ArgumentError(f"{self!r}: this host has no mmio sptes ({why})")

    @overload
    def mmio_encode(self, gfn: SupportsIndex, access: SupportsIndex, gen: SupportsIndex) -> int: ...
    @overload
    def mmio_encode(self, gfn: Words, access: Words, gen: Words) -> npt.NDArray[np.uint64] | int: ...
    def mmio_encode(self, gfn: Words, access: Words, gen: Words) -> npt.NDArray[np.uint64] | int:
        """Pack gfn, access and generation into mmio sptes.

        Parameters
        ----------
        gfn : int or array of integers
            Guest frame, 0…``max_gfn``.
        access : int or array of integers
            KVM access rights, 0…7 (1 = X, 2 = W, 4 = U).  Only W and U are kept, under EPT none.
        gen : int or array of integers
            Memslot generation; used modulo 2^19, bit 63 (update in progress) is never stored.

        Returns
        -------
        int or ndarray of uint64
            An int if all three are integers, else an array of their broadcast shape.

        Raises
        ------
        OverflowError
            A number is outside 0…2^64−1.
        ArgumentError
            A gfn or an access is outside its range, a column is no array, the shapes do not broadcast, or
            the host has no mmio sptes.
        """
        self._need_caching()
        if _is_scalar(gfn) and _is_scalar(access) and _is_scalar(gen):
            return self._core.make(
                index_in("gfn", gfn, 0, self.max_gfn),
                index_in("access", access, 0, TABLE["ACC_ALL"]),
                index_u64("gen", gen),
            )
        gfns, accesses, gens = column_u64("gfn", gfn), column_u64("access", access), column_u64("gen", gen)
        if accesses.size and int(accesses.max()) > TABLE["ACC_ALL"]:
            raise ArgumentError(f"access: {int(accesses.max())} is outside 0…{TABLE['ACC_ALL']}")
        try:
            gfns, accesses, gens = np.broadcast_arrays(gfns, accesses, gens)
        except ValueError:
            raise ArgumentError(
                f"gfn, access, gen: shapes {gfns.shape}, {accesses.shape}, {gens.shape} do not broadcast"
            ) from None
        out = np.empty(gfns.shape, np.uint64)
        flat = np.ascontiguousarray(gfns).reshape(-1)
        done = self._core.make_many(
            flat,
            np.ascontiguousarray(accesses, dtype=np.uint32).reshape(-1),
            np.ascontiguousarray(gens).reshape(-1),
            out.reshape(-1),
        )
        if done < out.size:
            raise ArgumentError(f"gfn[{done}]: {int(flat[done]):#x} is above {self.max_gfn:#x}, the largest storable")
        return out

    @overload
    def mmio_decode(self, spte: SupportsIndex) -> MmioSpte: ...
    @overload
    def mmio_decode(self, spte: Words) -> MmioColumns | MmioSpte: ...
    def mmio_decode(self, spte: Words) -> MmioColumns | MmioSpte:
        """Unpack mmio sptes into gfn, access and generation.

        Parameters
        ----------
        spte : int or array of integers

        Returns
        -------
        MmioSpte or MmioColumns
            Ints for an int, columns of the input's shape for an array.

        Raises
        ------
        OverflowError
            A number is outside 0…2^64−1.
        ArgumentError
            An entry is not an mmio spte of this host, or the column is no array.
        """
        if _is_scalar(spte):
            word = index_u64("spte", spte)
            parts = self._core.split(word)
            if parts is None:
                raise ArgumentError(f"spte: {word:#x} is not an mmio spte of {self!r}")
            return MmioSpte(*parts)
        sptes = column_u64("spte", spte)
        flat = sptes.reshape(-1)
        shape = sptes.shape
        out = MmioColumns(np.empty(shape, np.uint64), np.empty(shape, np.uint32), np.empty(shape, np.uint64))
        done = self._core.split_many(flat, out.gfn.reshape(-1), out.access.reshape(-1), out.gen.reshape(-1))
        if done < flat.size:
            raise ArgumentError(f"spte[{done}]: {int(flat[done]):#x} is not an mmio spte of {self!r}")
        return out

    def is_mmio(self, spte: Words) -> npt.NDArray[np.bool_] | bool:
        """Whether entries are mmio sptes of this host; a bool for an int, an array of bool for an array."""
        if _is_scalar(spte):
            return self._core.is_mmio(index_u64("spte", spte))
        sptes = column_u64("spte", spte)
        out = np.empty(sptes.shape, np.bool_)
        self._core.is_mmio_many(sptes.reshape(-1), out.view(np.uint8).reshape(-1))
        return out

    def is_being_zapped(self, spte: SupportsIndex) -> bool:
        """Whether an entry that a 32-bit host read in two halves is empty, or an mmio spte on its way there.

        Linux 3.1 asks this of a direct entry that is no mmio spte: only if the answer is no, something is wrong.
        """
        return self._core.being_zapped(index_u64("spte", spte))

    @overload
    def is_reserved(self, spte: SupportsIndex, *, level: SupportsIndex = 1) -> bool: ...
    @overload
    def is_reserved(self, spte: Words, *, level: SupportsIndex = 1) -> npt.NDArray[np.bool_] | bool: ...
    def is_reserved(self, spte: Words, *, level: SupportsIndex = 1) -> npt.NDArray[np.bool_] | bool:
        """Whether this host's processor finds reserved bits in entries (under EPT: a misconfiguration).

        The rules are those of SDM vol. 3A section 4.5 (NPT and shadow tables, NXE = 1) and vol. 3C section 29.3.3
        (EPT), with the host's MAXPHYADDR and large pages.  An entry that is not present has no reserved bits.

        Parameters
        ----------
        spte : int or array of integers
        level : int
            The level the entries stand at, 1…5.

        Returns
        -------
        bool or ndarray of bool

        Raises
        ------
        OverflowError
            A number is outside 0…2^64−1.
        ArgumentError
            ``level`` is outside 1…5, or the column is no array.
        """
        at = index_in("level", level, 1, 5)
        if _is_scalar(spte):
            return self._core.reserved(index_u64("spte", spte), at) != 0
        sptes = column_u64("spte", spte)
        out = np.empty(sptes.shape, np.bool_)
        self._core.reserved_many(sptes.reshape(-1), at, out.view(np.uint8).reshape(-1))
        return out

    def decode(self, spte: SupportsIndex, *, level: SupportsIndex = 1) -> SpteWords:
        """Say in words what an spte is.

        Parameters
        ----------
        spte : int
        level : int
            The level it stands at, 1…5: an entry does not say itself whether it is a 4 KiB leaf or points to a table.

        Raises
        ------
        OverflowError
            ``spte`` is outside 0…2^64−1.
        ArgumentError
            ``level`` is outside 1…5.
        """
        word = index_u64("spte", spte)
        at = index_in("level", level, 1, 5)
        if word == self.empty:
            return SpteWords(word, at, "empty", {})
        if word == self.empty | TABLE["REMOVED_SPTE"]:
            return SpteWords(word, at, "removed", {"being torn down by": "the TDP MMU"})
        seen = self._core.inspect(word, at)
        mmio = self._core.split(word)
        # A mapping whose broken bits are those of the mask is still a mapping: no mmio spte has KVM's present bit.
        if mmio is not None and not seen["present"]:
            gfn, access, gen = mmio
            return SpteWords(
                word, at, "mmio", {"gfn": gfn, "gpa": gfn << 12, "access": _rights(access), "generation": gen}
            )
        if not seen["present"]:
            return SpteWords(word, at, "not present", {"known to KVM": False})
        facts: dict[str, int | str | bool] = {"pfn": seen["pfn"], "hpa": seen["pfn"] << 12}
        if self.c_bit is not None and self.mmu != "ept":
            facts["encrypted"] = bool(word >> self.c_bit & 1)
        read = seen["user"] if self.mmu == "ept" else True
        letters = [("R", read), ("W", seen["writable"]), ("X", seen["executable"])]
        if self.mmu != "ept":
            letters.append(("U", seen["user"]))
        facts["rights"] = "".join(letter if held else "-" for letter, held in letters)
        if seen["ad_disabled"]:
            facts["A/D bits"] = "off"
        elif seen["write_protect_only"]:
            facts["A/D bits"] = "dirty by write protection"
        if seen["leaf"]:
            facts.update(self._leaf_facts(seen))
        elif seen["accessed"] is not None:
            facts["accessed"] = bool(seen["accessed"])
        reserved = self._core.reserved(word, at)
        if reserved:
            facts["reserved bits"] = f"{reserved:#x}"
        return SpteWords(word, at, "leaf" if seen["leaf"] else "table", facts)

    def _leaf_facts(self, seen: _core._SpteFacts) -> dict[str, int | str | bool]:
        facts: dict[str, int | str | bool] = {}
        for name in ("accessed", "dirty"):
            held = seen[name]
            if held is not None:
                facts[name] = bool(held)
        facts["host-writable"] = seen["host_writable"]
        facts["MMU-writable"] = seen["mmu_writable"]
        if seen["access_tracked"]:
            saved = seen["saved_bits"]
            facts["access-tracked, saved"] = ("R" if saved & 1 else "-") + ("X" if saved & 4 else "-")
        memory_type = seen["memory_type"]
        if memory_type is not None:
            name = _MEMORY_TYPES.get(memory_type, f"reserved {memory_type}")
            facts["memory type"] = name + (", PAT ignored" if seen["ignore_pat"] else "")
        return facts


def _rights(access: int) -> str:
    return "".join(
        letter if access & TABLE[name] else "-" for letter, name in (("X", "ACC_X"), ("W", "ACC_W"), ("U", "ACC_U"))
    )


def _is_scalar(value: Words) -> TypeGuard[SupportsIndex]:
    if isinstance(value, np.ndarray):
        return False
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def decode(spte: SupportsIndex, *, mmu: Mmu = "shadow", host: SpteHost | None = None, level: int = 1) -> SpteWords:
    """Say in words what an spte of ``host`` (default: 46 address bits, no L1TF) is; see ``SpteFormat.decode``."""
    made_by = SpteFormat(mmu) if host is None else SpteFormat.of(host, mmu)
    return made_by.decode(spte, level=level)
