# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Many addresses through two sets of tables, every row in order.

Here an A or D bit may be set in what another format reads as something else (a guest table can be part of the
tables below it): after every such store all that is remembered is dropped, and the rows in flight are begun again.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport walk_rights
from kvmmmu.bits.paging cimport FAULT_EPT_VIOLATION, FAULT_NONE, FMT_32, FMT_64, FMT_PAE, Paging
from kvmmmu.engine.accept cimport accepted
from kvmmmu.engine.nestedcache cimport Nested, nested_fill, nested_forget, second_find
from kvmmmu.engine.memory cimport prefetch
from kvmmmu.engine.pdecache cimport (
    FOUND_LARGE, KVMMMU_PDE_LARGE, PDE_SLOTS, TABLE_RIGHTS, LargePage, leaf_load, leaf_place, pde_large_page,
    pde_shift,
)
from kvmmmu.engine.ring cimport RING_ROWS, Flight, Ring, flight_end, ring_init, ring_turn
from kvmmmu.engine.rows cimport Batch, other_page, rows_refused, rows_repeat
from kvmmmu.engine.translate cimport row_end, row_write, translate_one

cdef struct Flights:
    # Rows whose leaves are on the way.
    Ring ring
    Flight *turn          # the slot of the oldest
    int64_t next          # the next row to look up
    int64_t n             # rows of the batch
    int calm              # rows to walk one by one: bits were set a moment ago
    int rows              # in flight


cdef inline bint nested_proper(Nested *n, const Paging *host, int64_t i) noexcept nogil:
    """One row by itself.  True: A or D bits were set in memory."""
    cdef Batch *b = &n.guest
    return translate_one(b.cache.paging, host, b.cache.map, b.cache.hint, &n.window, b.gvas[i], b.cache.access,
                         b.cache.ac, b.cache.set_ad, &b.out[i])


cdef inline uint64_t nested_place(int fmt, int host_fmt, Nested *n, uint64_t va) noexcept nogil:
    """As ``row_place``."""
    cdef uint64_t key = va >> pde_shift(fmt)
    cdef uint64_t tag = n.guest.cache.pdes.tag[key & (PDE_SLOTS - 1)], found
    if tag == key:
        return leaf_place(fmt, n.guest.cache.pdes.table[key & (PDE_SLOTS - 1)], va)
    if tag == (key | KVMMMU_PDE_LARGE):
        return FOUND_LARGE
    found = nested_fill(fmt, host_fmt, n, va)
    if found > FOUND_LARGE:
        return leaf_place(fmt, found, va)
    return FOUND_LARGE if found == FOUND_LARGE else <uint64_t>&n.guest.nothing


cdef inline bint nested_granted(int fmt, int host_fmt, Nested *n, int64_t i, uint64_t place) noexcept nogil:
    """Write a row that both dimensions plainly grant; False: they do not."""
    cdef Batch *b = &n.guest
    cdef uint64_t gva = b.gvas[i], va = gva & b.cache.paging.va_mask, entry, gpa, end
    cdef uint32_t above = <uint32_t>place & TABLE_RIGHTS
    cdef const LargePage *large
    if place == FOUND_LARGE:
        large = pde_large_page(fmt, &b.cache, va)
        entry = large.entry
        gpa = large.base | (gva & large.offset)
        end = large.end
    else:
        entry = leaf_load(fmt, place, va)
        if not accepted(FMT_64, b.cache.paging, &b.accept, above, entry):
            return False
        gpa = (entry & b.cache.paging.addr_mask) | (gva & 0xfff)
        end = row_end(12, above & walk_rights(FMT_64, entry), LEVEL_4K)
    gpa = second_find(host_fmt, &n.final, &n.final_accept, gpa)
    if gpa == ALL_ONES:
        return False
    row_write(&b.out[i], gva, gpa, entry, end)
    return True


cdef inline void nested_again(Nested *n, Flights *f, int64_t row) noexcept nogil:
    """Bits were set by ``row``: whatever was read before counts no more."""
    nested_forget(n)
    ring_init(&f.ring)
    f.turn = &f.ring.flights[0]
    f.rows = 0
    f.next = row + 1
    f.calm = RING_ROWS


cdef inline bint nested_finish(int fmt, int host_fmt, Nested *n, const Paging *host, Flights *f) noexcept nogil:
    """Finish the oldest row in flight, if the next slot holds one.  False: the rows after it are begun again."""
    cdef int64_t row
    if f.turn.row == &f.ring.nobody:
        return True
    row = f.turn.row - n.guest.out
    if not nested_granted(fmt, host_fmt, n, row, f.turn.place) and nested_proper(n, host, row):
        nested_again(n, f, row)
        return False
    flight_end(&f.ring, f.turn)
    f.rows -= 1
    return True


cdef inline bint nested_drain(int fmt, int host_fmt, Nested *n, const Paging *host, Flights *f) noexcept nogil:
    while f.rows:
        if not nested_finish(fmt, host_fmt, n, host, f):
            return False
        f.turn = ring_turn(&f.ring, f.turn)
    return True


cdef inline void nested_alone(int fmt, int host_fmt, Nested *n, const Paging *host, Flights *f,
                              uint64_t place) noexcept nogil:
    """The next row, nothing being in flight, and those after it in the same page."""
    cdef int64_t i = f.next
    if nested_granted(fmt, host_fmt, n, i, place):
        f.next = rows_repeat(&n.guest, i, f.n, 0xfff)
    elif nested_proper(n, host, i):
        nested_again(n, f, i)
    elif n.guest.out[i].fault == FAULT_NONE:
        f.next = rows_repeat(&n.guest, i, f.n, 0xfff)
    elif n.guest.out[i].fault < FAULT_EPT_VIOLATION:
        f.next = rows_refused(&n.guest, i, f.n)
    else:
        f.next = i + 1  # the next names its own guest-physical address


cdef inline void nested_loop(int fmt, int host_fmt, Nested *n, const Paging *host, int64_t rows) noexcept nogil:
    cdef const uint64_t *gvas = n.guest.gvas
    cdef uint64_t gva, place
    cdef Flights f
    ring_init(&f.ring)
    f.turn = &f.ring.flights[0]
    f.next = 0
    f.n = rows
    f.calm = 0
    f.rows = 0
    while True:
        if f.next == f.n:
            if nested_drain(fmt, host_fmt, n, host, &f) and f.next == f.n:
                return
            continue
        if f.calm:
            f.calm -= 1
            f.next += 1
            if nested_proper(n, host, f.next - 1):
                f.calm = RING_ROWS
            continue
        gva = gvas[f.next]
        place = nested_place(fmt, host_fmt, n, gva & n.guest.cache.paging.va_mask)
        if place == FOUND_LARGE or (f.next + 1 < f.n and not other_page(gva, gvas[f.next + 1])):
            # Finishing what is in flight may move ``place``'s slot: it is looked up again.
            if not f.rows or nested_drain(fmt, host_fmt, n, host, &f):
                nested_alone(fmt, host_fmt, n, host, &f,
                             nested_place(fmt, host_fmt, n, gva & n.guest.cache.paging.va_mask))
            continue
        prefetch(place)
        if not nested_finish(fmt, host_fmt, n, host, &f):
            continue
        f.turn.row = &n.guest.out[f.next]
        f.turn.place = place
        f.turn = ring_turn(&f.ring, f.turn)
        f.rows += 1
        f.next += 1


cdef inline void nested_flat(int host_fmt, Nested *n, const Paging *host, int64_t rows) noexcept nogil:
    """A guest without paging: the second dimension alone."""
    cdef Batch *b = &n.guest
    cdef uint64_t hpa
    cdef int64_t i
    for i in range(rows):
        hpa = second_find(host_fmt, &n.final, &n.final_accept, b.gvas[i] & b.cache.paging.va_mask)
        if hpa != ALL_ONES:
            row_write(&b.out[i], b.gvas[i], hpa, 0, row_end(12, ACC_ALL, 0))
        elif nested_proper(n, host, i):
            nested_forget(n)


cdef inline void nested_rows(int host_fmt, Nested *n, const Paging *host, int64_t rows) noexcept nogil:
    cdef int fmt = n.guest.cache.paging.format
    # Literals: each loop is compiled for its format.
    if fmt == FMT_64:
        nested_loop(FMT_64, host_fmt, n, host, rows)
    elif fmt == FMT_PAE:
        nested_loop(FMT_PAE, host_fmt, n, host, rows)
    elif fmt == FMT_32:
        nested_loop(FMT_32, host_fmt, n, host, rows)
    else:
        nested_flat(host_fmt, n, host, rows)
