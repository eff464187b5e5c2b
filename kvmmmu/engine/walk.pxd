# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The loops round the walk's step: one dimension, two dimensions, and the PDPTE load.

A fetch goes through the area map and never leaves it; where no memory stands an entry reads
as 0, not present.  Nothing here allocates, fails or keeps state: the answer is the Walk.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport *
from kvmmmu.bits.paging cimport *
from kvmmmu.bits.spte cimport bits_between
from kvmmmu.engine.atomics cimport cmpxchg_u32, cmpxchg_u64, ld_acquire_u32, ld_acquire_u64
from kvmmmu.engine.hooks cimport POINT_BITS_SET, hook
from kvmmmu.engine.memory cimport memmap_find, memmap_host
from kvmmmu.engine.state cimport MemMap

# Every walk reads entries by loads that acquire: what a link leads to, KVM's own record of that table included, was
# written before the link was.

cdef inline uint64_t walk_fetch(int fmt, const MemMap *m, uint64_t gpa, int *hint) noexcept nogil:
    cdef bint writable
    cdef const uint8_t *host = memmap_host(m, gpa, hint, &writable)
    if host == NULL:
        return 0
    if fmt == FMT_32:
        return ld_acquire_u32(<const uint32_t *>host)
    return ld_acquire_u64(<const uint64_t *>host)


cdef inline bint walk_update(int fmt, const MemMap *m, uint64_t gpa, int *hint, uint64_t old,
                             uint64_t missing) noexcept nogil:
    """Set bits of an entry if it is still ``old``; False: it changed.  Read-only memory is left alone."""
    cdef bint writable
    cdef uint8_t *host = memmap_host(m, gpa, hint, &writable)
    if host == NULL or not writable:
        return True
    hook(NULL, POINT_BITS_SET)
    if fmt == FMT_32:
        return cmpxchg_u32(<uint32_t *>host, <uint32_t>old, <uint32_t>(old | missing))
    return cmpxchg_u64(<uint64_t *>host, old, old | missing)


cdef inline int walk_loop(int fmt, const Paging *p, const MemMap *m, int *hint, Walk *w, uint64_t va,
                          uint64_t access, bint ac) noexcept nogil:
    cdef int r = walk_begin(p, w, va, access, ac)
    # One walk's tables mostly stand in one area: it stays in registers, and is looked up again where it ends.
    cdef uint64_t first = 0, npages = 0, entry
    cdef const uint8_t *base = NULL
    cdef int i
    while r == WALK_NEXT:
        entry = 0
        if (w.entry_gpa >> 12) - first >= npages:
            i = memmap_find(m, w.entry_gpa >> 12, hint, m.host)
            npages = 0
            if i >= 0 and m.host[i] != NULL:
                first = m.first[i]
                npages = m.npages[i]
                base = m.host[i]
        if npages:
            if fmt == FMT_32:
                entry = ld_acquire_u32(<const uint32_t *>(base + (w.entry_gpa - (first << 12))))
            else:
                entry = ld_acquire_u64(<const uint64_t *>(base + (w.entry_gpa - (first << 12))))
        r = walk_step(fmt, p, w, entry)
    return r


cdef inline bint walk_set_ad(const Paging *p, const MemMap *m, int *hint, Walk *w) noexcept nogil:
    """Set what A/D bits a permitted access needs, from the top down; False: an entry changed, walk again."""
    cdef int level = w.top
    cdef uint64_t missing
    while level >= w.level:
        missing = walk_ad_missing(p, w, level)
        if missing:
            w.stored = 1
            if not walk_update(p.format, m, w.entry_gpas[level], hint, w.entries[level], missing):
                return False
        level -= 1
    return True


cdef inline int walk_memory(const Paging *p, const MemMap *m, int *hint, Walk *w, uint64_t va, uint64_t access,
                            bint ac, bint set_ad) noexcept nogil:
    """Walk tables that stand in ``m``; FAULT_NONE or the fault, details in ``w``.

    An A/D update is made only once the access is known to be permitted; when an entry changed
    meanwhile the whole walk is done again.
    """
    cdef int r
    while True:
        # Literals: each loop is compiled for its format.
        if p.format == FMT_64:
            r = walk_loop(FMT_64, p, m, hint, w, va, access, ac)
        elif p.format == FMT_EPT:
            r = walk_loop(FMT_EPT, p, m, hint, w, va, access, ac)
        elif p.format == FMT_PAE:
            r = walk_loop(FMT_PAE, p, m, hint, w, va, access, ac)
        else:
            r = walk_loop(FMT_32, p, m, hint, w, va, access, ac)
        if r == WALK_LEAF:
            r = walk_finish(p, w)
        if r == WALK_FAULT:
            return w.fault
        if not set_ad or not walk_ad_wanted(p, w) or walk_set_ad(p, m, hint, w):
            return FAULT_NONE


cdef inline int walk_second(const Paging *host, const MemMap *m, int *hint, Walk *hw, uint64_t gpa, uint64_t access,
                            uint64_t note, bint set_ad) noexcept nogil:
    """Translate a guest-physical address; ``note`` joins the code of a violation or nested page fault."""
    cdef int fault = walk_memory(host, m, hint, hw, gpa, access, False, set_ad)
    if fault != FAULT_NONE and fault != FAULT_EPT_MISCONFIG:
        hw.error_code |= note
    return fault


cdef inline int walk_second_table(const Paging *host, const MemMap *m, int *hint, Walk *hw, uint64_t gpa,
                                  uint64_t access, uint64_t note, bint set_ad) noexcept nogil:
    """The same for the address of a guest table entry: KVM's walker asks for its page and adds the offset after."""
    cdef uint64_t offset = gpa & 0xfff if host.by_page else 0
    cdef int fault = walk_second(host, m, hint, hw, gpa - offset, access, note, set_ad)
    if fault == FAULT_NONE:
        hw.gpa |= offset
    return fault


cdef inline uint64_t walk_second_access(const Paging *host, uint64_t access) noexcept nogil:
    """The guest's access as the second dimension sees it: whoever asks, it is one of read, write, fetch."""
    access = (access & (PFERR_WRITE | PFERR_FETCH)) | host.final_access
    return access if access else PFERR_USER


cdef inline int walk_nested_loop(int fmt, const Paging *guest, const Paging *host, const MemMap *m, int *hint,
                                 int *guest_hint, Walk *gw, Walk *hw, uint64_t *hpas, uint64_t gva, uint64_t access,
                                 bint ac, bint set_ad) noexcept nogil:
    cdef int r = walk_begin(guest, gw, gva, access, ac)
    while r == WALK_NEXT:
        if walk_second_table(host, m, hint, hw, gw.entry_gpa, host.table_access, host.table_note,
                             set_ad) != FAULT_NONE:
            gw.fault = hw.fault
            gw.error_code = hw.error_code
            return WALK_FAULT
        hpas[gw.level] = hw.gpa
        r = walk_step(fmt, guest, gw, walk_fetch(fmt, m, hw.gpa, guest_hint))
    return r


cdef inline int walk_nested_set_ad(const Paging *guest, const Paging *host, const MemMap *m, int *hint,
                                   int *guest_hint, Walk *gw, Walk *hw, const uint64_t *hpas) noexcept nogil:
    """Guest A/D bits after everything else was granted: WALK_LEAF, WALK_FAULT, or WALK_NEXT to walk again."""
    cdef Walk second
    cdef int level = gw.top
    cdef uint64_t missing
    while level >= gw.level:
        missing = walk_ad_missing(guest, gw, level)
        if missing:
            gw.stored = 1
            # With EPT A/D off reading the table needed no W, but this is a write (SDM vol. 3C section 29.3.3.2).
            if host.update_access:
                if walk_second(host, m, hint, &second, gw.entry_gpas[level], host.update_access, host.table_note,
                               True) != FAULT_NONE:
                    hw[0] = second
                    gw.fault = second.fault
                    gw.error_code = second.error_code
                    return WALK_FAULT
            if not walk_update(guest.format, m, hpas[level], guest_hint, gw.entries[level], missing):
                return WALK_NEXT
        level -= 1
    return WALK_LEAF


cdef inline int walk_nested(const Paging *guest, const Paging *host, const MemMap *m, int *hint,
                            int *guest_hint, Walk *gw, Walk *hw, uint64_t gva, uint64_t access, bint ac,
                            bint set_ad) noexcept nogil:
    """Walk guest tables whose addresses the ``host`` tables translate; ``m`` is host memory.

    Success: gw.gpa is guest-physical, hw.gpa is where it stands.  A fault of the second
    dimension stands in both walks; hw.va is then the guest-physical address that faulted.  The two
    dimensions keep a hint each: their tables stand in different areas.
    """
    cdef uint64_t hpas[6]
    cdef int r
    while True:
        if guest.format == FMT_64:
            r = walk_nested_loop(FMT_64, guest, host, m, hint, guest_hint, gw, hw, hpas, gva, access, ac, set_ad)
        elif guest.format == FMT_PAE:
            r = walk_nested_loop(FMT_PAE, guest, host, m, hint, guest_hint, gw, hw, hpas, gva, access, ac, set_ad)
        else:
            r = walk_nested_loop(FMT_32, guest, host, m, hint, guest_hint, gw, hw, hpas, gva, access, ac, set_ad)
        if r == WALK_LEAF:
            r = walk_finish(guest, gw)
        if r == WALK_FAULT:
            return gw.fault
        if guest.ad_first and set_ad and walk_ad_wanted(guest, gw):
            r = walk_nested_set_ad(guest, host, m, hint, guest_hint, gw, hw, hpas)
            if r == WALK_FAULT:
                return gw.fault
            if r == WALK_NEXT:
                continue
        if walk_second(host, m, hint, hw, gw.gpa, walk_second_access(host, access), host.final_note,
                       set_ad) != FAULT_NONE:
            gw.fault = hw.fault
            gw.error_code = hw.error_code
            return gw.fault
        if not set_ad or guest.ad_first or not walk_ad_wanted(guest, gw):
            return FAULT_NONE
        r = walk_nested_set_ad(guest, host, m, hint, guest_hint, gw, hw, hpas)
        if r == WALK_FAULT:
            return gw.fault
        if r == WALK_LEAF:
            return FAULT_NONE


cdef inline int load_pdptrs(const MemMap *m, int *hint, uint64_t cr3, const CpuModel *model,
                            uint64_t *pdptr) noexcept nogil:
    """Read the four PDPTEs at CR3[31:5] into ``pdptr``.

    Returns -1, or the number of the first present one with reserved bits: then CR3 must not be
    loaded and the processor raises #GP(0); ``pdptr`` is left as it was.
    """
    cdef uint64_t table = cr3 & bits_between(31, 5)
    cdef uint64_t loaded[4]
    cdef int i
    for i in range(4):
        loaded[i] = walk_fetch(FMT_PAE, m, table + 8 * i, hint)
        if paging_pdptr_bad(loaded[i], model):
            return i
    for i in range(4):
        pdptr[i] = loaded[i]
    return -1


cdef inline int load_pdptrs_nested(const Paging *host, const MemMap *m, int *hint, Walk *hw, uint64_t cr3,
                                   const CpuModel *model, uint64_t *pdptr, bint set_ad) noexcept nogil:
    """The same under EPT: FAULT_NONE, FAULT_PDPTE (a bad one), or the fault of reading the table.

    The load is a plain read whatever the A/D mode, and has no linear address
    (SDM vol. 3C section 28.2.1, table 28-7, bit 7).
    """
    cdef uint64_t table = cr3 & bits_between(31, 5)
    cdef uint64_t loaded[4]
    cdef int i
    cdef int fault = walk_second_table(host, m, hint, hw, table,
                                       host.table_access if host.dialect == DIALECT_KVM else PFERR_USER, 0, set_ad)
    if fault != FAULT_NONE:
        return fault
    for i in range(4):
        loaded[i] = walk_fetch(FMT_PAE, m, hw.gpa + 8 * i, hint)
        if paging_pdptr_bad(loaded[i], model):
            return FAULT_PDPTE
    for i in range(4):
        pdptr[i] = loaded[i]
    return FAULT_NONE
