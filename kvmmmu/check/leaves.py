"""What single leaves and mmio sptes may say."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvmmmu.check.links import spte_name
from kvmmmu.check.snapshot import ENTRIES, MMIO_GENERATION, Role, SlotColumns, Snapshot
from kvmmmu.constants import TABLE
from kvmmmu.errors import Violation

_GENERATION_MASK = (1 << 19) - 1
_IN_PROGRESS = 1 << 63
_RENEWED = "a sync renews the mmio sptes of a page without looking for a slot"
_OTHER_SPACE = "the record goes by the generation of address space 0, whatever the vCPU's own"


def _leaves(s: Snapshot) -> list[tuple[int, int]]:
    return [(page, entry) for page, entry in np.argwhere(s.leaf).tolist()]


def _mask(s: Snapshot, bits: int) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = (s.sptes & np.uint64(bits)) != 0
    return mask


def writability(s: Snapshot) -> Iterator[Violation]:
    """W needs MMU-writable, and MMU-writable needs host-writable (I6)."""
    w, mmu, host = _mask(s, 2), _mask(s, s.mmu_writable), _mask(s, s.host_writable)
    for page, entry in np.argwhere(s.leaf & (w & ~mmu | mmu & ~host)).tolist():
        bits = ", ".join(
            f"{name} {int(column[page, entry])}"
            for name, column in (("host-writable", host), ("MMU-writable", mmu), ("W", w))
        )
        yield Violation("writability", spte_name(s, page * ENTRIES + entry), f"has {bits}")


def large_leaves(s: Snapshot) -> Iterator[Violation]:
    """A large leaf lies in one slot and one run of frames, and may be written only where nothing forbids it (I7)."""
    name = "large leaves"
    bits = np.uint64(2 | s.mmu_writable)
    for page, entry in np.argwhere(s.leaf & (s.level > 1)[:, None]).tolist():
        where, level = spte_name(s, page * ENTRIES + entry), int(s.level[page])
        gfn, pfn, size = int(s.gfn[page, entry]), int(s.pfn[page, entry]), 1 << 9 * (level - 1)
        if gfn % size or pfn % size:
            yield Violation(name, where, f"gfn {gfn:#x} and pfn {pfn:#x} are not multiples of {size:#x}")
            continue
        slot = s.spaces[Role.as_id(s.role(page))].at(gfn)
        if slot is None or gfn + size > slot.base_gfn + slot.npages:
            yield Violation(name, where, f"{size:#x} pages from gfn {gfn:#x} are not all in one slot")
            continue
        place = gfn - slot.base_gfn
        if not any(
            first <= place and place + size <= first + n and host >= level
            for first, n, _, host in _segments(slot.segments)
        ):
            yield Violation(name, where, f"the host does not back gfn {gfn:#x} with a page of level {level}")
        forbidden = int(slot.disallow[level][(gfn >> 9 * (level - 1)) - (slot.base_gfn >> 9 * (level - 1))])
        if forbidden and s.sptes[page, entry] & bits:
            yield Violation(name, where, f"may be written with {forbidden} reasons against a large page")


def _segments(column: npt.NDArray[np.uint64]) -> list[tuple[int, int, int, int]]:
    return [(int(first), int(n), int(pfn), int(level) & 0xFF) for first, n, pfn, level in column.tolist()]


def rights(s: Snapshot) -> Iterator[Violation]:
    """No leaf permits more than the guest's tables and the slot together (I8)."""
    name = "rights"
    fetch = (s.sptes & np.uint64(s.x | s.nx)) == np.uint64(s.x)
    write, user = _mask(s, 2), _mask(s, s.user)
    for page, entry in _leaves(s):
        where, role = spte_name(s, page * ENTRIES + entry), s.role(page)
        above = Role.access(role)
        own = int(s.shadowed[page, entry]) & 7 if Role.has_gptes(role) else above
        # With CR0.WP = 0 the supervisor may write a read-only page, which then is the supervisor's alone.
        wp0 = 2 if not role & Role.CR0_WP and own & 2 and not own & 4 else 0
        if own & ~(above | wp0):
            yield Violation(name, where, f"stands for rights {own}, its page has {above}")
        granted = int(fetch[page, entry]) | int(write[page, entry]) << 1 | int(user[page, entry]) << 2
        if granted & ~own:
            yield Violation(name, where, f"grants {granted} of the rights {own}")
        slot = s.spaces[Role.as_id(role)].at(int(s.gfn[page, entry]))
        if slot is not None and slot.readonly and s.sptes[page, entry] & np.uint64(2 | s.host_writable):
            yield Violation(name, where, f"may be written, slot {slot.id} is read-only")


def frames(s: Snapshot) -> Iterator[Violation]:
    """A leaf's frame is the one its slot has for its gfn, or the host's zero page, read-only (I1)."""
    for page, entry in _leaves(s):
        gfn, pfn = int(s.gfn[page, entry]), int(s.pfn[page, entry])
        slot = s.spaces[Role.as_id(s.role(page))].at(gfn)
        wanted = None if slot is None else slot.pfn(gfn)
        zero = pfn == 0 and not int(s.sptes[page, entry]) & (2 | s.host_writable)
        if wanted is None or (wanted != pfn and not zero):
            expected = "no slot there" if wanted is None else f"{wanted:#x}"
            where = spte_name(s, page * ENTRIES + entry)
            yield Violation("frames", where, f"maps gfn {gfn:#x} to pfn {pfn:#x}, expected {expected}")


def encryption(s: Snapshot) -> Iterator[Violation]:
    """Where the host's kernel encrypts its memory every mapping and every link, PAE roots too, carries the C-bit."""
    bits = np.uint64(TABLE["PT_ADDR_MASK"] & ~s.address)
    roots = (s.pages["special"] != 0)[:, None] & s.live[:, None] & (s.sptes != 0)
    wrong = (s.present | roots) & ((s.sptes & bits) != np.uint64(s.me))
    for page, entry in np.argwhere(wrong).tolist():
        found = int(s.sptes[page, entry] & bits)
        yield Violation("encryption", spte_name(s, page * ENTRIES + entry), f"has {found:#x}, expected {s.me:#x}")


def mmio(s: Snapshot) -> Iterator[Violation]:
    """An mmio spte of the current generation names a gfn without a slot (I9); other absent entries are empty."""
    name = "mmio"
    for page, entry in np.argwhere(s.mmio).tolist():
        spte, space = int(s.sptes[page, entry]), s.spaces[Role.as_id(s.role(page))]
        where = spte_name(s, page * ENTRIES + entry)
        gpa = spte & s.nonpresent_low_gfn | spte >> 5 & s.nonpresent_or_rsvd
        gen = spte >> 3 & 0xFF | (spte >> 52 & 0x7FF) << 8
        if s.mmio_scheme == MMIO_GENERATION:
            if gen == space.generation & _GENERATION_MASK and space.at(gpa >> 12) is not None:
                hole = _RENEWED if Role.has_gptes(s.role(page)) else ""
                yield Violation(name, where, f"is current, but gfn {gpa >> 12:#x} has a slot", hole)
            if gen & 1 != space.as_id:
                yield Violation(name, where, f"has generation {gen} of the other space")
        if s.level[page] != 1:
            yield Violation(name, where, f"is at level {s.level[page]}, expected 1")
        if s.role(page) & Role.DIRECT and gpa >> 12 != s.gfn[page, entry]:
            yield Violation(name, where, f"names gfn {gpa >> 12:#x}, expected {s.gfn[page, entry]:#x}")
    stray = (s.sptes != s.nothing[:, None]) & (s.shadow | s.tdp)[:, None] & ~s.present & ~s.mmio
    for page, entry in np.argwhere(stray).tolist():
        found = f"is neither present nor an mmio spte, expected {int(s.nothing[page]):#x}"
        yield Violation(name, spte_name(s, page * ENTRIES + entry), found)


def generation(s: Snapshot) -> Iterator[Violation]:
    """A generation is even in address space 0 and odd in 1; no update is in flight (I11)."""
    name = "generation"
    for space in s.spaces:
        if space.generation & 1 != space.as_id or space.generation & _IN_PROGRESS:
            yield Violation(name, f"address space {space.as_id}", f"generation is {space.generation:#x}")
    for vcpu in s.vcpus:
        if vcpu.mmio_generation & _IN_PROGRESS:
            yield Violation(name, f"vCPU {vcpu.id}", f"its MMIO record has generation {vcpu.mmio_generation:#x}")
        fresh = s.mmio_scheme == MMIO_GENERATION and vcpu.mmio_generation == s.spaces[0].generation
        if fresh and vcpu.mmio_gfn and s.spaces[vcpu.as_id].at(vcpu.mmio_gfn) is not None:
            found = f"its MMIO record is current, but gfn {vcpu.mmio_gfn:#x} has a slot"
            hole = _OTHER_SPACE if vcpu.as_id else "" if vcpu.root_role & Role.DIRECT else _RENEWED
            yield Violation(name, f"vCPU {vcpu.id}", found, hole)


def _in_log(slot: SlotColumns, first: int, pages: int) -> bool:
    if slot.dirty is None:
        return False
    words = slot.dirty[first >> 6 : (first + pages + 63) >> 6].astype("<u8")
    every = (1 << pages) - 1
    return int.from_bytes(words.tobytes(), "little") >> (first & 63) & every == every


def dirty_log(s: Snapshot) -> Iterator[Violation]:
    """What KVM does not see the guest write of a logged slot is in the log, of a large leaf every page (I12).

    Large leaves stay writable where logging began with every page set, until a part of the log is cleared.
    """
    name = "dirty log"
    for page, entry in np.argwhere(s.leaf & _mask(s, 2)).tolist():
        gfn, level = int(s.gfn[page, entry]), int(s.level[page])
        slot = s.spaces[Role.as_id(s.role(page))].at(gfn)
        if slot is None or not slot.logged or _in_log(slot, gfn - slot.base_gfn, 1 << 9 * (level - 1)):
            continue
        where = spte_name(s, page * ENTRIES + entry)
        if level != 1:
            yield Violation(name, where, f"maps {slot.id}, a logged slot, at level {level}")
        else:
            yield Violation(name, where, f"may be written, gfn {gfn:#x} is not in the dirty log")
