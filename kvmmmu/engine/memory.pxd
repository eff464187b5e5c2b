# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Frames to host bytes: the one lookup that every walk reads memory through."""

from libc.stdint cimport uint8_t, uint64_t
from kvmmmu.engine.state cimport MemMap


cdef enum:
    MANY_AREAS = 1024  # so many do not stay in the first-level cache, beside what else is in use


cdef inline const uint64_t *memmap_quarters(const uint64_t *base, uint64_t frame, int *n) noexcept nogil:
    """Where a few areas are left of many: three loads side by side wait as long as one."""
    cdef int quarter
    while n[0] > 8:
        quarter = n[0] >> 2
        base += quarter * ((base[quarter] <= frame) + (base[2 * quarter] <= frame) + (base[3 * quarter] <= frame))
        n[0] -= 3 * quarter
    return base


cdef inline int memmap_find(const MemMap *m, uint64_t frame, int *hint) noexcept nogil:
    """Index of the area that holds ``frame``, or -1.

    The last hit is tried first (and checked, so a stale hint is harmless), then a
    branchless binary search over the contiguous ``first`` column; a long one is quartered,
    because three loads side by side wait as long as one.
    """
    cdef int i = hint[0]
    if i < m.n and frame - m.first[i] < m.npages[i]:
        return i
    if m.n == 0:
        return -1
    cdef const uint64_t *base = m.first
    cdef int n = m.n
    cdef int half
    if n > MANY_AREAS:
        base = memmap_quarters(base, frame, &n)
    while n > 1:
        half = n >> 1
        base = base + half if base[half] <= frame else base
        n -= half
    i = <int>(base - m.first)
    if frame - m.first[i] < m.npages[i]:
        hint[0] = i
        return i
    return -1


cdef inline uint8_t *memmap_host(const MemMap *m, uint64_t address, int *hint, bint *writable) noexcept nogil:
    """Host address of a byte, or NULL where no memory stands.

    What follows it up to the end of its 4 KiB page is memory too.
    """
    cdef int i = memmap_find(m, address >> 12, hint)
    if i < 0 or m.host[i] == NULL:
        return NULL
    writable[0] = m.writable[i]
    return m.host[i] + (address - (m.first[i] << 12))
