# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Frames to host bytes: the one lookup that every walk reads memory through."""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from kvmmmu.bits.constants cimport ALL_ONES
from kvmmmu.engine.state cimport MEMMAP_LINE, MEMMAP_NODE, MemMap

cdef extern from "kvmmmu/batch.h" nogil:
    void prefetch "kvmmmu_prefetch"(uint64_t address)


# Keys stand in ascending order; the first of those that are asked is known not to be above ``frame``.
# Compares that do not wait for each other, and no branch to guess.

cdef inline int64_t place_of_4(const uint64_t *key, uint64_t frame) noexcept nogil:
    return <int64_t>(key[1] <= frame) + (key[2] <= frame) + (key[3] <= frame)


cdef inline int64_t line_place(const uint64_t *key, uint64_t frame) noexcept nogil:
    """Place of the last of MEMMAP_LINE keys that is not above ``frame``."""
    cdef int64_t at = 4 * <int64_t>(key[4] <= frame)
    return at + place_of_4(key + at, frame)


cdef inline int64_t node_below(const uint64_t *level, int64_t at, uint64_t frame) noexcept nogil:
    """Where the node of the level below begins that a node's keys lead to, given where the node does."""
    cdef const uint64_t *key = level + at
    cdef int64_t quarter = 4 * (<int64_t>(key[4] <= frame) + (key[8] <= frame) + (key[12] <= frame))
    return (at + quarter + place_of_4(key + quarter, frame)) * MEMMAP_NODE


cdef inline int64_t memmap_line(const MemMap *m, uint64_t frame) noexcept nogil:
    """Where the line of ``first`` begins in which the area of ``frame`` stands, if any does.

    Up to 32,768 areas no loop counts the levels, which would be a third of the search.
    """
    cdef int64_t at = 0
    cdef int level
    if m.levels == 0:
        return 0
    if m.levels > 1:
        if m.levels > 2:
            for level in range(m.levels - 1, 2, -1):
                at = node_below(m.level[level], at, frame)
            at = node_below(m.level[2], at, frame)
        at = node_below(m.level[1], at, frame)
    return node_below(m.level[0], at, frame) * MEMMAP_LINE // MEMMAP_NODE


cdef inline int memmap_search(const MemMap *m, uint64_t frame, int *hint, const void *column) noexcept nogil:
    cdef uint64_t key = frame & (ALL_ONES >> 1)  # below what fills up a line, whatever was asked for
    cdef int64_t i = memmap_line(m, key)
    prefetch(<uint64_t>(m.npages + i))
    prefetch(<uint64_t>(<const uint64_t *>column + i))
    i += line_place(m.first + i, key)
    if frame - m.first[i] < m.npages[i]:
        hint[0] = <int>i
        return <int>i
    return -1


cdef inline int memmap_find(const MemMap *m, uint64_t frame, int *hint, const void *column) noexcept nogil:
    """Index of the area that holds ``frame``, or -1.

    The last hit is tried first (and checked, so a stale hint is harmless), then the index is
    come down.  ``column``, of pointers, is what the caller reads next: its line is fetched with
    the two that are read here, so that they are waited for together.
    """
    cdef int i = hint[0]
    if i < m.n and frame - m.first[i] < m.npages[i]:
        return i
    return memmap_search(m, frame, hint, column)


cdef inline uint8_t *memmap_host(const MemMap *m, uint64_t address, int *hint, bint *writable) noexcept nogil:
    """Host address of a byte, or NULL where no memory stands.

    What follows it up to the end of its 4 KiB page is memory too.
    """
    cdef int i = memmap_find(m, address >> 12, hint, m.host)
    if i < 0 or m.host[i] == NULL:
        return NULL
    writable[0] = m.writable[i]
    return m.host[i] + (address - (m.first[i] << 12))
