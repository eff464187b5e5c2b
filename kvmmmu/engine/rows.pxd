# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What becomes of one row of a batch, and of the rows after it in the same page.

Formats are looked up here, not literals: the loops call these where a row is not plainly granted.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport WALK_LEAF, Walk, walk_ad_wanted, walk_finish, walk_rights, walk_step
from kvmmmu.bits.paging cimport FAULT_NONE, FMT_32, FMT_64, FMT_PAE, Paging
from kvmmmu.engine.accept cimport Accept, accepted
from kvmmmu.engine.pdecache cimport (
    FOUND_LARGE, TABLE_RIGHTS, LargePage, PdeCache, leaf_load, leaf_place, pde_find, pde_large_page,
)
from kvmmmu.engine.state cimport Translation
from kvmmmu.engine.translate cimport row_end, row_write, translate_proper, translate_row

cdef extern from "kvmmmu/batch.h" nogil:
    void rows_two "kvmmmu_rows_two"(Translation *rows, const uint64_t *gvas, uint64_t move, uint64_t entry,
                                    uint64_t end)

cdef struct Batch:
    PdeCache cache
    Accept accept         # of leaves in the lowest tables
    uint64_t nothing      # where a row's leaf stands that has none: not present
    const Paging *none    # no second dimension
    const uint64_t *gvas
    Translation *out


cdef inline void row_granted(Translation *t, uint64_t gva, uint64_t addr_mask, uint32_t above,
                             uint64_t entry) noexcept nogil:
    """A row whose 4 KiB leaf was accepted (in every format but EPT)."""
    row_write(t, gva, (entry & addr_mask) | (gva & 0xfff), entry,
              row_end(12, above & walk_rights(FMT_64, entry), LEVEL_4K))


cdef inline void row_large(const Batch *b, int64_t i) noexcept nogil:
    """A row whose large page was just found."""
    cdef uint64_t gva = b.gvas[i]
    cdef const LargePage *large = pde_large_page(b.cache.paging.format, &b.cache, gva & b.cache.paging.va_mask)
    row_write(&b.out[i], gva, large.base | (gva & large.offset), large.entry,
              large.end)


cdef inline bint row_leaf(const Batch *b, int64_t i, uint64_t place) noexcept nogil:
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
    r = walk_step(p.format, p, &w, leaf_load(p.format, place, va))
    if r == WALK_LEAF:
        r = walk_finish(p, &w)
    if r == WALK_LEAF and b.cache.set_ad and walk_ad_wanted(p, &w):
        return False
    b.out[i].gva = b.gvas[i]
    translate_row(&w, w.fault, w.gpa, 0, &b.out[i])
    return True


cdef inline bint row_unusual(Batch *b, int64_t i, uint64_t place) noexcept nogil:
    """A row that no cache knows, all rows before it being done.  True: A or D bits were set."""
    if place != <uint64_t>&b.nothing and row_leaf(b, i, place):
        return False
    b.out[i].gva = b.gvas[i]
    return translate_proper(b.cache.paging, b.none, b.cache.map, b.cache.hint, b.gvas[i], b.cache.access, b.cache.ac,
                            b.cache.set_ad, &b.out[i])


cdef inline uint64_t row_place(Batch *b, int64_t i) noexcept nogil:
    """Where a row's leaf stands; FOUND_LARGE; or ``nothing``."""
    cdef uint64_t va = b.gvas[i] & b.cache.paging.va_mask, found
    cdef int fmt = b.cache.paging.format
    if fmt == FMT_64:
        found = pde_find(FMT_64, &b.cache, va)
    elif fmt == FMT_PAE:
        found = pde_find(FMT_PAE, &b.cache, va)
    else:
        found = pde_find(FMT_32, &b.cache, va)
    if found > FOUND_LARGE:
        return leaf_place(fmt, found, va)
    return found if found == FOUND_LARGE else <uint64_t>&b.nothing


cdef inline void row_finish(Batch *b, int64_t i, uint64_t place) noexcept nogil:
    cdef uint64_t entry = leaf_load(b.cache.paging.format, place, b.gvas[i])
    cdef uint32_t above = <uint32_t>place & TABLE_RIGHTS
    if accepted(FMT_64, b.cache.paging, &b.accept, above, entry):
        row_granted(&b.out[i], b.gvas[i], b.cache.paging.addr_mask, above, entry)
    else:
        row_unusual(b, i, place)


cdef inline void row_again(Batch *b, int64_t i) noexcept nogil:
    """A row from its beginning, those before it being done."""
    cdef uint64_t place = row_place(b, i)
    if place == FOUND_LARGE:
        row_large(b, i)
    else:
        row_finish(b, i, place)


# ---- the same page again ----------------------------------------------------------------

cdef inline bint other_page(uint64_t gva, uint64_t after) noexcept nogil:
    return (gva ^ after) >> 12 != 0


cdef inline int64_t rows_repeat(const Batch *b, int64_t i, int64_t n, uint64_t offset) noexcept nogil:
    """Rows after ``i`` that lie in the same page are its row again; the first that does not."""
    cdef const uint64_t *gvas = b.gvas
    cdef Translation *out = b.out
    cdef uint64_t first = out[i].gva, move = out[i].gpa - first, entry = out[i].entry, end
    memcpy(&end, &out[i].fault, 8)
    i += 1
    while i + 1 < n and ((gvas[i] ^ first) | (gvas[i + 1] ^ first)) <= offset:
        # One page: what the first address moved by, all do.
        rows_two(&out[i], &gvas[i], move, entry, end)
        i += 2
    if i < n and (gvas[i] ^ first) <= offset:
        row_write(&out[i], gvas[i], gvas[i] + move, entry, end)
        i += 1
    return i


cdef inline int64_t rows_refused(const Batch *b, int64_t i, int64_t n) noexcept nogil:
    """As ``rows_repeat`` for a fault: it stored nothing, and the next access of the page ends as it did."""
    cdef const Translation *first = &b.out[i]
    cdef uint64_t page = first.gva >> 12
    i += 1
    while i < n and b.gvas[i] >> 12 == page:
        b.out[i] = first[0]
        b.out[i].gva = b.gvas[i]
        i += 1
    return i


cdef inline int64_t rows_same(Batch *b, int64_t i, int64_t n, uint64_t place) noexcept nogil:
    """A row and those after it in the same page; the first row not done, ``i`` itself if that is unusual.

    ``place``: of row ``i`` (``row_place``).
    """
    cdef uint32_t above = <uint32_t>place & TABLE_RIGHTS
    cdef uint64_t entry
    if place == FOUND_LARGE:
        row_large(b, i)
    else:
        entry = leaf_load(b.cache.paging.format, place, b.gvas[i])
        if not accepted(FMT_64, b.cache.paging, &b.accept, above, entry):
            return i
        row_granted(&b.out[i], b.gvas[i], b.cache.paging.addr_mask, above, entry)
    return rows_repeat(b, i, n, 0xfff)


cdef inline int64_t rows_same_unusual(Batch *b, int64_t i, int64_t n) noexcept nogil:
    """The same once nothing is in flight."""
    cdef uint64_t place = row_place(b, i)
    if place == FOUND_LARGE:
        return rows_same(b, i, n, place)  # what was unusual a moment ago is not any more
    if row_unusual(b, i, place):
        return i + 1
    if b.out[i].fault != FAULT_NONE:
        return rows_refused(b, i, n)
    return rows_repeat(b, i, n, 0xfff)
