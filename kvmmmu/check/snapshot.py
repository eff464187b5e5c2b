"""A copy of the machine's state, column by column."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvmmmu import _core

__all__ = ["Role", "SlotColumns", "Snapshot", "Space"]

U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]

# The tags and field orders of kvmmmu/engine/snapshot.pxd.
_VM, _STATS, _PAGES, _SPTES, _SHADOWED, _UNSYNC_BITS, _DESCS, _HASH, _SPACE, _SLOT = range(1, 11)
_SEGMENTS, _RMAP_4K, _DISALLOW_2M, _WRITE_TRACK, _DIRTY, _VCPU, _RANGE = 11, 12, 15, 17, 18, 19, 20

_VM_FIELDS: Final = (
    "mmu used_pages max_pages indirect_pages valid_gen rmaps tdp_roots active_head active_tail active_n free top limit "
    "desc_top desc_free present user nx x host_writable mmu_writable mmio_value mmio_mask nonpresent_or_rsvd "
    "nonpresent_low_gfn mmio_caching ad_enabled mmio_scheme tdp_mmu total_pages "
    "nx_head nx_tail nx_huge_pages era empty address me"
).split()
_VCPU_FIELDS: Final = (
    "id as_id requests cpu_role root_role pae_root mmio_gva mmio_gfn mmio_access mmio_generation"
).split()

ENTRIES: Final = 512
LIST_FREE, LIST_ACTIVE, LIST_INVALID, LIST_CACHED = 1, 2, 3, 4
MMIO_GENERATION: Final = 2

_LAYOUTS: Final = _core.record_layouts()


def _dtype(name: str) -> np.dtype[Any]:
    fields, itemsize = _LAYOUTS[name]
    names, formats, offsets = zip(*fields, strict=True)
    return np.dtype({"names": list(names), "formats": list(formats), "offsets": list(offsets), "itemsize": itemsize})


PAGE: Final = _dtype("page")
DESC: Final = _dtype("desc")


class Role:
    """The fields of role words (arch/x86/include/asm/kvm_host.h, ``kvm_mmu_page_role``)."""

    DIRECT, INVALID, CR0_WP, FOUR_BYTE, PASSTHROUGH = 0x80, 0x800, 0x2000, 0x10, 0x40000

    @staticmethod
    def level(role: Any) -> Any:
        """1 to 5."""
        return role & 0xF

    @staticmethod
    def access(role: Any) -> Any:
        """Rights of the entries above: X 1, W 2, U 4."""
        return role >> 8 & 7

    @staticmethod
    def quadrant(role: Any) -> Any:
        """Which part of a 32-bit guest's table the page shadows."""
        return role >> 5 & 3

    @staticmethod
    def as_id(role: Any) -> Any:
        """Address space."""
        return role >> 24

    @staticmethod
    def has_gptes(role: Any) -> Any:
        """A guest table stands behind the page."""
        return (role & (Role.DIRECT | Role.PASSTHROUGH)) == 0


@dataclass
class SlotColumns:
    """One memslot and its columns, by place within the slot."""

    as_id: int
    id: int
    base_gfn: int
    npages: int
    flags: int
    base_pfn: int
    segments: U64 = field(default_factory=lambda: np.empty((0, 4), np.uint64))
    rmap: dict[int, U64] = field(default_factory=dict)
    disallow: dict[int, npt.NDArray[np.uint32]] = field(default_factory=dict)
    write_track: npt.NDArray[np.uint16] = field(default_factory=lambda: np.empty(0, np.uint16))
    dirty: U64 | None = None

    @property
    def readonly(self) -> bool:
        """The guest cannot write it."""
        return bool(self.flags & 2)

    @property
    def logged(self) -> bool:
        """Writes go into the dirty bitmap."""
        return bool(self.flags & 1)

    def pfn(self, gfn: int) -> int:
        """The frame behind a gfn of the slot."""
        page = gfn - self.base_gfn
        for first, npages, pfn in self.segments[:, :3].tolist():
            if first <= page < first + npages:
                return int(pfn) + page - int(first)
        raise ValueError(f"page {page} of slot {self.id} is in no segment")


@dataclass
class Space:
    """The slots of an address space, in order of gfn."""

    as_id: int
    generation: int
    slots: list[SlotColumns] = field(default_factory=list)

    def at(self, gfn: int) -> SlotColumns | None:
        """The slot of a gfn."""
        for slot in self.slots:
            if slot.base_gfn <= gfn < slot.base_gfn + slot.npages:
                return slot
        return None


@dataclass
class VcpuState:
    """What of a vCPU concerns shadow pages."""

    values: dict[str, int]
    roots: list[tuple[int, int]]  # (page, pgd): the current root, then the previous ones

    def __getattr__(self, name: str) -> int:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None


class Snapshot:
    """The state of a VM as it was when the copy was made.

    Parameters
    ----------
    words : array of uint64
        What ``VmCore.snapshot`` gives.

    Attributes
    ----------
    pages : structured array, shape (top,)
        Metadata by page id; 0 is never a page.
    sptes, shadowed : array of uint64, shape (top, 512)
        Entries, and what a guest table said where one stands behind the page (gfn << 12 | access).
    unsync_bits : array of bool, shape (top, 512)
    descs : structured array
        Blocks of spte lists; 0 is never a block.
    hash : array of int32
        Heads of the hash chains.
    spaces : list of Space
    vcpus : list of VcpuState
    ranges : list of (base pfn, pages, largest host page)
    stats : dict
        Counters of the VM.
    """

    def __init__(self, words: U64) -> None:
        self.values: dict[str, int] = {}
        self.stats: dict[str, int] = {}
        self.spaces: list[Space] = []
        self.vcpus: list[VcpuState] = []
        self.ranges: list[tuple[int, int, int]] = []
        raw = words.view(np.uint8)
        at = 0
        while at < words.size:
            tag, size = int(words[at]), int(words[at + 1])
            self._take(tag, raw[8 * (at + 2) : 8 * (at + 2) + size].copy())
            at += 2 + (size + 7) // 8

    def __getattr__(self, name: str) -> int:
        try:
            return self.__dict__["values"][name]  # type: ignore[no-any-return]
        except KeyError:
            raise AttributeError(name) from None

    def _take(self, tag: int, data: npt.NDArray[np.uint8]) -> None:
        if tag in (_VM, _STATS, _SPACE, _SLOT, _VCPU, _RANGE):
            self._take_numbers(tag, data.view(np.uint64).tolist())
        elif tag == _PAGES:
            self.pages = data.view(PAGE)
        elif tag == _SPTES:
            self.sptes = data.view(np.uint64).reshape(-1, ENTRIES)
        elif tag == _SHADOWED:
            self.shadowed = data.view(np.uint64).reshape(-1, ENTRIES)
        elif tag == _UNSYNC_BITS:
            self.unsync_bits = np.unpackbits(data, bitorder="little").reshape(-1, ENTRIES).astype(np.bool_)
        elif tag == _DESCS:
            self.descs = data.view(DESC)
        elif tag == _HASH:
            self.hash = data.view(np.int32)
        else:
            self._take_column(tag, self.spaces[-1].slots[-1], data)

    def _take_numbers(self, tag: int, numbers: list[int]) -> None:
        if tag == _VM:
            self.values = dict(zip(_VM_FIELDS, numbers, strict=True))
        elif tag == _STATS:
            self.stats = dict(zip(_core.VM_STATS_ORDER, numbers, strict=True))
        elif tag == _SPACE:
            self.spaces.append(Space(numbers[0], numbers[1]))
        elif tag == _SLOT:
            as_id, id, base_gfn, npages, flags, base_pfn = numbers
            self.spaces[-1].slots.append(SlotColumns(as_id, id, base_gfn, npages, flags, base_pfn))
        elif tag == _RANGE:
            self.ranges.append((numbers[0], numbers[1], numbers[2]))
        else:
            n = len(_VCPU_FIELDS)
            values = dict(zip(_VCPU_FIELDS, numbers[:n], strict=True))
            self.vcpus.append(VcpuState(values, list(zip(numbers[n::2], numbers[n + 1 :: 2], strict=True))))

    @staticmethod
    def _take_column(tag: int, slot: SlotColumns, data: npt.NDArray[np.uint8]) -> None:
        if tag == _SEGMENTS:
            slot.segments = data.view(np.uint64).reshape(-1, 4)
        elif _RMAP_4K <= tag < _DISALLOW_2M:
            slot.rmap[tag - _RMAP_4K + 1] = data.view(np.uint64)
        elif _DISALLOW_2M <= tag < _WRITE_TRACK:
            slot.disallow[tag - _DISALLOW_2M + 2] = data.view(np.uint32)
        elif tag == _WRITE_TRACK:
            slot.write_track = data.view(np.uint16)
        elif tag == _DIRTY:
            slot.dirty = data.view(np.uint64)
        else:
            raise ValueError(f"unknown section {tag} in a snapshot")

    # -- what the invariants ask for; computed on first use, so corrupt a snapshot before it is checked

    def role(self, page: int) -> int:
        """Role word of a page."""
        return int(self.pages["role"][page])

    @cached_property
    def live(self) -> Bools:
        """By page: it is in use, as a page of the shadow MMU, of the TDP MMU, or as a PAE root table."""
        live: Bools = ~np.isin(self.pages["on_list"], (LIST_FREE, LIST_CACHED))
        live[0] = False
        return live

    @cached_property
    def shadow(self) -> Bools:
        """By page: in use by the shadow MMU."""
        shadow: Bools = self.live & (self.pages["tdp"] == 0) & (self.pages["special"] == 0)
        return shadow

    @cached_property
    def tdp(self) -> Bools:
        """By page: in use by the TDP MMU."""
        tdp: Bools = self.live & (self.pages["tdp"] != 0)
        return tdp

    @cached_property
    def valid(self) -> Bools:
        """By page: in use by the shadow MMU and not zapped."""
        valid: Bools = self.shadow & ((self.pages["role"] & Role.INVALID) == 0)
        return valid

    @cached_property
    def level(self) -> npt.NDArray[np.uint32]:
        """By page: level of its role."""
        levels: npt.NDArray[np.uint32] = Role.level(self.pages["role"])
        return levels

    @cached_property
    def present(self) -> Bools:
        """By entry: shadow-present, in a page of either MMU."""
        present: Bools = (self.sptes >> np.uint64(11) & np.uint64(1)).astype(np.bool_)
        return present & (self.shadow | self.tdp)[:, None]

    @cached_property
    def leaf(self) -> Bools:
        """By entry: maps memory."""
        large = (self.sptes >> np.uint64(7) & np.uint64(1)).astype(np.bool_)
        leaf: Bools = self.present & ((self.level == 1)[:, None] | large)
        return leaf

    @cached_property
    def link(self) -> Bools:
        """By entry: points to a page."""
        return self.present & ~self.leaf

    @cached_property
    def nothing(self) -> U64:
        """By page: an entry of it that is empty."""
        return np.where(self.tdp, np.uint64(self.empty), np.uint64(0))

    @cached_property
    def pfn(self) -> U64:
        """By entry: bits 51:12, but for the C-bit."""
        return (self.sptes & np.uint64(self.address)) >> np.uint64(12)

    @cached_property
    def gfn(self) -> U64:
        """By entry: the gfn it stands for."""
        role = self.pages["role"]
        step = np.uint64(1) << (np.uint64(9) * (np.maximum(self.level, 1) - np.uint64(1)).astype(np.uint64))
        linear = self.pages["gfn"][:, None] + np.arange(ENTRIES, dtype=np.uint64)[None, :] * step[:, None]
        gfn: U64 = np.where(Role.has_gptes(role)[:, None], self.shadowed >> np.uint64(12), linear)
        return gfn

    @cached_property
    def mmio(self) -> Bools:
        """By entry: an mmio spte."""
        if not self.mmio_caching:
            return np.zeros(self.sptes.shape, np.bool_)
        match = (self.sptes & np.uint64(self.mmio_mask)) == np.uint64(self.mmio_value)
        mmio: Bools = match & (self.shadow | self.tdp)[:, None] & ~self.present
        return mmio

    def list(self, head: int) -> list[int]:
        """The entries of an spte list, by spte index (page * 512 + entry).

        A broken chain ends at the break; ``check.lists`` reports it.
        """
        if head & 3 == 1:
            return [head >> 2]
        found: list[int] = []
        block, seen = head >> 2 if head else 0, set[int]()
        while block and block not in seen and block < len(self.descs):
            seen.add(block)
            desc = self.descs[block]
            found += desc["sptes"][: min(int(desc["count"]), 14)].tolist()
            block = int(desc["more"])
        return found
