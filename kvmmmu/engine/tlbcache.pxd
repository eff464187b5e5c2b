# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The processor's TLB: set-associative arrays of translations, by page size (SDM vol. 3A section 4.10.2).

An entry belongs to a context: PCID (or "global"), root of the second dimension (EP4TA; nCR3), VPID or ASID, and
the epoch in which it was made.  A flush of a whole PCID moves its epoch on: nothing is searched.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.state cimport (
    MMU_SHADOW, PSC_LEVELS, PscArray, PscEntry, TLB_MET, TLB_PCIDS, TLB_SIZES, Tlb, TlbArray, TlbEntry, TlbMet,
    Vcpu,
)

cdef enum:
    # Fields of a context.  A PCID has 12 bits; numbers above it mean all PCIDs.
    CONTEXT_PCID_BITS = 13
    CONTEXT_GLOBAL = 4096
    CONTEXT_HOST = 4097     # guest-physical: no linear address, no PCID, no VPID
    CONTEXT_ROOT_SHIFT = 13  # 20 bits: a page of the arena
    CONTEXT_VPID_SHIFT = 33  # 7 bits: one vCPU, one VPID
    CONTEXT_EPOCH_SHIFT = 40
    EPOCH_BITS = 24
    # Where the numbers of a geometry stand: sets and ways of each array, 0 ways for none.
    GEOMETRY_FIRST = 0
    GEOMETRY_SECOND = 3
    GEOMETRY_NESTED = 4
    GEOMETRY_PSC = 5        # levels 2 to 5
    GEOMETRY_HOST_PSC = 9
    GEOMETRY_ARRAYS = 13


# ---- making one ---------------------------------------------------------------------

cdef inline TlbEntry *tlb_array_place(TlbArray *a, const uint32_t *sets_ways, TlbEntry *at) noexcept nogil:
    a.entries = at
    a.mask = sets_ways[0] - 1
    a.ways = sets_ways[1]
    return at + <size_t>sets_ways[0] * sets_ways[1] if a.ways else at

cdef inline PscEntry *psc_array_place(PscArray *a, const uint32_t *sets_ways, PscEntry *at) noexcept nogil:
    a.entries = at
    a.mask = sets_ways[0] - 1
    a.ways = sets_ways[1]
    return at + <size_t>sets_ways[0] * sets_ways[1] if a.ways else at

cdef inline size_t geometry_entries(const uint32_t *geometry, int first, int end) noexcept nogil:
    cdef size_t n = 0
    cdef int i
    for i in range(first, end):
        n += <size_t>geometry[2 * i] * geometry[2 * i + 1]
    return n

cdef inline Tlb *tlb_new(const uint32_t *geometry, bint spurious_faults) noexcept nogil:
    """Everything in one block; sets are powers of two."""
    cdef size_t pages = geometry_entries(geometry, GEOMETRY_FIRST, GEOMETRY_PSC)
    cdef size_t tables = geometry_entries(geometry, GEOMETRY_PSC, GEOMETRY_ARRAYS)
    cdef Tlb *t = <Tlb *>calloc(1, sizeof(Tlb) + 2 * TLB_PCIDS * sizeof(uint64_t) + pages * sizeof(TlbEntry)
                                + tables * sizeof(PscEntry))
    cdef TlbEntry *page
    cdef PscEntry *table
    cdef int i
    if t == NULL:
        return NULL
    t.pcid_epoch = <uint64_t *>(t + 1)
    t.psc_epoch = t.pcid_epoch + TLB_PCIDS
    page = <TlbEntry *>(t.psc_epoch + TLB_PCIDS)
    for i in range(TLB_SIZES):
        page = tlb_array_place(&t.first[i], geometry + 2 * (GEOMETRY_FIRST + i), page)
    page = tlb_array_place(&t.second, geometry + 2 * GEOMETRY_SECOND, page)
    page = tlb_array_place(&t.nested, geometry + 2 * GEOMETRY_NESTED, page)
    table = <PscEntry *>page
    for i in range(2, PSC_LEVELS):
        table = psc_array_place(&t.psc[i], geometry + 2 * (GEOMETRY_PSC + i - 2), table)
    for i in range(2, PSC_LEVELS):
        table = psc_array_place(&t.host_psc[i], geometry + 2 * (GEOMETRY_HOST_PSC + i - 2), table)
    t.last[0] = &t.nothing
    t.last[1] = &t.nothing
    tlb_meet_anew(t)
    t.spurious_faults = spurious_faults
    return t


# ---- whose an entry is ------------------------------------------------------------------

cdef inline uint64_t tlb_pcid(const Vcpu *vcpu) noexcept nogil:
    """The PCID in use: 0 unless CR4.PCIDE is set (SDM vol. 3A section 4.10.1)."""
    return vcpu.regs.cr3 & CR3_PCID_MASK if vcpu.regs.cr4 & CR4_PCIDE else 0

cdef inline uint64_t psc_epoch(const Tlb *t, uint64_t pcid) noexcept nogil:
    return t.pcid_epoch[pcid] + t.psc_epoch[pcid] + t.all_epoch + t.tables_epoch

cdef inline void tlb_meet_anew(Tlb *t) noexcept nogil:
    cdef int i
    for i in range(TLB_MET):
        t.met[i].entry = &t.nothing
    t.missed = ALL_ONES

cdef inline void tlb_retag(Vcpu *vcpu) noexcept nogil:
    """A PCID, a root or an epoch changed: from now on other entries are the vCPU's own."""
    cdef Tlb *t = vcpu.tlb
    cdef uint64_t pcid, base, root = 0, context, global_context
    if t == NULL:
        return
    context = t.context
    global_context = t.global_context
    pcid = tlb_pcid(vcpu)
    # Shadow tables are the linear tables themselves: the processor knows nothing of a second dimension.
    if vcpu.vm.mmu != MMU_SHADOW:
        root = <uint64_t>vcpu.root.page << CONTEXT_ROOT_SHIFT
    base = root | (<uint64_t>(vcpu.id + 1) << CONTEXT_VPID_SHIFT)
    t.context = base | pcid | ((t.pcid_epoch[pcid] + t.all_epoch) << CONTEXT_EPOCH_SHIFT)
    t.psc_context = base | pcid | (psc_epoch(t, pcid) << CONTEXT_EPOCH_SHIFT)
    t.global_context = base | CONTEXT_GLOBAL | (t.global_epoch << CONTEXT_EPOCH_SHIFT)
    t.host_context = root | CONTEXT_HOST | (t.host_epoch << CONTEXT_EPOCH_SHIFT)
    if t.context != context or t.global_context != global_context:
        tlb_meet_anew(t)

cdef inline bint context_alive(const Tlb *t, uint64_t context, bint table) noexcept nogil:
    """No flush since has reached it; table: of a paging-structure cache."""
    cdef uint64_t whose = context & ((ONE << CONTEXT_PCID_BITS) - 1), epoch = context >> CONTEXT_EPOCH_SHIFT
    if context == 0:
        return False
    if whose == CONTEXT_GLOBAL:
        return epoch == t.global_epoch
    if whose == CONTEXT_HOST:
        return epoch == t.host_epoch
    return epoch == (psc_epoch(t, whose) if table else t.pcid_epoch[whose] + t.all_epoch)


# ---- looking up ------------------------------------------------------------------------

cdef inline uint64_t tlb_key(uint64_t address, uint64_t shift) noexcept nogil:
    return ((address >> shift) << 6) | shift

cdef inline int tlb_shift(int size) noexcept nogil:
    return 12 + 9 * size

cdef inline TlbEntry *array_find(const TlbArray *a, uint64_t address, uint64_t shift, uint64_t context,
                                 uint64_t other) noexcept nogil:
    cdef TlbEntry *e = a.entries + ((address >> shift) & a.mask) * a.ways
    cdef uint64_t key = tlb_key(address, shift)
    cdef uint32_t _
    for _ in range(a.ways):
        if e.key == key and (e.context == context or e.context == other):
            return e
        e += 1
    return NULL


cdef inline TlbEntry *array_victim(const Tlb *t, const TlbArray *a, uint64_t address, uint64_t shift,
                                   uint64_t context) noexcept nogil:
    """Where a new entry goes: over itself, where nothing lives, or over the least recently used."""
    cdef TlbEntry *e = a.entries + ((address >> shift) & a.mask) * a.ways
    cdef TlbEntry *oldest = NULL
    cdef uint64_t key = tlb_key(address, shift)
    cdef uint64_t age, best = ALL_ONES
    cdef uint32_t _
    for _ in range(a.ways):
        if e.context == context:
            if e.key == key:
                return e
            age = e.used
        else:
            age = e.used if context_alive(t, e.context, False) else 0
        if age < best:
            best = age
            oldest = e
        e += 1
    return oldest


cdef inline TlbMet *tlb_met(Tlb *t, uint64_t va) noexcept nogil:
    return &t.met[(va >> 12) & (TLB_MET - 1)]


cdef inline TlbEntry *tlb_search(Tlb *t, uint64_t va, int fetch) noexcept nogil:
    """All arrays in order; a find of the second level moves up.

    A batch or a replay that meets a miss hands the access to the walk, which asks again: nothing is searched twice.
    """
    cdef TlbEntry *e = NULL
    cdef TlbEntry *up
    cdef TlbMet *m
    cdef int size
    if t.missed == va >> 12:
        return NULL
    for size in range(TLB_SIZES):
        if (t.sizes >> size) & 1:
            e = array_find(&t.first[size], va, tlb_shift(size), t.context, t.global_context)
            if e != NULL:
                break
    if e == NULL and t.second.ways:
        for size in range(2):
            if (t.sizes >> size) & 1:
                e = array_find(&t.second, va, tlb_shift(size), t.context, t.global_context)
                if e != NULL:
                    e.used = t.clock
                    up = array_victim(t, &t.first[size], va, tlb_shift(size), e.context)
                    up[0] = e[0]
                    e = up
                    break
    if e != NULL:
        e.used = t.clock
        t.last[fetch] = e
        m = tlb_met(t, va)
        m.page = va >> 12
        m.entry = e
    else:
        t.missed = va >> 12
    return e


cdef inline bint tlb_translates(const Tlb *t, const TlbEntry *e, uint64_t va) noexcept nogil:
    return e.key >> 6 == va >> (e.key & 63) and (e.context == t.context or e.context == t.global_context)


cdef inline TlbEntry *tlb_find(Tlb *t, uint64_t va, int fetch) noexcept nogil:
    """The entry that translates va now, or NULL; the last hit is looked at first.

    Then what a search gave for this very page.  If it still translates it, a search would give it again: while the
    contexts are the same, an entry that comes before it is entered by a miss of the page only, and it would be none.
    """
    cdef TlbEntry *e = t.last[fetch]
    cdef const TlbMet *m
    t.clock += 1
    if not tlb_translates(t, e, va):
        m = tlb_met(t, va)
        e = m.entry
        if m.page != va >> 12 or not tlb_translates(t, e, va):
            return tlb_search(t, va, fetch)
        t.last[fetch] = e
    e.used = t.clock
    return e


cdef inline uint64_t tlb_offset(const TlbEntry *e, uint64_t va) noexcept nogil:
    return va & ((ONE << (e.key & 63)) - 1)


# ---- filling ----------------------------------------------------------------------------

cdef inline int tlb_size(const Tlb *t, int shift) noexcept nogil:
    """The largest size there is an array for, up to shift: a larger page is cached in parts (SDM 4.10.2.2)."""
    if shift >= 30 and t.first[2].ways:
        return 2
    return 1 if shift >= 21 and t.first[1].ways else 0

cdef inline void tlb_fill(Tlb *t, uint64_t va, const TlbEntry *e, int shift, bint global_page) noexcept nogil:
    """Enter a translation of va by a mapping of shift bits; hpa and gpa are those of va itself."""
    cdef int size = tlb_size(t, shift)
    cdef int bits = tlb_shift(size)
    cdef TlbEntry new_ = e[0]
    cdef uint64_t offset = va & ((ONE << bits) - 1)
    new_.key = tlb_key(va, bits)
    new_.context = t.global_context if global_page else t.context
    new_.hpa -= offset
    new_.gpa -= offset
    new_.used = t.clock
    t.missed = ALL_ONES
    t.sizes |= <uint8_t>(1 << size)
    if new_.linear_shift > bits:
        t.split = 1
    if t.first[size].ways:
        array_victim(t, &t.first[size], va, bits, new_.context)[0] = new_
    if size < 2 and t.second.ways:
        array_victim(t, &t.second, va, bits, new_.context)[0] = new_


# ---- guest-physical mappings (SDM vol. 3C section 29.4.1) ----------------------------------

cdef inline TlbEntry *nested_find(Tlb *t, uint64_t gpa) noexcept nogil:
    cdef TlbEntry *e
    cdef int size
    t.clock += 1
    for size in range(TLB_SIZES):
        if (t.nested_sizes >> size) & 1:
            e = array_find(&t.nested, gpa, tlb_shift(size), t.host_context, t.host_context)
            if e != NULL:
                e.used = t.clock
                return e
    return NULL

cdef inline void nested_fill(Tlb *t, uint64_t gpa, const TlbEntry *e, int shift) noexcept nogil:
    cdef int size = 2 if shift >= 30 else (1 if shift >= 21 else 0)
    cdef int bits = tlb_shift(size)
    cdef TlbEntry new_ = e[0]
    if t.nested.ways == 0:
        return
    new_.key = tlb_key(gpa, bits)
    new_.context = t.host_context
    new_.hpa -= gpa & ((ONE << bits) - 1)
    new_.gpa -= gpa & ((ONE << bits) - 1)
    new_.used = t.clock
    t.nested_sizes |= <uint8_t>(1 << size)
    array_victim(t, &t.nested, gpa, bits, new_.context)[0] = new_


# ---- dropping single entries -----------------------------------------------------------------

cdef inline bint context_matches(uint64_t context, uint64_t a, uint64_t b) noexcept nogil:
    return context == a or context == b

cdef inline void array_drop(const TlbArray *a, uint64_t va, uint64_t shift, uint64_t context,
                            uint64_t other) noexcept nogil:
    cdef TlbEntry *e = array_find(a, va, shift, context, other)
    while e != NULL:
        e.context = 0
        e = array_find(a, va, shift, context, other)

cdef inline void array_drop_parts(const TlbArray *a, uint64_t va, uint64_t context, uint64_t other) noexcept nogil:
    """Every entry made of the mapping that holds va, wherever in it."""
    cdef size_t _
    cdef TlbEntry *e = a.entries
    for _ in range(<size_t>(a.mask + 1) * a.ways):
        if (context_matches(e.context, context, other)
                and ((((e.key >> 6) << (e.key & 63)) ^ va) >> e.linear_shift) == 0):
            e.context = 0
        e += 1

cdef inline void tlb_drop_linear(Tlb *t, uint64_t va, uint64_t context, uint64_t other) noexcept nogil:
    """All that translates an address in either context, and the rest of the page it is in."""
    cdef int size
    if not t.split:
        tlb_drop_entry(t, va, context, other)
        return
    for size in range(TLB_SIZES):
        array_drop_parts(&t.first[size], va, context, other)
    array_drop_parts(&t.second, va, context, other)

cdef inline void tlb_drop_entry(Tlb *t, uint64_t va, uint64_t context, uint64_t other) noexcept nogil:
    """Only what translates the address itself."""
    cdef int size
    for size in range(TLB_SIZES):
        if (t.sizes >> size) & 1:
            array_drop(&t.first[size], va, tlb_shift(size), context, other)
            array_drop(&t.second, va, tlb_shift(size), context, other)

cdef inline void nested_drop(Tlb *t, uint64_t gpa) noexcept nogil:
    cdef int size
    for size in range(TLB_SIZES):
        array_drop(&t.nested, gpa, tlb_shift(size), t.host_context, t.host_context)
