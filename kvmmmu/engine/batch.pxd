# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Many addresses through one set of tables: the same rows as one by one, at the memory's speed.

A row takes the first of these that knows it: the page before it (``rows``), the cache of lowest tables
(``pdecache``) with its leaf fetched ahead (``ring``, ``gather``) and granted by one compare (``accept``), the
walk's own step for a leaf that is not plainly granted, and the walk itself (``walk``), in order.

Rows may be finished out of order because nothing that was accepted can change: a batch stores A and D bits alone,
all for one kind of access, and what was accepted has those it needs; D in an entry that leads on says nothing.
"""

from libc.stdint cimport int64_t, uint8_t, uint64_t
from kvmmmu.bits.paging cimport FMT_32, FMT_64, FMT_EPT, FMT_NONE, Paging
from kvmmmu.engine.accept cimport accept_init
from kvmmmu.engine.gather cimport gather_rows
from kvmmmu.engine.nested cimport nested_rows
from kvmmmu.engine.nestedcache cimport Nested, nested_init
from kvmmmu.engine.pdecache cimport pde_init
from kvmmmu.engine.ring cimport ring_rows
from kvmmmu.engine.rows cimport Batch
from kvmmmu.engine.state cimport MemMap, Translation
from kvmmmu.engine.translate cimport translate_each

cdef enum:
    BATCH_WALK = 0    # kernels: one by one
    BATCH_RING = 1
    BATCH_GATHER = 2  # AVX-512
    BATCH_LEAST = 48  # rows for which the caches' own cost is worth it
    STRETCH = 1024    # rows that the ring does when too few are plain for the vector kernel


cdef inline void batch_rows(Batch *b, int64_t n, int kernel) noexcept nogil:
    cdef int64_t i = 0, end
    # A literal: the loop is compiled for either width of entries.
    if b.cache.paging.format == FMT_32:
        ring_rows(FMT_32, b, 0, n)
        return
    while i < n:
        end = n
        if kernel == BATCH_GATHER:
            i = gather_rows(b, i, n)
            if n - i > STRETCH:
                end = i + STRETCH
        ring_rows(FMT_64, b, i, end)
        i = end


cdef inline bint batch_overlaps(const MemMap *m, const uint64_t *gvas, int64_t n,
                                const Translation *out) noexcept nogil:
    """The rows lie in the memory walked, or over the addresses: then their order is everything."""
    cdef const uint8_t *first = <const uint8_t *>out
    cdef const uint8_t *end = <const uint8_t *>(out + n)
    cdef int i
    if first < <const uint8_t *>(gvas + n) and <const uint8_t *>gvas < end:
        return True
    for i in range(m.n):
        if m.host[i] != NULL and first < m.host[i] + (m.npages[i] << 12) and m.host[i] < end:
            return True
    return False


cdef inline void translate_many(const Paging *p, const Paging *host, const MemMap *m, const uint64_t *gvas, int64_t n,
                                uint64_t access, bint ac, bint set_ad, int kernel, Translation *out) noexcept nogil:
    """Rows as ``translate_each`` gives them.  ``kernel``: BATCH_*."""
    cdef int[2] hint = [0, 0]
    cdef Batch b
    cdef Nested nested
    if (kernel == BATCH_WALK or n < BATCH_LEAST or (p.format == FMT_NONE and host.format == FMT_NONE)
            or batch_overlaps(m, gvas, n, out)):
        translate_each(p, host, m, gvas, n, access, ac, set_ad, out)
        return
    if host.format != FMT_NONE:
        nested_init(&nested, p, host, m, hint, access, ac, set_ad)
        nested.guest.nothing = 0
        nested.guest.none = host
        nested.guest.gvas = gvas
        nested.guest.out = out
        if host.format == FMT_EPT:
            nested_rows(FMT_EPT, &nested, host, n)
        else:
            nested_rows(FMT_64, &nested, host, n)
        return
    pde_init(&b.cache, p, m, hint, access, ac, set_ad)
    accept_init(p, access, ac, set_ad, &b.accept)
    b.nothing = 0
    b.none = host
    b.gvas = gvas
    b.out = out
    batch_rows(&b, n, kernel)
