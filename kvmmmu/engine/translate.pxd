# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Batches over one set of tables: translate many addresses, list what is mapped."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport *
from kvmmmu.bits.paging cimport *
from kvmmmu.bits.spte cimport bits_between
from kvmmmu.engine.quick cimport QUICK_YES, Quick, Window, quick_memory, quick_nested
from kvmmmu.engine.state cimport MemMap, Translation
from kvmmmu.engine.walk cimport walk_memory, walk_nested

cdef inline int walk_any(const Paging *p, const Paging *host, const MemMap *m, int *hint, Walk *w, Walk *hw,
                         uint64_t gva, uint64_t access, bint ac, bint set_ad) noexcept nogil:
    """One dimension, or two when ``host`` has a format."""
    if host.format == FMT_NONE:
        return walk_memory(p, m, hint, w, gva, access, ac, set_ad)
    return walk_nested(p, host, m, hint, hint + 1, w, hw, gva, access, ac, set_ad)


cdef inline void translate_done(const Paging *p, const Quick *q, uint64_t gpa, Translation *t) noexcept nogil:
    t.gpa = gpa
    t.error_code = 0
    t.fault_gpa = 0
    t.entry = q.entry
    t.fault = FAULT_NONE
    t.page_shift = <uint8_t>walk_level_shift(p.format, q.level)
    t.access = <uint8_t>q.acc
    t.level = <uint8_t>q.level
    t.unused = 0


cdef inline void translate_row(const Walk *w, int fault, uint64_t gpa, uint64_t fault_gpa,
                               Translation *t) noexcept nogil:
    """All of a row but its ``gva``, from a walk that has ended."""
    t.gpa = 0
    t.error_code = 0
    t.fault_gpa = 0
    t.entry = 0
    t.fault = <uint8_t>fault
    t.page_shift = 0
    t.access = 0
    t.level = 0
    t.unused = 0
    if fault == FAULT_NONE:
        t.gpa = gpa
        t.page_shift = <uint8_t>w.page_shift
        t.access = <uint8_t>w.pte_access
    else:
        t.error_code = w.error_code
        if fault >= FAULT_EPT_VIOLATION:
            t.fault_gpa = fault_gpa
    if w.seen:
        t.level = <uint8_t>w.seen
        t.entry = w.entries[w.seen]


cdef inline bint translate_proper(const Paging *p, const Paging *host, const MemMap *m, int *hint, uint64_t gva,
                                  uint64_t access, bint ac, bint set_ad, Translation *t) noexcept nogil:
    """Walk by the definition.  True: an A or D bit was set."""
    cdef Walk w, hw
    cdef int fault
    w.stored = 0
    hw.stored = 0
    fault = walk_any(p, host, m, hint, &w, &hw, gva, access, ac, set_ad)
    translate_row(&w, fault, w.gpa if host.format == FMT_NONE else hw.gpa, hw.va if fault >= FAULT_EPT_VIOLATION else 0,
                  t)
    return w.stored or hw.stored


cdef inline bint translate_one(const Paging *p, const Paging *host, const MemMap *m, int *hint, Window *window,
                               uint64_t gva, uint64_t access, bint ac, bint set_ad, Translation *t) noexcept nogil:
    """One row.  True: an A or D bit was set in memory."""
    cdef uint64_t hpa = 0
    cdef Quick q
    cdef Walk hw
    cdef int quick
    t.gva = gva
    if host.format == FMT_NONE:
        if quick_memory(p, m, hint, window, gva, access, ac, set_ad, &q):
            translate_done(p, &q, q.gpa, t)
            return False
        return translate_proper(p, host, m, hint, gva, access, ac, set_ad, t)
    hw.stored = 0
    quick = quick_nested(p, host, m, hint, hint + 1, &hw, gva, access, ac, set_ad, &q, &hpa)
    if quick == QUICK_YES:
        translate_done(p, &q, hpa, t)
        return hw.stored
    return translate_proper(p, host, m, hint, gva, access, ac, set_ad, t) or hw.stored


cdef inline void translate_each(const Paging *p, const Paging *host, const MemMap *m, const uint64_t *gvas, int64_t n,
                                uint64_t access, bint ac, bint set_ad, Translation *out) noexcept nogil:
    """One after the other: what every batch must equal."""
    cdef int[2] hint = [0, 0]
    cdef int64_t i
    cdef Window window
    window.first = 0
    window.npages = 0
    for i in range(n):
        translate_one(p, host, m, hint, &window, gvas[i], access, ac, set_ad, &out[i])


cdef inline void mappings_tables(Paging *tables, const Paging *p) noexcept nogil:
    """A copy that refuses nobody: every leaf can be read."""
    cdef int i
    tables[0] = p[0]
    for i in range(16):
        tables.permissions[i] = 0
    tables.pke = 0
    tables.dialect = DIALECT_SDM


cdef inline uint64_t mappings_after(const Paging *p, const Walk *w) noexcept nogil:
    """The first address that a finished walk says nothing about; 0: there is none."""
    cdef uint64_t next_va
    if w.fault == FAULT_GP:
        return ALL_ONES << (63 - p.va_shift)
    next_va = (w.va | bits_between(walk_level_shift(p.format, w.level) - 1, 0)) + 1
    return 0 if next_va & ~p.va_mask else next_va


cdef inline int64_t mappings_next(const Paging *tables, const MemMap *m, uint64_t *gva, bint *done, int64_t walks,
                                  Translation *out, int64_t n) noexcept nogil:
    """List leaves from ``gva`` on, at most ``n`` of them in at most ``walks`` walks; ``gva`` moves on.

    The level where a walk ends tells how far a hole reaches: holes cost one walk per entry.
    """
    cdef int[2] hint = [0, 0]
    cdef int64_t found = 0
    cdef Walk w
    while not done[0] and walks > 0 and found < n:
        walks -= 1
        if walk_memory(tables, m, hint, &w, gva[0], 0, False, False) == FAULT_NONE:
            out[found].gva = w.va & ~bits_between(w.page_shift - 1, 0)
            out[found].gpa = w.gpa & ~bits_between(w.page_shift - 1, 0)
            out[found].error_code = 0
            out[found].fault_gpa = 0
            out[found].entry = w.entries[w.level]
            out[found].fault = FAULT_NONE
            out[found].page_shift = <uint8_t>w.page_shift
            out[found].access = <uint8_t>w.pte_access
            out[found].level = <uint8_t>w.level
            out[found].unused = 0
            found += 1
        gva[0] = mappings_after(tables, &w)
        done[0] = gva[0] == 0
    return found
