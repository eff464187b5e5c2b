"""The host's side of a golden run: blocks of memory, memslots, and the ioctls an operation may be."""

from __future__ import annotations

from errno import EINVAL

import numpy as np
import numpy.typing as npt

from kvmmmu.errors import ArgumentError, MemslotError
from kvmmmu.golden import Script
from kvmmmu.vm import VM

__all__ = ["Host"]

_PAGE = 4096


class Host:
    """The memory blocks of a script and the slots that show them to the guest.

    Parameters
    ----------
    vm : VM
    script : Script
    """

    def __init__(self, vm: VM, script: Script) -> None:
        self.vm = vm
        self.script = script
        self.backs: dict[int, npt.NDArray[np.uint8]] = {
            back.id: np.zeros(back.size, np.uint8) for back in script.backs.values()
        }
        self._names = sorted((data.ctypes.data, data.size, number) for number, data in self.backs.items())
        self._declared: set[int] = set()
        for slot in script.slots:
            rc = self.set_slot(slot.id, slot.gpa, slot.size, slot.back, slot.boff, slot.flags)
            if rc:
                raise ArgumentError(f"{script.name}: slot {slot.id} is refused with errno {rc}")

    # -- memory

    def slot_bytes(self, gpa: int) -> tuple[npt.NDArray[np.uint8], int] | None:
        """The buffer behind a gpa and the offset in it; None where no slot is."""
        slot = self.vm.memslots.at(gpa)
        return None if slot is None else (slot.memory, gpa - slot.gpa)

    def read(self, gpa: int, size: int) -> bytes:
        """Guest memory as the host sees it, up to the end of a slot."""
        found = self.slot_bytes(gpa)
        return b"" if found is None else found[0][found[1] : found[1] + size].tobytes()

    def store(self, gpa: int, data: bytes) -> None:
        """Store what the guest stores by a translation it holds."""
        found = self.slot_bytes(gpa)
        assert found is not None
        found[0][found[1] : found[1] + len(data)] = np.frombuffer(data, np.uint8)

    def write(self, gpa: int, data: bytes) -> None:
        """The test program writes guest memory itself; bytes outside slots are lost."""
        try:
            self.vm.host_write(gpa, data)
        except ArgumentError:
            for at, byte in enumerate(data):
                if self.vm.memslots.at(gpa + at) is not None:
                    self.vm.host_write(gpa + at, bytes([byte]))

    def name(self, hva: int) -> str:
        """A host address as recordings name it."""
        for start, size, number in self._names:
            if start <= hva < start + size:
                return f"B{number}+{hva - start:#x}"
        return f"{hva:#x}"

    def frame_name(self, pfn: int) -> str:
        """The memory behind a host frame as recordings name it."""
        for hva, pages, first, *_ in self.vm._core.host_ranges():
            if first <= pfn < first + pages:
                return self.name(hva + (pfn - first) * _PAGE)
        return "zero"

    # -- ioctls; each returns 0 or a negative errno

    def set_slot(self, number: int, gpa: int, size: int, back: int, offset: int, flags: int) -> int:
        """KVM_SET_USER_MEMORY_REGION."""
        memory = self.backs[back][offset : offset + size] if size else None
        huge = self.script.backs[back].how == "thp"
        try:
            self.vm.memslots.set_region(
                number,
                flags=flags,
                gpa=gpa,
                size=size,
                memory=memory,
                page_size=None if not size else "2M" if huge else "4K",
                pfn_offset=(offset // _PAGE) & 511 if size else 0,
            )
        except MemslotError as error:
            return -(error.errno or EINVAL)
        if size and self.script.backs[back].how == "lazy" and number not in self._declared:
            self._declared.add(number)
            self.vm.host_untouched(number)
        return 0

    def delete_slot(self, number: int) -> int:
        """KVM_SET_USER_MEMORY_REGION with size 0."""
        try:
            slot = self.vm.memslots.get(number)
            self.vm.memslots.set_region(number, gpa=0 if slot is None else slot.gpa, size=0)
        except MemslotError as error:
            return -(error.errno or EINVAL)
        return 0

    def dirty(self, number: int, clear: bool) -> dict[str, str]:
        """KVM_GET_DIRTY_LOG, and KVM_CLEAR_DIRTY_LOG of the whole slot."""
        try:
            bitmap = self.vm.get_dirty_log(number)
        except MemslotError as error:
            return {"rc": str(-(error.errno or EINVAL))}
        base = self.vm.memslots[number].gpa // _PAGE
        dirty = np.flatnonzero(np.unpackbits(bitmap.view(np.uint8), bitorder="little"))
        answer = {"rc": "0", "pages": ",".join(f"{base + page:x}" for page in dirty.tolist())}
        if clear:
            try:
                self.vm.clear_dirty_log(number, bitmap)
                answer["clear"] = "0"
            except MemslotError as error:
                answer["clear"] = str(-(error.errno or EINVAL))
        return answer

    def dontneed(self, back: int, offset: int, length: int) -> int:
        """madvise(MADV_DONTNEED): the pages are gone, the next touch finds zeros."""
        start = self.backs[back][offset:].ctypes.data
        for slot in self.vm.memslots.values():
            low = max(start, slot.memory.ctypes.data)
            high = min(start + length, slot.memory.ctypes.data + slot.size)
            if low < high:
                first = (low - slot.memory.ctypes.data) // _PAGE
                self.vm.host_dontneed(slot, first_page=first, npages=(high - low) // _PAGE)
        return 0

    def limit_pages(self, n: int) -> int:
        """KVM_SET_NR_MMU_PAGES."""
        try:
            self.vm.set_nr_mmu_pages(n)
        except ArgumentError:
            return -EINVAL
        return 0
