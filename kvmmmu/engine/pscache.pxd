# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Paging-structure caches: where a walk may begin below the top (SDM vol. 3A section 4.10.3).

One array a level: the PDE cache holds what entries of level 2 say of tables of level 1, and so on up.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport Walk, walk_entry_offset, walk_level_shift
from kvmmmu.bits.paging cimport FMT_PAE
from kvmmmu.engine.state cimport PSC_LEVELS, PscArray, PscEntry, Tlb
from kvmmmu.engine.tlbcache cimport context_alive


cdef inline PscEntry *psc_find(const PscArray *a, uint64_t key, uint64_t context) noexcept nogil:
    cdef PscEntry *e = a.entries + (key & a.mask) * a.ways
    cdef uint32_t _
    for _ in range(a.ways):
        if e.key == key and e.context == context:
            return e
        e += 1
    return NULL


cdef inline void psc_enter(Tlb *t, const PscArray *a, const PscEntry *new_) noexcept nogil:
    cdef PscEntry *e = a.entries + (new_.key & a.mask) * a.ways
    cdef PscEntry *oldest = e
    cdef uint64_t age, best = ALL_ONES
    cdef uint32_t _
    for _ in range(a.ways):
        if e.context == new_.context:
            if e.key == new_.key:
                oldest = e
                break
            age = e.used
        else:
            age = e.used if context_alive(t, e.context, True) else 0
        if age < best:
            best = age
            oldest = e
        e += 1
    oldest[0] = new_[0]
    oldest.used = t.clock


cdef inline PscEntry *psc_resume(int fmt, Tlb *t, PscArray *caches, uint64_t context, Walk *w) noexcept nogil:
    """Let a walk that has begun go on at the lowest table known for its address; NULL: at the top."""
    cdef PscEntry *e
    cdef int level
    # The PDE cache first: the longer the prefix, the fewer entries are left to read (section 4.10.3.2).
    for level in range(2, w.level + 1):
        if caches[level].ways:
            e = psc_find(&caches[level], w.va >> walk_level_shift(fmt, level), context)
            if e != NULL:
                e.used = t.clock
                w.level = level - 1
                w.top = level - 1
                w.acc = e.acc
                w.entry_gpa = e.gpa | walk_entry_offset(fmt, w.va, level - 1)
                return e
    return NULL


cdef inline void psc_remember(int fmt, Tlb *t, PscArray *caches, uint64_t context, const Walk *w, int last,
                              const uint64_t *hpas, int32_t root) noexcept nogil:
    """Enter what the entries above level ``last`` said; all of them have A set.

    ``hpas``: where the entries were read, by level, or NULL when that is w.entry_gpas.
    """
    cdef PscEntry e
    cdef int level
    for level in range(last + 1, w.top + 1):
        # A PDPTE is a register, or is read at each walk; PAE has no cache for it.
        if caches[level].ways == 0 or fmt == FMT_PAE and level == LEVEL_1G:
            continue
        e.key = w.va >> walk_level_shift(fmt, level)
        e.context = context
        e.gpa = w.entry_gpas[level - 1] & ~<uint64_t>4095
        e.hpa = (w.entry_gpas[level - 1] if hpas == NULL else hpas[level - 1]) & ~<uint64_t>4095
        e.root = root
        e.acc = w.acc_above[level - 1]
        e.used = 0
        psc_enter(t, &caches[level], &e)


cdef inline void psc_drop(int fmt, PscArray *caches, uint64_t va, uint64_t context) noexcept nogil:
    """All that a walk of this address would use."""
    cdef PscEntry *e
    cdef int level
    for level in range(2, PSC_LEVELS):
        if caches[level].ways:
            e = psc_find(&caches[level], va >> walk_level_shift(fmt, level), context)
            if e != NULL:
                e.context = 0
