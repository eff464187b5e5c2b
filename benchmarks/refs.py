"""The structs of ``ref_walk.c`` and a guest to walk, shared by the benchmarks."""

import ctypes
from ctypes import c_uint32, c_uint64

import numpy as np
import numpy.typing as npt

PAGE = 4096
PRESENT_WRITABLE_USER = 7
ACCESSED_DIRTY = 0x60
LONG_MODE = {"cr0": 0x80010001, "cr4": 0x20, "efer": 0xD00}


class Memory(ctypes.Structure):
    _fields_ = [
        ("n", c_uint32),
        ("last", c_uint32),
        ("start", c_uint64 * 16),
        ("end", c_uint64 * 16),
        ("host", c_uint64 * 16),
    ]

    @classmethod
    def of(cls, *areas: tuple[int, int, int]) -> "Memory":
        """Areas as (first byte, last byte, host address)."""
        memory = cls(n=len(areas))
        for i, (start, end, host) in enumerate(areas):
            memory.start[i], memory.end[i], memory.host[i] = start, end, host
        return memory


class Paging(ctypes.Structure):
    _fields_ = [
        ("root", c_uint64),
        ("reserved", c_uint64 * 5 * 2),
        *((name, c_uint32) for name in ("wp", "nx", "smep", "smap")),
    ]

    @classmethod
    def long_mode(cls, root: int, maxphyaddr: int) -> "Paging":
        """CR0.WP = 1, EFER.NXE = 1, no SMEP, no SMAP; reserved bits by SDM vol. 3A section 4.5."""
        p = cls(root=root, wp=1, nx=1)
        high = (1 << 52) - (1 << maxphyaddr)
        for level in range(1, 5):
            p.reserved[0][level] = high
            large = (1 << 12 + 9 * (level - 1)) - (1 << 13) if level in (2, 3) else 0
            p.reserved[1][level] = high | large | (0x80 if level == 4 else 0)
        return p


def aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed bytes at a page boundary."""
    backing = np.zeros(nbytes + PAGE, np.uint8)
    return backing[-backing.ctypes.data % PAGE :][:nbytes]


def map_pages(words: npt.NDArray[np.uint64], root: int, free: int, pairs: list[tuple[int, int]]) -> int:
    """Enter 4 KiB mappings (gva, gpa) into 4-level tables at ``root``; new tables stand from ``free`` on."""
    bits = PRESENT_WRITABLE_USER | ACCESSED_DIRTY
    for gva, gpa in pairs:
        table = root
        for level in (4, 3, 2):
            at = (table >> 3) + (gva >> 12 + 9 * (level - 1) & 511)
            if not words[at]:
                words[at] = free | bits
                free += PAGE
            table = int(words[at]) & ~0xFFF
        words[(table >> 3) + (gva >> 12 & 511)] = gpa | bits
    return free


def pointer(array: npt.NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
