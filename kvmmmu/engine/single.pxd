# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""One translation for one call from Python: what a batch sets up once would cost more here than the walk.

The 64-bit format, whose levels stand here one after the other, says "yes" only where ``walk.pxd`` would give the
same translation; everything else is walked as ``quick.pxd`` and ``walk.pxd`` do.
"""

from libc.stdint cimport uint8_t, uint64_t
from kvmmmu.bits.access cimport permission_index
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport walk_entry_offset, walk_rights
from kvmmmu.bits.paging cimport DIALECT_SDM, FMT_64, FMT_NONE, Paging, permission_fault, va_canonical
from kvmmmu.engine.atomics cimport ld_acquire_u64
from kvmmmu.engine.quick cimport Quick
from kvmmmu.engine.state cimport MemMap


cdef inline bint single_walk(const Paging *p, const MemMap *m, int hint, uint64_t va, uint64_t access, bint ac,
                             bint set_ad, Quick *q) noexcept nogil:
    # Tables rarely stand in two areas: the one that the last walk ended in, or it is unusual.
    cdef const uint8_t *memory = m.host[hint]
    cdef uint64_t start = m.first[hint] << 12
    cdef uint64_t nbytes = m.npages[hint] << 12
    # Each load waits for the one before: what can be added up beside it is, and judged at the end.
    cdef uint64_t at, offset, entry = p.root, mask = p.addr_mask
    cdef uint64_t every = ALL_ONES  # bits that all entries have
    cdef uint64_t some = 0          # bits that one has
    cdef uint64_t bad = 0           # reserved bits that one has
    cdef int level = LEVEL_4K
    va &= p.va_mask
    if not va_canonical(va, p.va_shift) or va & p.va_limit or memory == NULL:
        return False
    if p.levels == LEVEL_256T:
        at = (entry & mask) + (walk_entry_offset(FMT_64, va, LEVEL_256T) - start)
        if at >= nbytes:
            return False
        entry = ld_acquire_u64(<const uint64_t *>(memory + at))
        if not entry & PT_PRESENT_MASK:
            return False
        every &= entry
        some |= entry
        bad |= entry & (p.rsvd[0][<int>LEVEL_256T] | PT_PAGE_SIZE_MASK)
    at = (entry & mask) + (walk_entry_offset(FMT_64, va, LEVEL_512G) - start)
    if at >= nbytes:
        return False
    entry = ld_acquire_u64(<const uint64_t *>(memory + at))
    if not entry & PT_PRESENT_MASK:
        return False
    every &= entry
    some |= entry
    bad |= entry & (p.rsvd[0][<int>LEVEL_512G] | PT_PAGE_SIZE_MASK)
    at = (entry & mask) + (walk_entry_offset(FMT_64, va, LEVEL_1G) - start)
    if at >= nbytes:
        return False
    entry = ld_acquire_u64(<const uint64_t *>(memory + at))
    if not entry & PT_PRESENT_MASK:
        return False
    every &= entry
    some |= entry
    if entry & PT_PAGE_SIZE_MASK:
        level = LEVEL_1G
        bad |= entry & p.rsvd[1][<int>LEVEL_1G]
    else:
        bad |= entry & p.rsvd[0][<int>LEVEL_1G]
        at = (entry & mask) + (walk_entry_offset(FMT_64, va, LEVEL_2M) - start)
        if at >= nbytes:
            return False
        entry = ld_acquire_u64(<const uint64_t *>(memory + at))
        if not entry & PT_PRESENT_MASK:
            return False
        every &= entry
        some |= entry
        if entry & PT_PAGE_SIZE_MASK:
            level = LEVEL_2M
            bad |= entry & p.rsvd[1][<int>LEVEL_2M]
        else:
            bad |= entry & p.rsvd[0][<int>LEVEL_2M]
            at = (entry & mask) + (walk_entry_offset(FMT_64, va, LEVEL_4K) - start)
            if at >= nbytes:
                return False
            entry = ld_acquire_u64(<const uint64_t *>(memory + at))
            # Bit 7 is PAT here; where it mattered, the general walk would say so.
            bad |= entry & (p.rsvd[0][<int>LEVEL_4K] | p.rsvd[1][<int>LEVEL_4K])
            every &= entry
            some |= entry
    if not every & PT_PRESENT_MASK or bad:
        return False
    if set_ad and ((every & p.accessed) != p.accessed or access & PFERR_WRITE and p.dirty & ~entry):
        return False
    # Every entry may take rights away: W and U where it lacks them, X where it has NX.
    q.acc = walk_rights(FMT_64, (every & ~PT64_NX_MASK) | (some & PT64_NX_MASK))
    if (p.permissions[permission_index(access, ac)] >> q.acc) & 1:
        return False
    if p.pke and permission_fault(p, access, q.acc, ac, <uint32_t>((entry >> PT_PKEY_SHIFT) & 15)):
        return False
    q.entry = entry
    q.entry_gpa = start + at
    q.level = level
    offset = (ONE << (3 + 9 * level)) - 1
    q.gpa = (entry & mask & ~offset) | (va & offset)
    return True


cdef inline bint single_flat(const Paging *p, const Paging *host, const MemMap *m) noexcept nogil:
    """``single_walk`` may be asked."""
    return p.format == FMT_64 and p.dialect == DIALECT_SDM and host.format == FMT_NONE and m.n > 0
