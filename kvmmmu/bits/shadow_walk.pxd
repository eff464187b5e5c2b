# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The lockless shadow walk: each spte is read once, and only what was read decides."""

from libc.stdint cimport uint32_t, uint64_t
from kvmmmu.bits.constants cimport *

cdef extern from "kvmmmu/atomics.h" nogil:
    uint64_t kvmmmu_ld_acquire_u64(const uint64_t *p)
    uint64_t kvmmmu_ready(uint64_t v)

cdef inline int shadow_walk(const uint64_t *arena, uint64_t table, int level, uint64_t address,
                            uint64_t *sptes) noexcept nogil:
    """Follow sptes from ``table`` down; returns the level of the last one read.

    ``sptes[level]`` receives every entry passed, ``sptes[0]`` the bits of all but the last.  The walk ends at
    level 1, at a large leaf, or at an entry that is not shadow-present, which may be empty, REMOVED or MMIO.
    """
    # A table's number is its place in the arena, so the address bits of an entry are the offset of the next table; the
    # arena holds 2^20 tables at most, and bits above are no part of it (a C-bit).
    cdef uint64_t offset = table << 12
    # The address, turned until the index of this level's entry, times its eight bytes, stands in the lowest bits.
    cdef uint64_t turned = address >> (9 * level) | address << (64 - 9 * level)
    cdef uint64_t spte, place, links = 0
    cdef uint64_t at = <uint64_t>level
    while True:
        # What the load before gave is added last.
        place = kvmmmu_ready(<uint64_t>arena + (turned & 0xff8))
        spte = kvmmmu_ld_acquire_u64(<const uint64_t *>(place + offset))
        sptes[at] = spte
        if at == LEVEL_4K or not spte & SPTE_MMU_PRESENT or spte & PT_PAGE_SIZE_MASK:
            sptes[0] = links
            return <int>at
        links |= spte
        turned = turned << 9 | turned >> 55
        offset = <uint32_t>spte & ~<uint32_t>4095
        at -= 1
