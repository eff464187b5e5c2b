"""Guest memory: which host buffers stand at which guest physical addresses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EEXIST, EINVAL
from typing import Any, Final, Literal

from kvmmmu._arguments import index_of, index_u64
from kvmmmu._core import VmCore
from kvmmmu.errors import ArgumentError, MemslotError, VmClosedError

__all__ = ["MemSlot", "MemSlots", "slot_number"]

LOG_DIRTY_PAGES: Final = 1
READONLY: Final = 2
ADDRESS_SPACES: Final = 2
SLOT_IDS: Final = 32764

_BACKINGS: Final[dict[str | None, int]] = {None: 0, "4K": 1, "2M": 2, "1G": 3}
_BACKING_NAMES: Final = {1: "4K", 2: "2M", 3: "1G"}

# One line per reason the engine gives; KVM itself only says errno.
_REASONS: Final = {
    "id": "slot id {detail} is not allowed: 0 to 32763",
    "flags": "flags {detail:#x} hold an unknown flag: allowed are 1 (log dirty pages) and 2 (read-only)",
    "size_align": "size {detail:#x} is not a multiple of 4096",
    "gpa_align": "gpa {detail:#x} is not a multiple of 4096",
    "hva_align": "memory begins at a host address whose last 12 bits are {detail:#x}: a multiple of 8 is needed",
    "as_id": "address space {detail} does not exist: 0 (normal) and 1 (SMM)",
    "wrap": "gpa {detail:#x} plus the size is beyond 2^64",
    "too_many_pages": "{detail} pages are too many for a slot: at most 2^31-1",
    "no_slot": "there is no slot {detail}",
    "total_pages": "{detail} more pages overflow the number of pages of the VM",
    "hva_changed": "slot {detail} has other memory: it cannot be exchanged, delete the slot first",
    "size_changed": "the slot has {detail:#x} bytes: its size cannot change, delete it first",
    "readonly_changed": "the slot has flags {detail:#x}: read-only cannot be switched, delete the slot first",
    "overlap": "slot id {detail} of that address space has some of these gfns already",
    "max_gfn": "the slot ends beyond gfn {detail:#x}, the last this host can map",
    "no_memory": "the host has no memory for the slot's tables",
    "incongruent": "memory overlaps a bound buffer {detail} bytes off its pages: both must agree modulo 4096",
    "backing": "some of this memory is bound with pages of size {detail}: give the same page_size or none",
    "held": "slot {detail} is being deleted: the slots cannot change until that is over",
    "live_sptes": "slot {detail} is mapped: moving it then crashes the host under Linux 3.1, so nothing was done",
    "no_frames": "no {detail} free frames in a row: the host's maxphyaddr bounds them",
}


@dataclass(frozen=True)
class MemSlot:
    """One memslot as it stood when it was looked up.

    Attributes
    ----------
    number : int
        ``as_id << 16 | id``, KVM's slot argument.
    gpa, size : int
        First guest physical address and length, in bytes.
    flags : int
        1 dirty pages are logged, 2 the guest cannot write.
    memory : object
        The bound buffer.
    """

    number: int
    gpa: int
    size: int
    flags: int
    memory: Any

    @property
    def id(self) -> int:
        """Id within the address space."""
        return self.number & 0xFFFF

    @property
    def as_id(self) -> int:
        """Address space: 0 normal, 1 SMM."""
        return self.number >> 16

    @property
    def readonly(self) -> bool:
        """Guest writes leave the VM as MMIO."""
        return bool(self.flags & READONLY)

    @property
    def log_dirty(self) -> bool:
        """Writes are recorded in the dirty bitmap."""
        return bool(self.flags & LOG_DIRTY_PAGES)

    def __repr__(self) -> str:
        marks = ", readonly" * self.readonly + ", log_dirty" * self.log_dirty
        return f"MemSlot({self.number}, gpa={self.gpa:#x}, size={self.size:#x}{marks})"


class MemSlots(Mapping[int, MemSlot]):
    """The memslots of a VM, by slot number (``as_id << 16 | id``), in order of address.

    A slot binds a buffer (NumPy array, ``mmap``, ``bytearray`` …) of bytes or integers, C-contiguous,
    8-byte aligned, of whole pages.  It is exported once and held until the slot is gone, so a
    ``bytearray`` cannot be resized meanwhile.  Host bytes have one frame number each, however many
    slots bind them.  The rules are those of KVM_SET_USER_MEMORY_REGION (Linux
    Documentation/virt/kvm/api.rst section 4.35).
    """

    def __init__(self, core: VmCore) -> None:
        self._core = core

    # -- mapping

    def __getitem__(self, number: int) -> MemSlot:
        found = self._core.slot(number)
        if found is None:
            raise KeyError(number)
        return MemSlot(*found)

    def __iter__(self) -> Iterator[int]:
        for as_id in range(ADDRESS_SPACES):
            for entry in self._core.slots(as_id):
                yield entry[0]

    def __len__(self) -> int:
        return sum(self._core.slot_count(as_id) for as_id in range(ADDRESS_SPACES))

    def __repr__(self) -> str:
        return f"MemSlots({list(self.values())})"

    def at(self, gpa: int, *, as_id: int = 0) -> MemSlot | None:
        """The slot that holds a guest physical address, or None."""
        found = self._core.find_gfn(index_u64("gpa", gpa) >> 12, _space(as_id))
        return None if found is None else self[found[0]]

    # -- changes

    def create(
        self,
        gpa: int,
        memory: Any,
        slot: int | None = None,
        *,
        readonly: bool = False,
        log_dirty: bool = False,
        as_id: int = 0,
        page_size: Literal["4K", "2M", "1G"] | None = None,
        pfn_offset: int = 0,
    ) -> MemSlot:
        """Bind a buffer at a guest physical address.

        Parameters
        ----------
        gpa : int
            First guest physical address, a multiple of 4096.
        memory : buffer
            C-contiguous bytes or integers, 8-byte aligned, whole pages.  A read-only buffer makes
            a read-only slot.
        slot : int, optional
            Id of the slot, 0 to 32763; the lowest free one by default.
        readonly : bool
            Guest writes leave the VM as MMIO.
        log_dirty : bool
            Record writes in a dirty bitmap.
        as_id : {0, 1}
            Address space: normal or SMM.
        page_size : {"4K", "2M", "1G"}, optional
            Largest page the host backs the buffer with, which bounds the size of mappings.  Without
            it "4K", or what was said when another slot bound the same bytes.
        pfn_offset : int
            Frames of a buffer begin this many pages after a 1 GiB boundary, 0 to 2^18-1.

        Returns
        -------
        MemSlot

        Raises
        ------
        MemslotError
            ``errno`` EINVAL, EEXIST or ENOMEM by KVM's rules; nothing has changed.
        ArgumentError
            The buffer is empty, not contiguous or not of bytes or integers, or an option is unknown.
        OverflowError
            A number is negative or too large.
        """
        space = _space(as_id)
        if page_size not in _BACKINGS:
            raise ArgumentError(f"page_size = {page_size!r}: allowed are '4K', '2M', '1G' and None")
        if slot is None:
            slot = self._core.free_slot_id(space)
            if slot < 0:
                raise MemslotError(EINVAL, "every slot id from 0 to 32763 is in use")
        number = slot_number(slot)
        if number >= SLOT_IDS:
            raise MemslotError(EINVAL, _REASONS["id"].format(detail=number))
        number |= space << 16
        if self._core.slot(number) is not None:
            raise MemslotError(EEXIST, f"slot {number} exists: delete it, or use move or set_flags")
        if memory is None:
            raise TypeError("memory must be a buffer (NumPy array, mmap, bytearray), not None")
        flags = READONLY * bool(readonly) | LOG_DIRTY_PAGES * bool(log_dirty)
        self._apply(number, flags, gpa, None, memory, _BACKINGS[page_size], pfn_offset)
        return self[number]

    def delete(self, slot: int | MemSlot) -> None:
        """Delete a slot and release its buffer.

        Raises
        ------
        MemslotError
            EINVAL when there is no such slot.
        """
        number = slot_number(slot)
        found = self._core.slot(number)
        self._apply(number, 0, found[1] if found else 0, 0, None)

    @contextmanager
    def deleting(self, slot: int | MemSlot) -> Iterator[None]:
        """Delete a slot and stand still half-way, for as long as the block runs.

        Inside it the slot is marked INVALID and nothing maps it any more: a vCPU that touches it faults again and
        again (``Outcome.HANG``), as in KVM while the ioctl is under way.  At its end the slot is gone.

        Raises
        ------
        MemslotError
            EINVAL when there is no such slot; EBUSY for every other change inside the block.
        """
        number = slot_number(slot)
        found = self._core.slot(number)
        self._apply(number, 0, found[1] if found else 0, 0, None, hold=True)
        try:
            yield
        finally:
            if not self._core.is_closed:
                self._core.finish_delete()

    def move(self, slot: int | MemSlot, gpa: int) -> MemSlot:
        """Let a slot stand at another guest physical address; its memory stays.

        Raises
        ------
        MemslotError
            EINVAL or EEXIST by KVM's rules.  A move beyond the last gfn is refused as KVM refuses it:
            the slots are as before, but the generation has grown by 4 and shadow pages are gone.
        """
        number = slot_number(slot)
        found = self._core.slot(number)
        self._apply(number, found[3] if found else 0, gpa, None, None)
        return self[number]

    def set_flags(self, slot: int | MemSlot, *, log_dirty: bool) -> MemSlot:
        """Switch dirty logging of a slot.

        Raises
        ------
        MemslotError
            EINVAL when there is no such slot.
        """
        number = slot_number(slot)
        found = self._core.slot(number)
        flags = (found[3] if found else 0) & ~LOG_DIRTY_PAGES | LOG_DIRTY_PAGES * bool(log_dirty)
        self._apply(number, flags, found[1] if found else 0, None, None)
        return self[number]

    def set_region(
        self,
        slot: int,
        *,
        flags: int = 0,
        gpa: int = 0,
        size: int | None = None,
        memory: Any = None,
        page_size: Literal["4K", "2M", "1G"] | None = None,
        pfn_offset: int = 0,
    ) -> None:
        """One KVM_SET_USER_MEMORY_REGION, nothing added: what happens follows from its arguments.

        Parameters
        ----------
        slot : int
            ``as_id << 16 | id``.
        flags : int
            1 log dirty pages, 2 read-only.
        gpa : int
        size : int, optional
            Bytes; 0 deletes.  By default all of ``memory``.
        memory : buffer, optional
            None stands for the memory the slot has.
        page_size, pfn_offset : optional
            As in ``create``.

        Raises
        ------
        MemslotError
            ``errno`` as KVM returns it.
        """
        if page_size not in _BACKINGS:
            raise ArgumentError(f"page_size = {page_size!r}: allowed are '4K', '2M', '1G' and None")
        self._apply(slot, flags, gpa, size, memory, _BACKINGS[page_size], pfn_offset)

    def generation(self, as_id: int = 0) -> int:
        """Generation of an address space: starts at ``as_id``, +2 per swap; bit 63 set while one is in flight."""
        return self._core.generation(_space(as_id))

    def _apply(
        self,
        slot: int,
        flags: int,
        gpa: int,
        size: int | None,
        memory: Any,
        backing: int = 0,
        pfn_offset: int = 0,
        *,
        hold: bool = False,
    ) -> None:
        err, reason, detail, _ = self._core.set_region(slot, flags, gpa, size, memory, backing, pfn_offset, hold)
        if not err:
            return
        if reason == "closed":
            raise VmClosedError("the VM was closed")
        shown = _BACKING_NAMES[detail] if reason == "backing" else detail
        raise MemslotError(err, _REASONS[reason].format(detail=shown))


def _space(as_id: int) -> int:
    number = index_of("as_id", as_id)
    if number not in range(ADDRESS_SPACES):
        raise MemslotError(EINVAL, _REASONS["as_id"].format(detail=as_id))
    return number


def slot_number(slot: int | MemSlot) -> int:
    """The number ``as_id << 16 | id`` of a slot, or of one given as a number."""
    number = slot.number if isinstance(slot, MemSlot) else index_of("slot", slot)
    if not 0 <= number < 2**32:
        raise OverflowError(f"slot = {number} is outside 0 ... 2^32-1")
    return number
