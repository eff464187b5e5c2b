# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Rows in flight: their leaves are on the way from memory; each is taken up again sixteen rows later, in order."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memset
from kvmmmu.bits.paging cimport FMT_32, FMT_64
from kvmmmu.engine.accept cimport accepted
from kvmmmu.engine.memory cimport prefetch
from kvmmmu.engine.pdecache cimport (
    FOUND_LARGE, KVMMMU_PDE_LARGE, PDE_SLOTS, TABLE_RIGHTS, LargePage, leaf_load, leaf_place, pde_shift,
)
from kvmmmu.engine.rows cimport (
    Batch, other_page, row_again, row_finish, row_granted, row_place, row_unusual, rows_same, rows_same_unusual,
)
from kvmmmu.engine.state cimport Translation
from kvmmmu.engine.translate cimport row_write

cdef extern from "kvmmmu/batch.h" nogil:
    bint likely "kvmmmu_likely"(bint condition)

cdef enum:
    RING_ROWS = 16

cdef struct Flight:
    Translation *row      # whose ``gva`` is written
    uint64_t place        # of its leaf (``leaf_place``)

cdef struct Ring:
    Flight[16] flights
    Translation nobody    # the row of a free slot, and its leaf: zeros, not present


cdef inline void flight_end(Ring *ring, Flight *f) noexcept nogil:
    f.row = &ring.nobody
    f.place = <uint64_t>&ring.nobody


cdef inline void ring_init(Ring *ring) noexcept nogil:
    cdef int k
    memset(&ring.nobody, 0, sizeof(Translation))
    for k in range(RING_ROWS):
        flight_end(ring, &ring.flights[k])


cdef inline Flight *ring_turn(Ring *ring, Flight *f) noexcept nogil:
    """The slot after this one: the oldest's, once this one holds a new row."""
    return &ring.flights[0] if not likely(f != &ring.flights[RING_ROWS - 1]) else f + 1


cdef inline void ring_drain(Batch *b, Ring *ring, Flight *f) noexcept nogil:
    """Finish what is in flight, the oldest first."""
    cdef int _
    for _ in range(RING_ROWS):
        if f.row != &ring.nobody:
            row_finish(b, f.row - b.out, f.place)
            flight_end(ring, f)
        f = ring_turn(ring, f)


cdef inline int64_t ring_same(Batch *b, Ring *ring, Flight *f, int64_t i, int64_t n, uint64_t place) noexcept nogil:
    """Rows of one page; the first one after them."""
    cdef int64_t row = rows_same(b, i, n, place)
    if row == i:
        ring_drain(b, ring, f)
        row = rows_same_unusual(b, i, n)
    return row


cdef inline void ring_unusual(Batch *b, const Ring *ring, const Flight *f) noexcept nogil:
    """What the slot holds is not plainly granted: a row that is not, or none."""
    if f.row != &ring.nobody:
        row_unusual(b, f.row - b.out, f.place)


cdef inline void ring_rows(int fmt, Batch *b, int64_t i, int64_t n) noexcept nogil:
    """Rows ``i`` to ``n``.  ``fmt``: FMT_32, or FMT_64 for entries of 8 bytes."""
    cdef const uint64_t *gvas = b.gvas
    cdef uint64_t gva, va, key, tag, place, entry, va_mask = b.cache.paging.va_mask
    cdef uint64_t addr_mask = b.cache.paging.addr_mask
    cdef const LargePage *large
    cdef uint32_t above
    cdef int64_t last = n - 1  # which has no row after it
    cdef Ring ring
    cdef Flight *f = &ring.flights[0]
    cdef Translation *row
    ring_init(&ring)
    while i < last:
        gva = gvas[i]
        va = gva & va_mask
        key = va >> pde_shift(fmt)
        tag = b.cache.pdes.tag[key & (PDE_SLOTS - 1)]
        if tag == key:
            place = leaf_place(fmt, b.cache.pdes.table[key & (PDE_SLOTS - 1)], va)
        elif tag == (key | KVMMMU_PDE_LARGE) and other_page(gva, gvas[i + 1]):
            large = &b.cache.large[key & (PDE_SLOTS - 1)]
            row_write(&b.out[i], gva, large.base | (gva & large.offset), large.entry, large.end)
            i += 1
            continue
        else:
            place = row_place(b, i)
            if place == FOUND_LARGE and other_page(gva, gvas[i + 1]):
                continue  # its slot says so now
        if not likely(other_page(gva, gvas[i + 1])):
            i = ring_same(b, &ring, f, i, n, place)
            continue
        row = &b.out[i]
        prefetch(place)
        row.gva = gva
        entry = leaf_load(fmt, f.place, f.row.gva)
        above = <uint32_t>f.place & TABLE_RIGHTS
        if likely(accepted(FMT_64, b.cache.paging, &b.accept, above, entry)):
            row_granted(f.row, f.row.gva, addr_mask, above, entry)
        else:
            ring_unusual(b, &ring, f)
        f.row = row
        f.place = place
        f = ring_turn(&ring, f)
        i += 1
    ring_drain(b, &ring, f)
    if i < n:
        row_again(b, i)
