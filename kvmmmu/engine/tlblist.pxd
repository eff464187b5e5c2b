# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What a vCPU's TLB holds now, as records, and whether KVM's tables still stand behind each."""

from libc.stddef cimport size_t
from libc.stdint cimport int32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.shadow_walk cimport shadow_walk
from kvmmmu.bits.spte cimport spte_acc_tracked, spte_is_last, spte_pfn, spte_present, spte_writable
from kvmmmu.engine.pages cimport page_at, role_level, root_table
from kvmmmu.engine.state cimport (
    LIST_FREE, MMU_SHADOW, PSC_LEVELS, PscArray, PscEntry, REQ_FREE_OBSOLETE_ROOTS, REQ_TLB_FLUSH,
    REQ_TLB_FLUSH_CURRENT, REQ_TLB_FLUSH_GUEST, TLB_SIZES, TLB_WRITE, Tlb, TlbArray, TlbEntry, Vcpu,
)
from kvmmmu.engine.tlbcache cimport CONTEXT_HOST, CONTEXT_PCID_BITS, context_alive

cdef enum:
    # Where a record comes from.
    TLB_IN_FIRST = 0      # 0 to 2: by size
    TLB_IN_SECOND = 3
    TLB_IN_NESTED = 4
    TLB_IN_PSC = 8        # plus the level of the entry that is cached
    TLB_IN_HOST_PSC = 16  # the same
    # What is wrong with one.
    TLB_FINE = 0
    TLB_UNMAPPED = 1
    TLB_OTHER_FRAME = 2
    TLB_TOO_WRITABLE = 3
    TLB_TABLE_GONE = 4
    # Words: place, address, hpa, gpa, bits of the page's offset, whose (PCID, or CONTEXT_GLOBAL, CONTEXT_HOST), rights,
    # kinds refused, verdict.
    TLB_RECORD_WORDS = 9

cdef struct TlbRecords:
    uint64_t *out
    uint64_t room         # records
    uint64_t n


cdef inline bint tlb_settled(Vcpu *vcpu) noexcept nogil:
    """No flush is owed before the vCPU runs again: what is cached must be true of KVM's tables."""
    return vcpu.root.page != 0 and not vcpu.requests & (
        REQ_TLB_FLUSH | REQ_TLB_FLUSH_CURRENT | REQ_TLB_FLUSH_GUEST | REQ_FREE_OBSOLETE_ROOTS)


cdef inline int frame_verdict(Vcpu *vcpu, uint64_t address, uint64_t hpa, bint writes) noexcept nogil:
    """Is ``address`` (linear under shadow paging, else guest-physical) still mapped to that frame?

    An spte whose rights were taken away to see the next access is present to KVM, and owes no flush.
    """
    cdef uint64_t sptes[6]
    cdef uint64_t spte, pfn
    cdef int level
    cdef int32_t table = root_table(vcpu.vm, vcpu.root.page, address, &level)
    if table == 0:
        return TLB_UNMAPPED
    level = shadow_walk(vcpu.vm.arena.sptes, <uint64_t>table, level, address, sptes)
    spte = sptes[level]
    if not spte_present(spte) or not spte_is_last(spte, level):
        return TLB_UNMAPPED
    pfn = spte_pfn(&vcpu.vm.masks, spte) + ((address >> 12) & ((ONE << (9 * (level - 1))) - 1))
    if pfn != hpa >> 12:
        return TLB_OTHER_FRAME
    if writes and not spte_writable(spte) and not spte_acc_tracked(&vcpu.vm.masks, spte):
        return TLB_TOO_WRITABLE
    return TLB_FINE


cdef inline int page_verdict(Vcpu *vcpu, const TlbEntry *e, uint64_t address) noexcept nogil:
    cdef bint writes = not e.refuse & TLB_WRITE
    if not tlb_settled(vcpu) or e.root != vcpu.root.page:
        return TLB_FINE
    if vcpu.vm.mmu == MMU_SHADOW:
        return frame_verdict(vcpu, address, e.hpa, writes and e.acc & ACC_W)
    return frame_verdict(vcpu, e.gpa, e.hpa, writes)


cdef inline int table_verdict(Vcpu *vcpu, const PscEntry *e, int level, bint of_kvm) noexcept nogil:
    """A table of KVM's is in use at its level; one of the guest's stands where it stood."""
    cdef int32_t page
    if not tlb_settled(vcpu) or e.root != vcpu.root.page:
        return TLB_FINE
    if not of_kvm:
        return frame_verdict(vcpu, e.gpa, e.hpa, False)
    page = <int32_t>(e.hpa >> 12)
    if page == 0 or page >= vcpu.vm.arena.top or page_at(vcpu.vm, page).on_list == LIST_FREE:
        return TLB_TABLE_GONE
    return TLB_FINE if role_level(page_at(vcpu.vm, page).role) == level - 1 else TLB_TABLE_GONE


cdef inline uint64_t *tlb_record(TlbRecords *r) noexcept nogil:
    r.n += 1
    return r.out + (r.n - 1) * TLB_RECORD_WORDS if r.n <= r.room else NULL


cdef inline void list_array(Vcpu *vcpu, const TlbArray *a, int place, TlbRecords *r) noexcept nogil:
    cdef TlbEntry *e = a.entries
    cdef uint64_t *w
    cdef size_t _
    for _ in range(<size_t>(a.mask + 1) * a.ways):
        if context_alive(vcpu.tlb, e.context, False):
            w = tlb_record(r)
            if w != NULL:
                w[0] = <uint64_t>place
                w[1] = (e.key >> 6) << (e.key & 63)
                w[2] = e.hpa
                w[3] = e.gpa
                w[4] = e.key & 63
                w[5] = e.context & ((ONE << CONTEXT_PCID_BITS) - 1)
                w[6] = e.acc
                w[7] = e.refuse
                w[8] = <uint64_t>page_verdict(vcpu, e, w[1])
        e += 1


cdef inline void list_tables(Vcpu *vcpu, const PscArray *a, int place, int level, bint of_kvm,
                             TlbRecords *r) noexcept nogil:
    cdef PscEntry *e = a.entries
    cdef uint64_t *w
    cdef size_t _
    for _ in range(<size_t>(a.mask + 1) * a.ways):
        if context_alive(vcpu.tlb, e.context, True):
            w = tlb_record(r)
            if w != NULL:
                w[0] = <uint64_t>(place + level)
                w[1] = e.key
                w[2] = e.hpa
                w[3] = e.gpa
                w[4] = 0
                w[5] = e.context & ((ONE << CONTEXT_PCID_BITS) - 1)
                w[6] = e.acc
                w[7] = 0
                w[8] = <uint64_t>table_verdict(vcpu, e, level, of_kvm)
        e += 1


cdef inline uint64_t tlb_records(Vcpu *vcpu, uint64_t *out, uint64_t room) noexcept nogil:
    """Write records as far as there is room; how many there are.  The vCPU does not run, mmu_lock is held."""
    cdef TlbRecords r
    cdef Tlb *t = vcpu.tlb
    cdef int i
    r.out = out
    r.room = room
    r.n = 0
    if t == NULL:
        return 0
    for i in range(TLB_SIZES):
        list_array(vcpu, &t.first[i], TLB_IN_FIRST + i, &r)
    list_array(vcpu, &t.second, TLB_IN_SECOND, &r)
    list_array(vcpu, &t.nested, TLB_IN_NESTED, &r)
    for i in range(2, PSC_LEVELS):
        list_tables(vcpu, &t.psc[i], TLB_IN_PSC, i, vcpu.vm.mmu == MMU_SHADOW, &r)
        list_tables(vcpu, &t.host_psc[i], TLB_IN_HOST_PSC, i, True, &r)
    return r.n
