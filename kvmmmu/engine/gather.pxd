# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Eight rows at once (``kvmmmu/gather.h``), with everything that its lanes hand back done here, row by row."""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from kvmmmu.engine.accept cimport Accept
from kvmmmu.engine.pdecache cimport FOUND_LARGE, Pdes
from kvmmmu.engine.memory cimport prefetch
from kvmmmu.engine.rows cimport Batch, row_again, row_place, rows_same, rows_same_unusual
from kvmmmu.engine.state cimport Translation

cdef extern from "kvmmmu/gather.h" nogil:
    int gather_here "kvmmmu_gather_here"()
    struct Gather "kvmmmu_gather":
        const Pdes *pdes
        const Accept *accept
        const uint64_t *gvas
        Translation *out
        uint64_t va_mask
        uint64_t addr_mask
        int64_t next
        int64_t end
        uint64_t issued
        uint64_t finished
        int64_t row[4]
        uint64_t place[4][8]
    enum:
        GATHER_UNKNOWN "KVMMMU_GATHER_UNKNOWN"
        GATHER_ODD "KVMMMU_GATHER_ODD"
        GATHER_SAME "KVMMMU_GATHER_SAME"
    uint32_t gather_run "kvmmmu_gather_run"(Gather *g)

cdef enum:
    LANES = 8         # as KVMMMU_LANES
    GROUPS = 4
    MANY_ODD = 64     # rows to be done again, if they are a quarter of all: time for the ring


cdef inline int gather_odd(Batch *b, int64_t row, uint32_t lanes) noexcept nogil:
    """The rows of a group that were not plainly granted; how many."""
    cdef int lane, count = 0
    for lane in range(LANES):
        if (lanes >> lane) & 1:
            row_again(b, row + lane)
            count += 1
    return count


cdef inline void gather_lookup(Batch *b, Gather *g, uint32_t lanes) noexcept nogil:
    """Fill in where the leaves of the next group stand, for the lanes whose table was not known; issue it."""
    cdef uint64_t *place = g.place[g.issued % GROUPS]
    cdef uint64_t found
    cdef int lane
    for lane in range(LANES):
        if (lanes >> lane) & 1:
            found = row_place(b, g.next + lane)
            place[lane] = <uint64_t>&b.nothing if found == FOUND_LARGE else found
        prefetch(place[lane])
    g.issued += 1
    g.next += LANES


cdef inline void gather_init(Gather *g, const Batch *b) noexcept nogil:
    g.pdes = &b.cache.pdes
    g.accept = &b.accept
    g.gvas = b.gvas
    g.out = b.out
    g.va_mask = b.cache.paging.va_mask
    g.addr_mask = b.cache.paging.addr_mask
    g.issued = 0
    g.finished = 0


cdef inline int64_t gather_rows(Batch *b, int64_t i, int64_t n) noexcept nogil:
    """Rows from ``i`` on, eight at once while most are plain; the first row not done."""
    cdef Gather g
    cdef uint32_t trouble
    cdef int64_t row
    cdef int odd = 0
    cdef bint stop = False
    gather_init(&g, b)
    g.next = i
    g.end = n
    while True:
        trouble = gather_run(&g)
        if trouble & GATHER_ODD:
            odd += gather_odd(b, g.row[(g.finished - 1) % GROUPS], trouble & 0xff)
            if odd > MANY_ODD and odd > (g.next - i) >> 2:
                stop = True
                g.end = g.next
        elif trouble & GATHER_UNKNOWN:
            gather_lookup(b, &g, trouble & 0xff)
        elif trouble & GATHER_SAME:
            row = rows_same(b, g.next, n, row_place(b, g.next))
            if row == g.next:
                # Finish what is in flight first.
                if g.issued != g.finished:
                    g.end = g.next
                    continue
                row = rows_same_unusual(b, row, n)
            g.next = row
        elif stop or n - g.next < LANES:
            return g.next
        else:
            g.end = n
