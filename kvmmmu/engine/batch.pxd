# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Many addresses through one set of tables: the same rows as one by one, at the memory's speed.

A row takes the first of these that knows it: the page before it (``batch_run``), the cache of lowest tables
with its leaf fetched ahead (``batch_ring``), the walk's own step for a leaf that is not plainly granted,
and the walk itself (``translate_proper``), in order.

Rows may be finished out of order because nothing that was accepted can change: a batch stores A and D bits alone,
all for one kind of access, and what was accepted has those it needs; D in an entry that leads on says nothing.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport (
    WALK_FAULT, WALK_LEAF, Walk, walk_ad_wanted, walk_finish, walk_rights, walk_step,
)
from kvmmmu.bits.paging cimport FAULT_NONE, FMT_32, FMT_64, FMT_NONE, FMT_PAE, Paging
from kvmmmu.engine.accept cimport Accept, accept_init, accepted
from kvmmmu.engine.pdecache cimport (
    FOUND_LARGE, FOUND_NOTHING, TABLE_RIGHTS, LargePage, PdeCache, leaf_load, leaf_place, pde_find, pde_init,
    pde_large_page,
)
from kvmmmu.engine.ring cimport RING_FREE, RING_ROWS, Ring, ring_init
from kvmmmu.engine.state cimport MemMap, Translation
from kvmmmu.engine.translate cimport translate_each, translate_proper, translate_row

cdef extern from "kvmmmu/batch.h" nogil:
    void prefetch "kvmmmu_prefetch"(uint64_t address)

cdef enum:
    BATCH_WALK = 0    # kernels: one by one
    BATCH_RING = 1
    BATCH_GATHER = 2  # AVX-512
    BATCH_LEAST = 48  # rows for which the caches' own cost is worth it

cdef struct Batch:
    PdeCache cache
    Accept accept         # of leaves in the lowest tables
    uint64_t nothing      # where a row's leaf stands that has none: not present
    const Paging *none    # no second dimension
    const uint64_t *gvas
    Translation *out


cdef inline void batch_granted(int fmt, const Batch *b, int64_t i, uint32_t above, uint64_t entry) noexcept nogil:
    """A row whose 4 KiB leaf was accepted."""
    cdef Translation *t = &b.out[i]
    cdef uint64_t gva = b.gvas[i]
    t.gva = gva
    t.gpa = (entry & b.cache.paging.addr_mask) | (gva & 0xfff)
    t.error_code = 0
    t.fault_gpa = 0
    t.entry = entry
    t.fault = FAULT_NONE
    t.page_shift = 12
    t.access = <uint8_t>(above & walk_rights(fmt, entry))
    t.level = LEVEL_4K
    t.unused = 0


cdef inline void batch_large(const Batch *b, int64_t i, const LargePage *large) noexcept nogil:
    cdef Translation *t = &b.out[i]
    t.gva = b.gvas[i]
    t.gpa = large.base | (t.gva & large.offset)
    t.error_code = 0
    t.fault_gpa = 0
    t.entry = large.entry
    t.fault = FAULT_NONE
    t.page_shift = large.page_shift
    t.access = large.access
    t.level = large.level
    t.unused = 0


cdef inline bint batch_leaf(int fmt, const Batch *b, int64_t i, uint64_t place) noexcept nogil:
    """The walk's last step and its finish, where the tables above are known.  False: A or D is to be set."""
    cdef const Paging *p = b.cache.paging
    cdef uint64_t va = b.gvas[i] & p.va_mask
    cdef Walk w
    cdef int r
    w.va = va
    w.access = b.cache.access
    w.ac = b.cache.ac
    w.level = LEVEL_4K
    w.entry_gpa = 0
    w.acc = <uint32_t>place & TABLE_RIGHTS
    w.accessed = p.accessed
    w.fault = FAULT_NONE
    w.error_code = 0
    w.gpa = 0
    r = walk_step(fmt, p, &w, leaf_load(fmt, place, va))
    if r == WALK_LEAF:
        r = walk_finish(p, &w)
    if r == WALK_LEAF and b.cache.set_ad and walk_ad_wanted(p, &w):
        return False
    b.out[i].gva = b.gvas[i]
    translate_row(&w, w.fault, w.gpa, 0, &b.out[i])
    return True


cdef inline bint batch_unusual(int fmt, Batch *b, int64_t i, uint64_t place) noexcept nogil:
    """A row that no cache knows, all rows before it being done.  True: A or D bits were set."""
    if place != <uint64_t>&b.nothing and batch_leaf(fmt, b, i, place):
        return False
    b.out[i].gva = b.gvas[i]
    return translate_proper(b.cache.paging, b.none, b.cache.map, b.cache.hint, b.gvas[i], b.cache.access, b.cache.ac,
                            b.cache.set_ad, &b.out[i])


cdef inline uint64_t batch_place(int fmt, Batch *b, uint64_t va) noexcept nogil:
    """Where the leaf of an address stands; FOUND_LARGE; or ``nothing``."""
    cdef uint64_t found = pde_find(fmt, &b.cache, va)
    if found > FOUND_LARGE:
        return leaf_place(fmt, found, va)
    return found if found == FOUND_LARGE else <uint64_t>&b.nothing


# ---- the ring -------------------------------------------------------------------------

cdef inline void batch_finish(int fmt, Batch *b, int64_t i, uint64_t place) noexcept nogil:
    cdef uint32_t above = <uint32_t>place & TABLE_RIGHTS
    cdef uint64_t entry = leaf_load(fmt, place, b.gvas[i])
    if accepted(fmt, b.cache.paging, &b.accept, above, entry):
        batch_granted(fmt, b, i, above, entry)
    else:
        batch_unusual(fmt, b, i, place)


cdef inline void batch_drain(int fmt, Batch *b, Ring *ring, uint64_t turn) noexcept nogil:
    """Finish what is in flight, the oldest first."""
    cdef uint64_t k
    for k in range(turn, turn + RING_ROWS):
        if ring.row[k & (RING_ROWS - 1)] != RING_FREE:
            batch_finish(fmt, b, ring.row[k & (RING_ROWS - 1)], ring.place[k & (RING_ROWS - 1)])
            ring.row[k & (RING_ROWS - 1)] = RING_FREE


# ---- the same page again ----------------------------------------------------------------

cdef inline int64_t batch_repeat(Batch *b, int64_t i, int64_t n, uint64_t offset) noexcept nogil:
    """Rows after ``i`` that lie in the same page are its row again; the first that does not."""
    cdef const Translation *first = &b.out[i]
    cdef uint64_t page = first.gva & ~offset, base = first.gpa & ~offset, entry = first.entry, gva
    cdef uint8_t page_shift = first.page_shift, access = first.access, level = first.level
    cdef Translation *t
    i += 1
    while i < n:
        gva = b.gvas[i]
        if gva & ~offset != page:
            break
        t = &b.out[i]
        t.gva = gva
        t.gpa = base | (gva & offset)
        t.error_code = 0
        t.fault_gpa = 0
        t.entry = entry
        t.fault = FAULT_NONE
        t.page_shift = page_shift
        t.access = access
        t.level = level
        t.unused = 0
        i += 1
    return i


cdef inline int64_t batch_refused(Batch *b, int64_t i, int64_t n) noexcept nogil:
    """As ``batch_repeat`` for a fault: it stored nothing, and the next access of the page ends as it did."""
    cdef const Translation *first = &b.out[i]
    cdef uint64_t page = first.gva >> 12
    i += 1
    while i < n and b.gvas[i] >> 12 == page:
        b.out[i] = first[0]
        b.out[i].gva = b.gvas[i]
        i += 1
    return i


cdef inline int64_t batch_run(int fmt, Batch *b, Ring *ring, uint64_t turn, int64_t i, int64_t n) noexcept nogil:
    """A row and those after it in the same page; the first row not done."""
    cdef uint64_t va = b.gvas[i] & b.cache.paging.va_mask, entry
    cdef uint64_t place = batch_place(fmt, b, va)
    cdef uint32_t above = <uint32_t>place & TABLE_RIGHTS
    if place == FOUND_LARGE:
        batch_large(b, i, pde_large_page(fmt, &b.cache, va))
        return batch_repeat(b, i, n, pde_large_page(fmt, &b.cache, va).offset)
    entry = leaf_load(fmt, place, va)
    if accepted(fmt, b.cache.paging, &b.accept, above, entry):
        batch_granted(fmt, b, i, above, entry)
        return batch_repeat(b, i, n, 0xfff)
    batch_drain(fmt, b, ring, turn)
    if batch_unusual(fmt, b, i, place):
        return i + 1
    if b.out[i].fault != FAULT_NONE:
        return batch_refused(b, i, n)
    return batch_repeat(b, i, n, 0xfff)


# ---- loops ------------------------------------------------------------------------------

cdef inline void batch_ring(int fmt, Batch *b, int64_t i, int64_t n) noexcept nogil:
    """Rows ``i`` to ``n``."""
    cdef const uint64_t *gvas = b.gvas
    cdef uint64_t va, place, turn = 0, va_mask = b.cache.paging.va_mask
    cdef int64_t row
    cdef Ring ring
    ring_init(&ring)
    while i < n:
        if i + 1 < n and not (gvas[i] ^ gvas[i + 1]) >> 12:
            i = batch_run(fmt, b, &ring, turn, i, n)
            continue
        va = gvas[i] & va_mask
        place = batch_place(fmt, b, va)
        if place == FOUND_LARGE:
            batch_large(b, i, pde_large_page(fmt, &b.cache, va))
            i += 1
            continue
        prefetch(place)
        row = ring.row[turn]
        if row != RING_FREE:
            batch_finish(fmt, b, row, ring.place[turn])
        ring.row[turn] = i
        ring.place[turn] = place
        turn = (turn + 1) & (RING_ROWS - 1)
        i += 1
    batch_drain(fmt, b, &ring, turn)


cdef inline void batch_one(int fmt, Batch *b, int64_t n, int kernel) noexcept nogil:
    batch_ring(fmt, b, 0, n)


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
    cdef int[2] hint = [0, 0]
    cdef Batch b
    if (kernel == BATCH_WALK or n < BATCH_LEAST or host.format != FMT_NONE or p.format == FMT_NONE
            or batch_overlaps(m, gvas, n, out)):
        translate_each(p, host, m, gvas, n, access, ac, set_ad, out)
        return
    pde_init(&b.cache, p, m, hint, access, ac, set_ad)
    accept_init(p, access, ac, set_ad, &b.accept)
    b.nothing = 0
    b.none = host
    b.gvas = gvas
    b.out = out
    # Literals: each loop is compiled for its format.
    if p.format == FMT_64:
        batch_one(FMT_64, &b, n, kernel)
    elif p.format == FMT_PAE:
        batch_one(FMT_PAE, &b, n, kernel)
    else:
        batch_one(FMT_32, &b, n, kernel)
