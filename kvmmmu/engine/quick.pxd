# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The walk that succeeds and changes nothing, which almost every walk is: no record is kept.

It says "yes" only where ``walk.pxd`` would give the same translation, by the same rules over
entries; at whatever is unusual (a fault, an A/D bit to set, KVM's dialect) it says "no", and
the caller walks properly.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport Walk, walk_entry_offset, walk_level_shift, walk_present, walk_rights
from kvmmmu.bits.paging cimport (
    DIALECT_SDM, FAULT_NONE, FMT_32, FMT_64, FMT_EPT, FMT_PAE, Paging, permission_fault, rsvd_fault, va_canonical,
)
from kvmmmu.bits.spte cimport bits_between
from kvmmmu.engine.atomics cimport ld_acquire_u32, ld_acquire_u64
from kvmmmu.engine.memory cimport memmap_find
from kvmmmu.engine.state cimport MemMap
from kvmmmu.engine.walk cimport walk_second, walk_second_access

cdef enum:
    QUICK_NO = 0      # nothing is known: walk properly
    QUICK_YES = 1
    QUICK_FINAL = 2   # two dimensions: the guest's tables said yes, the final address is to be walked properly

cdef struct Window:
    # The area of the last fetch, so that the next needs no look into the map.
    uint64_t first
    uint64_t npages       # 0: none yet
    const uint8_t *host

cdef struct Quick:
    uint64_t gpa          # the translation
    uint64_t entry        # the leaf, and its level
    uint64_t entry_gpa    # where it stands
    int level
    uint32_t acc          # ACC rights


cdef inline const uint8_t *window_host(const MemMap *m, int *hint, Window *window, uint64_t address) noexcept nogil:
    """As ``memmap_host`` for reading."""
    cdef uint64_t frame = address >> 12
    cdef int i
    if frame - window.first >= window.npages:
        i = memmap_find(m, frame, hint, m.host)
        if i < 0 or m.host[i] == NULL:
            return NULL
        window.first = m.first[i]
        window.npages = m.npages[i]
        window.host = m.host[i]
    return window.host + (address - (window.first << 12))


cdef inline bint quick_begin(int fmt, const Paging *p, uint64_t *va, uint64_t *table, int *level) noexcept nogil:
    """Where the first fetch from memory is made."""
    va[0] &= p.va_mask
    if not va_canonical(va[0], p.va_shift) or va[0] & p.va_limit:
        return False
    level[0] = p.levels
    table[0] = p.root
    if fmt == FMT_PAE:
        table[0] = p.pdptr[va[0] >> 30]
        if p.pdpte_in_memory or not table[0] & PT_PRESENT_MASK:
            return False
        table[0] &= p.addr_mask
        level[0] = LEVEL_2M
    return True


cdef inline bint quick_entry(int fmt, const Paging *p, const uint8_t *host, int level, uint64_t *entry, uint32_t *acc,
                             uint64_t *accessed) noexcept nogil:
    """Fetch an entry and gather what it allows.  False: it ends the walk in a fault."""
    if host == NULL:
        return False
    entry[0] = ld_acquire_u32(<const uint32_t *>host) if fmt == FMT_32 else ld_acquire_u64(<const uint64_t *>host)
    acc[0] &= walk_rights(fmt, entry[0])
    accessed[0] &= entry[0]
    return walk_present(fmt, entry[0]) and not rsvd_fault(p, level, entry[0])


cdef inline bint quick_last(int fmt, const Paging *p, int level, uint64_t entry) noexcept nogil:
    return level == LEVEL_4K or (entry & PT_PAGE_SIZE_MASK and (fmt != FMT_32 or p.pse))


cdef inline bint quick_finish(int fmt, const Paging *p, uint64_t va, uint64_t access, bint ac, bint set_ad,
                              uint64_t accessed, Quick *q) noexcept nogil:
    """Judge the leaf; False also where an A/D bit is to be set."""
    cdef uint64_t offset_mask = bits_between(walk_level_shift(fmt, q.level) - 1, 0)
    if set_ad and (accessed != p.accessed or (access & PFERR_WRITE and p.dirty & ~q.entry)):
        return False
    if permission_fault(p, access, q.acc, ac, <uint32_t>((q.entry >> PT_PKEY_SHIFT) & 15)):
        return False
    q.gpa = (q.entry & p.addr_mask & ~offset_mask) | (va & offset_mask)
    # PSE-36 pages beyond 4 GiB are unusual too.
    return fmt != FMT_32 or q.level == LEVEL_4K or not (q.entry >> 13) & 0xff


cdef inline bint quick_walk(int fmt, const Paging *p, const MemMap *m, int *hint, Window *window, uint64_t va,
                            uint64_t access, bint ac, bint set_ad, Quick *q) noexcept nogil:
    """One dimension; ``fmt`` is p.format as a literal."""
    cdef uint64_t table, entry = 0, accessed = p.accessed, at
    cdef uint32_t acc = ACC_ALL
    cdef int level
    if not quick_begin(fmt, p, &va, &table, &level):
        return False
    while True:
        at = table | walk_entry_offset(fmt, va, level)
        if not quick_entry(fmt, p, window_host(m, hint, window, at), level, &entry, &acc, &accessed):
            return False
        if quick_last(fmt, p, level, entry):
            break
        table = entry & p.addr_mask
        level -= 1
    q.entry = entry
    q.entry_gpa = at
    q.level = level
    q.acc = acc
    return quick_finish(fmt, p, va, access, ac, set_ad, accessed, q)


cdef inline int quick_nested_walk(int fmt, int host_fmt, const Paging *guest, const Paging *host, const MemMap *m,
                                  int *hint, int *guest_hint, uint64_t gva, uint64_t access, bint ac, bint set_ad,
                                  Quick *q, uint64_t *hpa) noexcept nogil:
    cdef Window tables, memory
    cdef Quick second
    cdef uint64_t table, entry = 0, accessed = guest.accessed, at
    cdef uint32_t acc = ACC_ALL
    cdef int level
    tables.npages = 0
    memory.npages = 0
    tables.first = 0
    memory.first = 0
    if not quick_begin(fmt, guest, &gva, &table, &level):
        return QUICK_NO
    while True:
        at = table | walk_entry_offset(fmt, gva, level)
        if not quick_walk(host_fmt, host, m, hint, &tables, at, host.table_access, False, set_ad, &second):
            return QUICK_NO
        if not quick_entry(fmt, guest, window_host(m, guest_hint, &memory, second.gpa), level, &entry, &acc,
                           &accessed):
            return QUICK_NO
        if quick_last(fmt, guest, level, entry):
            break
        table = entry & guest.addr_mask
        level -= 1
    q.entry = entry
    q.entry_gpa = at
    q.level = level
    q.acc = acc
    if not quick_finish(fmt, guest, gva, access, ac, set_ad, accessed, q):
        return QUICK_NO
    if not quick_walk(host_fmt, host, m, hint, &tables, q.gpa, walk_second_access(host, access), False, set_ad,
                      &second):
        return QUICK_FINAL
    hpa[0] = second.gpa
    return QUICK_YES


cdef inline bint quick_memory(const Paging *p, const MemMap *m, int *hint, Window *window, uint64_t va,
                              uint64_t access, bint ac, bint set_ad, Quick *q) noexcept nogil:
    """Quick form of ``walk_memory``."""
    if p.dialect != DIALECT_SDM:
        return False
    # Literals: each loop is compiled for its format.
    if p.format == FMT_64:
        return quick_walk(FMT_64, p, m, hint, window, va, access, ac, set_ad, q)
    if p.format == FMT_EPT:
        return quick_walk(FMT_EPT, p, m, hint, window, va, access, ac, set_ad, q)
    if p.format == FMT_PAE:
        return quick_walk(FMT_PAE, p, m, hint, window, va, access, ac, set_ad, q)
    if p.format == FMT_32:
        return quick_walk(FMT_32, p, m, hint, window, va, access, ac, set_ad, q)
    return False


cdef inline int quick_final(const Paging *host, const MemMap *m, int *hint, Walk *hw, uint64_t access, bint set_ad,
                            const Quick *q, uint64_t *hpa) noexcept nogil:
    """The final address properly, once the guest's tables said yes."""
    if walk_second(host, m, hint, hw, q.gpa, walk_second_access(host, access), host.final_note, set_ad) != FAULT_NONE:
        return QUICK_FINAL
    hpa[0] = hw.gpa
    return QUICK_YES


cdef inline int quick_nested(const Paging *guest, const Paging *host, const MemMap *m, int *hint, int *guest_hint,
                             Walk *hw, uint64_t gva, uint64_t access, bint ac, bint set_ad, Quick *q,
                             uint64_t *hpa) noexcept nogil:
    """Quick form of ``walk_nested``.

    QUICK_YES: ``q.gpa`` and ``hpa``.  QUICK_FINAL: the guest's tables allow it, the second dimension
    does not, ``hw`` holds its fault.  QUICK_NO: nothing happened.
    """
    cdef int r = QUICK_NO
    if guest.dialect != DIALECT_SDM or host.dialect != DIALECT_SDM:
        return QUICK_NO
    if host.format == FMT_EPT:
        if guest.format == FMT_64:
            r = quick_nested_walk(FMT_64, FMT_EPT, guest, host, m, hint, guest_hint, gva, access, ac, set_ad, q, hpa)
        elif guest.format == FMT_PAE:
            r = quick_nested_walk(FMT_PAE, FMT_EPT, guest, host, m, hint, guest_hint, gva, access, ac, set_ad, q, hpa)
        elif guest.format == FMT_32:
            r = quick_nested_walk(FMT_32, FMT_EPT, guest, host, m, hint, guest_hint, gva, access, ac, set_ad, q, hpa)
    elif host.format == FMT_64:
        if guest.format == FMT_64:
            r = quick_nested_walk(FMT_64, FMT_64, guest, host, m, hint, guest_hint, gva, access, ac, set_ad, q, hpa)
        elif guest.format == FMT_32:
            r = quick_nested_walk(FMT_32, FMT_64, guest, host, m, hint, guest_hint, gva, access, ac, set_ad, q, hpa)
    return quick_final(host, m, hint, hw, access, set_ad, q, hpa) if r == QUICK_FINAL else r
