# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Rows in flight: their leaves are on the way from memory; each is taken up again sixteen rows later, in order."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from kvmmmu.bits.paging cimport FMT_32, FMT_64
from kvmmmu.engine.accept cimport accepted
from kvmmmu.engine.memory cimport prefetch
from kvmmmu.engine.pdecache cimport (
    FOUND_LARGE, KVMMMU_PDE_LARGE, PDE_SLOTS, TABLE_RIGHTS, LargePage, leaf_load, leaf_place, pde_shift,
)
from kvmmmu.engine.rows cimport (
    Batch, row_finish, row_granted, row_place, row_unusual, rows_same, rows_same_unusual,
)
from kvmmmu.engine.state cimport Translation
from kvmmmu.engine.translate cimport row_write

cdef extern from "kvmmmu/batch.h" nogil:
    bint likely "kvmmmu_likely"(bint condition)

cdef enum:
    RING_ROWS = 16
    RING_FREE = -1

cdef struct Ring:
    int64_t row[16]       # RING_FREE: no row
    uint64_t place[16]    # of its leaf (``leaf_place``)


cdef inline void ring_init(Ring *ring) noexcept nogil:
    cdef int k
    for k in range(RING_ROWS):
        ring.row[k] = RING_FREE


cdef inline void ring_drain(Batch *b, Ring *ring, uint64_t turn) noexcept nogil:
    """Finish what is in flight, the oldest first."""
    cdef uint64_t k
    for k in range(turn, turn + RING_ROWS):
        if ring.row[k & (RING_ROWS - 1)] != RING_FREE:
            row_finish(b, ring.row[k & (RING_ROWS - 1)], ring.place[k & (RING_ROWS - 1)])
            ring.row[k & (RING_ROWS - 1)] = RING_FREE


cdef inline int64_t ring_same(Batch *b, Ring *ring, uint64_t turn, int64_t i, int64_t n) noexcept nogil:
    """Rows of one page; the first one after them."""
    cdef int64_t row = rows_same(b, i, n)
    if row == i:
        ring_drain(b, ring, turn)
        row = rows_same_unusual(b, i, n)
    return row


cdef inline void ring_rows(int fmt, Batch *b, int64_t i, int64_t n) noexcept nogil:
    """Rows ``i`` to ``n``.  ``fmt``: FMT_32, or FMT_64 for entries of 8 bytes."""
    cdef const uint64_t *gvas = b.gvas
    cdef uint64_t gva, va, key, tag, place, entry, turn = 0, va_mask = b.cache.paging.va_mask
    cdef uint64_t addr_mask = b.cache.paging.addr_mask
    cdef Translation *out = b.out
    cdef const LargePage *large
    cdef uint32_t above
    cdef int64_t row
    cdef Ring ring
    ring_init(&ring)
    while i < n:
        gva = gvas[i]
        if not likely(i + 1 >= n or (gva ^ gvas[i + 1]) >> 12 != 0):
            i = ring_same(b, &ring, turn, i, n)
            continue
        va = gva & va_mask
        key = va >> pde_shift(fmt)
        tag = b.cache.pdes.tag[key & (PDE_SLOTS - 1)]
        if likely(tag == key):
            place = leaf_place(fmt, b.cache.pdes.table[key & (PDE_SLOTS - 1)], va)
        else:
            place = FOUND_LARGE if tag == (key | KVMMMU_PDE_LARGE) else row_place(b, i)
            if place == FOUND_LARGE:
                large = &b.cache.large[key & (PDE_SLOTS - 1)]
                row_write(&out[i], gva, large.base | (gva & large.offset), large.entry, large.end)
                i += 1
                continue
        prefetch(place)
        row = ring.row[turn]
        if likely(row != RING_FREE):
            entry = leaf_load(fmt, ring.place[turn], gvas[row])
            above = <uint32_t>ring.place[turn] & TABLE_RIGHTS
            if likely(accepted(FMT_64, b.cache.paging, &b.accept, above, entry)):
                row_granted(&out[row], gvas[row], addr_mask, above, entry)
            else:
                row_unusual(b, row, ring.place[turn])
        ring.row[turn] = i
        ring.place[turn] = place
        turn = (turn + 1) & (RING_ROWS - 1)
        i += 1
    ring_drain(b, &ring, turn)
