# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Building maps of frames.  A published map is never edited: clone it, change the clone, publish that."""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memmove
from kvmmmu.engine.state cimport MemMap


cdef inline int capacity_step(int n) noexcept nogil:
    """``n`` rounded up in steps of about an eighth: tables that grow by one ask malloc for one size over and over."""
    cdef int step = 16
    while step < n >> 3:
        step <<= 1
    return (n + step - 1) & ~(step - 1)


cdef inline MemMap *memmap_new(int capacity) noexcept nogil:
    """One block: the header and its columns."""
    capacity = capacity_step(capacity)
    cdef size_t n = <size_t>capacity
    cdef MemMap *m = <MemMap *>malloc(sizeof(MemMap) + n * (8 + 8 + sizeof(void *) + 1))
    if m == NULL:
        return NULL
    m.n = 0
    m.capacity = capacity
    m.serial = 0
    m.first = <uint64_t *>(m + 1)
    m.npages = m.first + n
    m.host = <uint8_t **>(m.npages + n)
    m.writable = <uint8_t *>(m.host + n)
    return m


cdef inline MemMap *memmap_clone(const MemMap *old, int spare) noexcept nogil:
    cdef MemMap *m = memmap_new(old.n + spare)
    if m == NULL:
        return NULL
    m.n = old.n
    memcpy(m.first, old.first, <size_t>old.n * 8)
    memcpy(m.npages, old.npages, <size_t>old.n * 8)
    memcpy(m.host, old.host, <size_t>old.n * sizeof(void *))
    memcpy(m.writable, old.writable, <size_t>old.n)
    return m


cdef inline int memmap_upper(const MemMap *m, uint64_t frame) noexcept nogil:
    """Index of the first area that begins after ``frame``."""
    cdef int lo = 0
    cdef int hi = m.n
    cdef int mid
    while lo < hi:
        mid = (lo + hi) >> 1
        if m.first[mid] <= frame:
            lo = mid + 1
        else:
            hi = mid
    return lo


cdef inline void memmap_open_gap(MemMap *m, int at, int count) noexcept nogil:
    """Move the areas from ``at`` on by ``count`` places (down when negative)."""
    cdef size_t tail = <size_t>(m.n - at)
    memmove(m.first + at + count, m.first + at, tail * 8)
    memmove(m.npages + at + count, m.npages + at, tail * 8)
    memmove(m.host + at + count, m.host + at, tail * sizeof(void *))
    memmove(m.writable + at + count, m.writable + at, tail)
    m.n += count


cdef inline void memmap_insert(MemMap *m, uint64_t first, uint64_t npages, uint8_t *host,
                               uint8_t writable) noexcept nogil:
    """Add an area where none stands; the caller made room for one more."""
    cdef int at = memmap_upper(m, first)
    memmap_open_gap(m, at, 1)
    m.first[at] = first
    m.npages[at] = npages
    m.host[at] = host
    m.writable[at] = writable


cdef inline void memmap_cut(MemMap *m, uint64_t first, uint64_t npages) noexcept nogil:
    """Take frames out; all of them stand in the map, and it has room for one more area."""
    cdef int at
    cdef uint64_t before
    cdef uint64_t after
    cdef uint64_t n
    cdef uint8_t *host
    cdef uint8_t writable
    while npages:
        at = memmap_upper(m, first) - 1
        host = m.host[at]
        writable = m.writable[at]
        before = first - m.first[at]
        n = m.npages[at] - before
        if n > npages:
            n = npages
        after = m.npages[at] - before - n
        if before:
            m.npages[at] = before
        else:
            memmap_open_gap(m, at + 1, -1)
        if after:
            memmap_insert(m, first + n, after, host + ((before + n) << 12), writable)
        first += n
        npages -= n
