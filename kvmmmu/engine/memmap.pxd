# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Building maps of frames.  A published map is never edited: clone it, change the clone, publish that."""

from libc.stdint cimport uint8_t, uint64_t
from libc.stdlib cimport malloc
from libc.string cimport memcpy, memmove, memset
from kvmmmu.bits.constants cimport ALL_ONES
from kvmmmu.engine.state cimport MEMMAP_LEVELS, MEMMAP_LINE, MEMMAP_NODE, MemMap

cdef enum:
    CACHE_LINE = 64


cdef inline int capacity_step(int n) noexcept nogil:
    """``n`` rounded up in steps of about an eighth: tables that grow by one ask malloc for one size over and over."""
    cdef int step = 16
    while step < n >> 3:
        step <<= 1
    return (n + step - 1) & ~(step - 1) if n else step


cdef inline int whole(int n, int unit) noexcept nogil:
    """``n`` rounded up to whole units, of which there is one at least."""
    return ((n + unit - 1) & -unit) if n else unit


cdef inline uint64_t column_size(int capacity) noexcept nogil:
    """Bytes of a column of words, and three cache lines more.

    A search reads one place of several columns: were they some power of two apart, these would share a set of the
    first-level cache.
    """
    return <uint64_t>capacity * 8 + 3 * CACHE_LINE


cdef inline uint64_t memmap_lay_out(MemMap *m, int capacity, uint64_t at) noexcept nogil:
    """Place the columns one after the other from ``at`` on, a multiple of CACHE_LINE; returns where they end.

    ``capacity`` is one that ``capacity_step`` gives.  From 0 on it is their size that is returned.
    """
    cdef uint64_t column = column_size(capacity)
    cdef int n = capacity // MEMMAP_LINE
    cdef int level
    m.first = <uint64_t *>at
    m.npages = <uint64_t *>(at + column)
    m.host = <uint8_t **>(at + 2 * column)
    at += 3 * column
    for level in range(MEMMAP_LEVELS):
        m.level[level] = <uint64_t *>at
        at += <uint64_t>whole(n, MEMMAP_NODE) * 8
        if n <= MEMMAP_NODE:
            break
        n = whole(n, MEMMAP_NODE) // MEMMAP_NODE
    m.writable = <uint8_t *>at
    return at + <uint64_t>capacity


cdef inline uint64_t columns_after(const void *header) noexcept nogil:
    """Where columns may begin that stand in one block with their header, given its end."""
    return (<uint64_t>header + CACHE_LINE - 1) & ~<uint64_t>(CACHE_LINE - 1)


cdef inline MemMap *memmap_new(int capacity) noexcept nogil:
    """One block: the header and its columns.  ``memmap_index`` it when its areas are in."""
    cdef MemMap sizes
    cdef MemMap *m
    capacity = capacity_step(capacity)
    m = <MemMap *>malloc(sizeof(MemMap) + CACHE_LINE + memmap_lay_out(&sizes, capacity, 0))
    if m == NULL:
        return NULL
    m.n = 0
    m.serial = 0
    memmap_lay_out(m, capacity, columns_after(m + 1))
    return m


cdef inline void memmap_index(MemMap *m) noexcept nogil:
    """What ``memmap_find`` comes down; to be called once the areas stand, before anybody searches."""
    cdef uint64_t *column = m.first
    cdef uint64_t *up
    cdef int unit = MEMMAP_LINE
    cdef int n = m.n
    cdef int i
    memset(m.npages + n, 0, <size_t>(whole(n, unit) - n) * 8)
    m.levels = 0
    while True:
        for i in range(n, whole(n, unit)):
            column[i] = ALL_ONES
        if n <= unit:
            return
        up = m.level[m.levels]
        n = whole(n, unit) // unit
        for i in range(n):
            up[i] = column[unit * i]
        m.levels += 1
        column = up
        unit = MEMMAP_NODE


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
