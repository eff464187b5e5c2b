# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""An access of a processor that caches translations: a hit, or a walk that begins as low as it can.

Without the caches the same walks stand in ``walk.pxd``; the steps are those of ``bits/guest_walk.pxd`` in both.  A
guest that flushes as it must cannot tell them apart: a refused access is walked again from the top before it faults,
because raising rights needs no flush (SDM vol. 3A section 4.10.4.3).
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.access cimport permission_index, pkey_fault
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport *
from kvmmmu.bits.paging cimport *
from kvmmmu.engine.hostmem cimport vm_hostmem
from kvmmmu.engine.pages cimport spte_gfn
from kvmmmu.engine.pscache cimport psc_drop, psc_remember, psc_resume
from kvmmmu.engine.state cimport (
    MMU_SHADOW, MemMap, PscArray, PscEntry, TLB_FETCH, TLB_READ, TLB_WRITE, TlbEntry, VSTAT_NESTED_REF_L1,
    VSTAT_TLB_HIT, VSTAT_TLB_MISS, VSTAT_TLB_NESTED_HIT, VSTAT_TLB_NESTED_MISS, VSTAT_WALK_CACHE_HIT,
    VSTAT_WALK_REF_L1, Vcpu,
)
from kvmmmu.engine.tlbcache cimport (
    nested_drop, nested_fill, nested_find, tlb_drop_entry, tlb_fill, tlb_find, tlb_offset,
)
from kvmmmu.engine.tlbflush cimport tlb_nested_fault, tlb_page_fault
from kvmmmu.engine.walk cimport walk_fetch, walk_nested_set_ad, walk_second_access, walk_set_ad


cdef inline uint64_t shadow_gpa(Vcpu *vcpu) noexcept nogil:
    """The guest address behind the shadow leaf just used: its page says which gfn it stands for."""
    cdef uint64_t index = vcpu.nested.entry_gpas[vcpu.nested.level] >> 3
    cdef uint64_t offset = vcpu.nested.va & ((ONE << vcpu.nested.page_shift) - 1)
    return (spte_gfn(vcpu.vm, index) << 12) + offset


cdef inline uint32_t tlb_need(uint64_t access) noexcept nogil:
    """The kinds of an access, as an entry may refuse them."""
    if access & PFERR_WRITE:
        return TLB_WRITE | TLB_READ if access & PFERR_USER else TLB_WRITE
    return TLB_FETCH if access & PFERR_FETCH else TLB_READ


# ---- one dimension --------------------------------------------------------------------

cdef inline bint fault_from_memory(const Paging *p, const Walk *w) noexcept nogil:
    """A fault that no cached right had a part in: the entry read last says so by itself."""
    if p.format == FMT_EPT:
        return w.fault == FAULT_EPT_MISCONFIG
    return (w.error_code & PFERR_RSVD) != 0


cdef inline bint fault_keeps(const Paging *p, const Walk *w) noexcept nogil:
    """An EPT misconfiguration takes nothing along, unlike a violation or a #PF (SDM vol. 3C section 29.4.3.1).

    NPT has no word of its own for it: a nested page fault for a reserved bit is taken for the same.
    """
    return w.fault != FAULT_PF and fault_from_memory(p, w)


cdef inline int cached_walk_format(int fmt, Vcpu *vcpu, const Paging *p, const MemMap *m, int *hint, Walk *w,
                                   uint64_t va, uint64_t access, bint ac, PscArray *caches, uint64_t context,
                                   uint64_t *references) noexcept nogil:
    cdef bint resumed, from_top = False
    cdef int r
    while True:
        resumed = False
        r = walk_begin(p, w, va, access, ac)
        if r == WALK_NEXT and not from_top:
            resumed = psc_resume(fmt, vcpu.tlb, caches, context, w) != NULL
            vcpu.stats[<int>VSTAT_WALK_CACHE_HIT] += resumed
        while r == WALK_NEXT:
            references[w.level - 1] += 1
            r = walk_step(fmt, p, w, walk_fetch(fmt, m, w.entry_gpa, hint))
        if r == WALK_LEAF:
            r = walk_finish(p, w)
        if r == WALK_FAULT:
            if resumed and not fault_from_memory(p, w):
                psc_drop(fmt, caches, va, context)
                from_top = True
                continue
            if w.accessed == p.accessed and fault_keeps(p, w):
                psc_remember(fmt, vcpu.tlb, caches, context, w, w.level, NULL, vcpu.root.page)
            return w.fault
        if not walk_ad_wanted(p, w) or walk_set_ad(p, m, hint, w):
            psc_remember(fmt, vcpu.tlb, caches, context, w, w.level, NULL, vcpu.root.page)
            return FAULT_NONE
        from_top = True


cdef inline int cached_walk(Vcpu *vcpu, const Paging *p, const MemMap *m, int *hint, Walk *w, uint64_t va,
                            uint64_t access, bint ac, PscArray *caches, uint64_t context,
                            uint64_t *references) noexcept nogil:
    """As ``walk_memory``."""
    # Literals: each loop is compiled for its format.
    if p.format == FMT_64:
        return cached_walk_format(FMT_64, vcpu, p, m, hint, w, va, access, ac, caches, context, references)
    if p.format == FMT_EPT:
        return cached_walk_format(FMT_EPT, vcpu, p, m, hint, w, va, access, ac, caches, context, references)
    if p.format == FMT_PAE:
        return cached_walk_format(FMT_PAE, vcpu, p, m, hint, w, va, access, ac, caches, context, references)
    return cached_walk_format(FMT_32, vcpu, p, m, hint, w, va, access, ac, caches, context, references)


cdef inline uint8_t leaf_refuses(const Paging *p, const Walk *w) noexcept nogil:
    """A write through a clean leaf must be walked: it sets D (SDM vol. 3A section 4.8)."""
    return TLB_WRITE if w.level and not w.access & PFERR_WRITE and p.dirty & ~w.entries[w.level] else 0


cdef inline uint8_t leaf_pkey(const Walk *w) noexcept nogil:
    return <uint8_t>((w.entries[w.level] >> PT_PKEY_SHIFT) & 15)


cdef inline int shadow_miss(Vcpu *vcpu, const MemMap *m, uint64_t va, uint64_t access, uint64_t *gpa,
                            uint64_t *hpa) noexcept nogil:
    """Tables of KVM's that translate linear addresses."""
    cdef Walk *w = &vcpu.nested
    cdef TlbEntry e
    cdef int fault = cached_walk(vcpu, &vcpu.hw, m, &vcpu.table_hint, w, va, access, vcpu.ac, vcpu.tlb.psc,
                                 vcpu.tlb.psc_context, &vcpu.stats[<int>VSTAT_WALK_REF_L1])
    if fault != FAULT_NONE:
        if fault == FAULT_PF:
            tlb_page_fault(vcpu, vcpu.hw.format, va)
        return fault
    hpa[0] = w.gpa
    gpa[0] = shadow_gpa(vcpu)
    e.hpa = hpa[0]
    e.gpa = gpa[0]
    e.root = vcpu.root.page
    e.acc = <uint8_t>w.pte_access
    e.pkey = leaf_pkey(w)
    e.refuse = leaf_refuses(&vcpu.hw, w)
    e.linear_shift = <uint8_t>w.page_shift
    # KVM never sets G: a guest's global pages are not tracked.
    tlb_fill(vcpu.tlb, va, &e, w.page_shift, False)
    return FAULT_NONE


# ---- the second dimension ----------------------------------------------------------------

cdef inline uint8_t second_refuses(const Paging *host, const Walk *hw) noexcept nogil:
    """Kinds of access that a mapping of guest-physical memory does not allow."""
    cdef uint8_t refuse = leaf_refuses(host, hw)
    if permission_fault(host, walk_second_access(host, 0), hw.pte_access, False, 0):
        refuse |= TLB_READ
    if permission_fault(host, walk_second_access(host, PFERR_WRITE), hw.pte_access, False, 0):
        refuse |= TLB_WRITE
    if permission_fault(host, walk_second_access(host, PFERR_FETCH), hw.pte_access, False, 0):
        refuse |= TLB_FETCH
    return refuse


cdef inline int second_translate(Vcpu *vcpu, const MemMap *m, uint64_t gpa, uint64_t access, uint64_t note,
                                 uint64_t *hpa, int *shift, uint8_t *refuse) noexcept nogil:
    """As ``walk_second``, by a guest-physical mapping if one is cached."""
    cdef const Paging *host = &vcpu.hw
    cdef Walk *hw = &vcpu.nested
    cdef TlbEntry new_
    cdef TlbEntry *e = nested_find(vcpu.tlb, gpa)
    cdef int fault
    if e != NULL:
        if not e.refuse & tlb_need(access):
            vcpu.stats[<int>VSTAT_TLB_NESTED_HIT] += 1
            hpa[0] = e.hpa + tlb_offset(e, gpa)
            shift[0] = <int>(e.key & 63)
            refuse[0] = e.refuse
            return FAULT_NONE
        nested_drop(vcpu.tlb, gpa)
    vcpu.stats[<int>VSTAT_TLB_NESTED_MISS] += 1
    fault = cached_walk(vcpu, host, m, &vcpu.table_hint, hw, gpa, access, False, vcpu.tlb.host_psc,
                        vcpu.tlb.host_context, &vcpu.stats[<int>VSTAT_NESTED_REF_L1])
    if fault != FAULT_NONE:
        if not fault_keeps(host, hw):
            tlb_nested_fault(vcpu, host.format, gpa)
        if fault != FAULT_EPT_MISCONFIG:
            hw.error_code |= note
        return fault
    hpa[0] = hw.gpa
    shift[0] = hw.page_shift
    refuse[0] = second_refuses(host, hw)
    new_.hpa = hw.gpa
    new_.gpa = gpa
    new_.root = vcpu.root.page
    new_.acc = <uint8_t>hw.pte_access
    new_.pkey = 0
    new_.refuse = refuse[0]
    new_.linear_shift = <uint8_t>hw.page_shift
    nested_fill(vcpu.tlb, gpa, &new_, hw.page_shift)
    return FAULT_NONE


# ---- two dimensions -----------------------------------------------------------------------

cdef inline int nested_gather(int fmt, Vcpu *vcpu, const MemMap *m, uint64_t va, uint64_t access, bint from_top,
                              bint *resumed, uint64_t *hpas) noexcept nogil:
    """The guest's tables down to the leaf: a WALK_* as ``walk_nested_loop`` has it."""
    cdef const Paging *guest = &vcpu.guest_hw
    cdef Walk *gw = &vcpu.walk
    cdef PscEntry *known = NULL
    cdef uint64_t at = 0
    cdef uint8_t refuse = 0
    cdef int shift = 0
    cdef int r = walk_begin(guest, gw, va, access, vcpu.ac)
    resumed[0] = False
    if r == WALK_NEXT and not from_top:
        known = psc_resume(fmt, vcpu.tlb, vcpu.tlb.psc, vcpu.tlb.psc_context, gw)
        resumed[0] = known != NULL
        vcpu.stats[<int>VSTAT_WALK_CACHE_HIT] += resumed[0]
    while r == WALK_NEXT:
        if known != NULL:
            at = known.hpa | (gw.entry_gpa & 4095)
            known = NULL
        elif second_translate(vcpu, m, gw.entry_gpa, vcpu.hw.table_access, vcpu.hw.table_note, &at, &shift,
                              &refuse) != FAULT_NONE:
            gw.fault = vcpu.nested.fault
            gw.error_code = vcpu.nested.error_code
            return WALK_FAULT
        hpas[gw.level] = at
        vcpu.stats[<int>VSTAT_WALK_REF_L1 + gw.level - 1] += 1
        r = walk_step(fmt, guest, gw, walk_fetch(fmt, m, at, &vcpu.mem_hint))
    return walk_finish(guest, gw) if r == WALK_LEAF else r


cdef inline int nested_set_ad(Vcpu *vcpu, const MemMap *m, const uint64_t *hpas) noexcept nogil:
    return walk_nested_set_ad(&vcpu.guest_hw, &vcpu.hw, m, &vcpu.table_hint, &vcpu.mem_hint, &vcpu.walk, &vcpu.nested,
                              hpas)


cdef inline int nested_fault(int fmt, Vcpu *vcpu, uint64_t va) noexcept nogil:
    """The fault in ``vcpu.walk``, with what it takes out of the caches."""
    cdef int fault = vcpu.walk.fault
    if fault != FAULT_GP and fmt != FMT_NONE and (fault == FAULT_PF or not fault_keeps(&vcpu.hw, &vcpu.nested)):
        tlb_page_fault(vcpu, fmt, va)
    return fault


cdef inline int nested_miss_format(int fmt, Vcpu *vcpu, const MemMap *m, uint64_t va, uint64_t access, uint64_t *gpa,
                                   uint64_t *hpa) noexcept nogil:
    cdef const Paging *guest = &vcpu.guest_hw
    cdef Walk *gw = &vcpu.walk
    cdef TlbEntry e
    cdef uint64_t hpas[6]
    cdef bint resumed = False, from_top = False
    cdef uint8_t refuse = 0
    cdef int r, shift = 0
    while True:
        r = nested_gather(fmt, vcpu, m, va, access, from_top, &resumed, hpas)
        if r == WALK_FAULT:
            if resumed and gw.fault == FAULT_PF and not fault_from_memory(guest, gw):
                psc_drop(fmt, vcpu.tlb.psc, va, vcpu.tlb.psc_context)
                from_top = True
                continue
            return nested_fault(fmt, vcpu, va)
        from_top = True
        if guest.ad_first and walk_ad_wanted(guest, gw):
            r = nested_set_ad(vcpu, m, hpas)
            if r == WALK_FAULT:
                return nested_fault(fmt, vcpu, va)
            if r == WALK_NEXT:
                continue
        if second_translate(vcpu, m, gw.gpa, walk_second_access(&vcpu.hw, access), vcpu.hw.final_note, hpa, &shift,
                            &refuse) != FAULT_NONE:
            gw.fault = vcpu.nested.fault
            gw.error_code = vcpu.nested.error_code
            if gw.accessed == guest.accessed and fault_keeps(&vcpu.hw, &vcpu.nested):
                psc_remember(fmt, vcpu.tlb, vcpu.tlb.psc, vcpu.tlb.psc_context, gw, gw.level, hpas, vcpu.root.page)
            return nested_fault(fmt, vcpu, va)
        if guest.ad_first or not walk_ad_wanted(guest, gw):
            break
        r = nested_set_ad(vcpu, m, hpas)
        if r == WALK_FAULT:
            return nested_fault(fmt, vcpu, va)
        if r == WALK_LEAF:
            break
    gpa[0] = gw.gpa
    if fmt == FMT_NONE:
        # A guest without paging uses guest-physical mappings alone (SDM vol. 3C section 29.4.2).
        return FAULT_NONE
    psc_remember(fmt, vcpu.tlb, vcpu.tlb.psc, vcpu.tlb.psc_context, gw, gw.level, hpas, vcpu.root.page)
    e.hpa = hpa[0]
    e.gpa = gpa[0]
    e.root = vcpu.root.page
    e.acc = <uint8_t>gw.pte_access
    e.pkey = leaf_pkey(gw)
    e.refuse = refuse | leaf_refuses(guest, gw)
    e.linear_shift = <uint8_t>gw.page_shift
    tlb_fill(vcpu.tlb, va, &e, gw.page_shift if gw.page_shift < shift else shift,
             gw.entries[gw.level] & PT_GLOBAL_MASK != 0 and vcpu.regs.cr4 & CR4_PGE != 0)
    return FAULT_NONE


cdef inline int nested_miss(Vcpu *vcpu, const MemMap *m, uint64_t va, uint64_t access, uint64_t *gpa,
                            uint64_t *hpa) noexcept nogil:
    if vcpu.guest_hw.format == FMT_64:
        return nested_miss_format(FMT_64, vcpu, m, va, access, gpa, hpa)
    if vcpu.guest_hw.format == FMT_PAE:
        return nested_miss_format(FMT_PAE, vcpu, m, va, access, gpa, hpa)
    if vcpu.guest_hw.format == FMT_32:
        return nested_miss_format(FMT_32, vcpu, m, va, access, gpa, hpa)
    return nested_miss_format(FMT_NONE, vcpu, m, va, access, gpa, hpa)


# ---- an access ---------------------------------------------------------------------------------

cdef inline const Paging *tlb_tables(const Vcpu *vcpu) noexcept nogil:
    """The tables that say what linear addresses may do."""
    return &vcpu.hw if vcpu.vm.mmu == MMU_SHADOW else &vcpu.guest_hw


cdef inline bint tlb_serves(const Paging *p, const TlbEntry *e, uint64_t access, bint ac) noexcept nogil:
    """An entry that translates an address allows the access to it."""
    if (p.permissions[permission_index(access, ac)] >> e.acc) & 1:
        return False
    if e.refuse and e.refuse & tlb_need(access & ~<uint64_t>PFERR_USER):
        return False
    # Where PKRU refuses nothing no key does.
    return not p.pkru or not p.pke or not pkey_fault(p.pkru_mask, p.pkru, access, e.acc, e.pkey)


cdef inline TlbEntry *tlb_hit(Vcpu *vcpu, const Paging *p, uint64_t va, uint64_t access) noexcept nogil:
    """The entry that serves an access, or NULL.  No table is read, nothing but the entry's age changes."""
    cdef TlbEntry *e = tlb_find(vcpu.tlb, va, <int>(access // PFERR_FETCH) & 1)
    if e == NULL or not tlb_serves(p, e, access, vcpu.ac):
        return NULL
    vcpu.stats[<int>VSTAT_TLB_HIT] += 1
    return e


cdef inline int tlb_refused(Vcpu *vcpu, const Paging *p, const TlbEntry *e, uint64_t va,
                            uint64_t access) noexcept nogil:
    """The entry does not serve: it goes.  With ``spurious_faults`` missing rights end the access in their fault."""
    cdef Walk *w = &vcpu.nested if vcpu.vm.mmu == MMU_SHADOW else &vcpu.walk
    cdef uint64_t refused = permission_fault(p, access, e.acc, vcpu.ac, e.pkey)
    if not refused:
        tlb_drop_entry(vcpu.tlb, va, vcpu.tlb.context, vcpu.tlb.global_context)
        return FAULT_NONE
    tlb_page_fault(vcpu, p.format, va)
    if not vcpu.tlb.spurious_faults:
        return FAULT_NONE
    w.va = va
    w.access = access
    walk_fault(p, w, refused)
    return w.fault


cdef inline int tlb_access(Vcpu *vcpu, uint64_t va, uint64_t access, uint64_t *gpa, uint64_t *hpa) noexcept nogil:
    """What the processor does with an address: FAULT_NONE, or FAULT_* with the details in the walks."""
    cdef const Paging *p = tlb_tables(vcpu)
    cdef const MemMap *m = vm_hostmem(vcpu.vm)
    cdef TlbEntry *e
    cdef int fault
    va &= p.va_mask
    if p.format != FMT_NONE:
        e = tlb_find(vcpu.tlb, va, (access & PFERR_FETCH) != 0)
        if e != NULL:
            if tlb_serves(p, e, access, vcpu.ac):
                vcpu.stats[<int>VSTAT_TLB_HIT] += 1
                hpa[0] = e.hpa + tlb_offset(e, va)
                gpa[0] = e.gpa + tlb_offset(e, va)
                return FAULT_NONE
            fault = tlb_refused(vcpu, p, e, va, access)
            if fault != FAULT_NONE:
                return fault
        vcpu.stats[<int>VSTAT_TLB_MISS] += 1
    if vcpu.vm.mmu == MMU_SHADOW:
        return shadow_miss(vcpu, m, va, access, gpa, hpa)
    return nested_miss(vcpu, m, va, access, gpa, hpa)
