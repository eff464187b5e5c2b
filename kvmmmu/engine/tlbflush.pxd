# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What takes entries out of the TLB and the paging-structure caches: instructions, faults, and KVM's requests.

SDM vol. 3A section 4.10.4.1 and vol. 3C section 29.4.3; APM vol. 2 sections 5.5 and 15.16 (ASIDs).  A
processor may always drop more; here it drops what it must, and what is cheaper to drop than to look for.
"""

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport va_canonical
from kvmmmu.engine.pscache cimport psc_drop
from kvmmmu.engine.state cimport (
    MMU_EPT, MMU_NPT, PSC_LEVELS, PscArray, TLB_PCIDS, TLB_SIZES, Tlb, TlbArray, TlbEntry, Vcpu,
)
from kvmmmu.engine.tlbcache cimport (
    CONTEXT_EPOCH_SHIFT, CONTEXT_PCID_BITS, EPOCH_BITS, nested_drop, tlb_drop_entry, tlb_drop_linear,
    tlb_key, tlb_pcid, tlb_retag,
    tlb_shift,
)

cdef enum:
    # By number: the types of INVPCID and INVVPID (SDM vol. 2A; vol. 3C chapter 31).
    INVPCID_ADDRESS = 0
    INVPCID_CONTEXT = 1
    INVPCID_ALL = 2
    INVPCID_ALL_BUT_GLOBAL = 3
    INVVPID_ADDRESS = 0
    INVVPID_CONTEXT = 1
    INVVPID_ALL = 2
    INVVPID_CONTEXT_BUT_GLOBAL = 3


# ---- epochs -------------------------------------------------------------------------

cdef inline void array_clear(TlbArray *a) noexcept nogil:
    if a.ways:
        memset(a.entries, 0, <size_t>(a.mask + 1) * a.ways * sizeof(TlbEntry))

cdef inline void psc_array_clear(PscArray *a) noexcept nogil:
    if a.ways:
        memset(a.entries, 0, <size_t>(a.mask + 1) * a.ways * sizeof(a.entries[0]))

cdef inline void tlb_clear(Tlb *t) noexcept nogil:
    """Empty every array and begin counting epochs anew."""
    cdef int i
    for i in range(TLB_SIZES):
        array_clear(&t.first[i])
    array_clear(&t.second)
    array_clear(&t.nested)
    for i in range(PSC_LEVELS):
        psc_array_clear(&t.psc[i])
        psc_array_clear(&t.host_psc[i])
    memset(t.pcid_epoch, 0, 2 * TLB_PCIDS * sizeof(uint64_t))
    t.all_epoch = 0
    t.global_epoch = 0
    t.host_epoch = 0
    t.tables_epoch = 0
    t.moves = 0
    t.sizes = 0
    t.nested_sizes = 0
    t.split = 0

cdef inline void tlb_epochs_moved(Vcpu *vcpu) noexcept nogil:
    """Before a context has no room for an epoch every entry goes for good.

    A context holds the sum of a few; what each has moved together is an upper bound of all sums.
    """
    cdef Tlb *t = vcpu.tlb
    t.moves += 1
    if (t.moves + 2) >> EPOCH_BITS:
        tlb_clear(t)
    tlb_retag(vcpu)

cdef inline void flush_pcid(Vcpu *vcpu, uint64_t pcid) noexcept nogil:
    """All of a PCID but global pages."""
    cdef Tlb *t = vcpu.tlb
    t.pcid_epoch[pcid] += 1
    tlb_epochs_moved(vcpu)

cdef inline void flush_tables(Vcpu *vcpu, uint64_t pcid) noexcept nogil:
    """The paging-structure caches of a PCID."""
    cdef Tlb *t = vcpu.tlb
    t.psc_epoch[pcid] += 1
    tlb_epochs_moved(vcpu)

cdef inline void flush_linear(Vcpu *vcpu, bint globals_too) noexcept nogil:
    """Everything that a linear address is looked up in."""
    cdef Tlb *t = vcpu.tlb
    t.all_epoch += 1
    if globals_too:
        t.global_epoch += 1
        t.sizes = 0
        t.split = 0
    tlb_epochs_moved(vcpu)

cdef inline void flush_everything(Vcpu *vcpu) noexcept nogil:
    cdef Tlb *t = vcpu.tlb
    t.host_epoch += 1
    t.nested_sizes = 0
    flush_linear(vcpu, True)


# ---- instructions of the guest that the processor carries out by itself ---------------------

cdef inline void tlb_invlpg(Vcpu *vcpu, uint64_t va) noexcept nogil:
    """The page of the current PCID, the global page whatever the PCID, and all paging-structure caches of the PCID."""
    cdef Tlb *t = vcpu.tlb
    if t == NULL:
        return
    va &= vcpu.guest.va_mask
    if not va_canonical(va, vcpu.guest.va_shift):
        return
    tlb_drop_linear(t, va, t.context, t.global_context)
    flush_tables(vcpu, tlb_pcid(vcpu))

cdef inline void tlb_mov_cr3(Vcpu *vcpu, bint keep) noexcept nogil:
    """After the register has its value; ``keep``: bit 63 of the operand was set under CR4.PCIDE."""
    if vcpu.tlb == NULL:
        return
    if keep:
        tlb_retag(vcpu)
    else:
        flush_pcid(vcpu, tlb_pcid(vcpu))

cdef inline void tlb_invpcid(Vcpu *vcpu, int kind, uint64_t pcid, uint64_t va) noexcept nogil:
    cdef Tlb *t = vcpu.tlb
    cdef uint64_t mine
    if t == NULL:
        return
    if kind == INVPCID_ADDRESS:
        mine = t.context & ~(((ONE << CONTEXT_PCID_BITS) - 1) | (ALL_ONES << CONTEXT_EPOCH_SHIFT))
        mine |= pcid | ((t.pcid_epoch[pcid] + t.all_epoch) << CONTEXT_EPOCH_SHIFT)
        tlb_drop_linear(t, va, mine, mine)
        flush_tables(vcpu, pcid)
    elif kind == INVPCID_CONTEXT:
        flush_pcid(vcpu, pcid)
    else:
        flush_linear(vcpu, kind == INVPCID_ALL)


# ---- faults (SDM vol. 3A section 4.10.4.1, vol. 3C section 29.4.3.1) ---------------------------

cdef inline void tlb_page_fault(Vcpu *vcpu, int fmt, uint64_t va) noexcept nogil:
    """What a #PF (EPT violation, NPF) of a linear address takes along, so that no cache makes it happen again."""
    cdef Tlb *t = vcpu.tlb
    tlb_drop_entry(t, va, t.context, t.global_context)
    psc_drop(fmt, t.psc, va, t.psc_context)

cdef inline void tlb_nested_fault(Vcpu *vcpu, int fmt, uint64_t gpa) noexcept nogil:
    """The guest-physical mappings of the address that an EPT violation or NPF names."""
    nested_drop(vcpu.tlb, gpa)
    psc_drop(fmt, vcpu.tlb.host_psc, gpa, vcpu.tlb.host_context)


# ---- instructions of the hypervisor --------------------------------------------------------

cdef inline void array_drop_any(const TlbArray *a, uint64_t va, bint parts) noexcept nogil:
    """An address in every context; ``parts``: wherever in the mapping that holds it."""
    cdef TlbEntry *e = a.entries
    cdef size_t _
    for _ in range(<size_t>(a.mask + 1) * a.ways if parts else 0):
        if ((((e.key >> 6) << (e.key & 63)) ^ va) >> e.linear_shift) == 0:
            e.context = 0
        e += 1

cdef inline void array_drop_key(const TlbArray *a, uint64_t va, uint64_t shift) noexcept nogil:
    cdef TlbEntry *e = a.entries + ((va >> shift) & a.mask) * a.ways
    cdef uint32_t _
    for _ in range(a.ways):
        if e.key == tlb_key(va, shift):
            e.context = 0
        e += 1

cdef inline void tlb_invept(Vcpu *vcpu) noexcept nogil:
    """Guest-physical and combined mappings: under EPT all there is, and without EPT nothing."""
    if vcpu.tlb != NULL and vcpu.vm.mmu == MMU_EPT:
        flush_everything(vcpu)

cdef inline void tlb_invvpid(Vcpu *vcpu, int kind, uint64_t va) noexcept nogil:
    """Linear and combined mappings of the vCPU's VPID, of every PCID; guest-physical ones stay."""
    cdef Tlb *t = vcpu.tlb
    cdef int size
    if t == NULL:
        return
    if kind != INVVPID_ADDRESS:
        flush_linear(vcpu, kind != INVVPID_CONTEXT_BUT_GLOBAL)
        return
    for size in range(TLB_SIZES):
        array_drop_any(&t.first[size], va, t.split)
        array_drop_key(&t.first[size], va, tlb_shift(size))
        array_drop_key(&t.second, va, tlb_shift(size))
    array_drop_any(&t.second, va, t.split)
    t.tables_epoch += 1
    tlb_epochs_moved(vcpu)


# ---- KVM's requests ------------------------------------------------------------------------------
# VMX: INVEPT with EPT, INVVPID without; SVM: a new ASID, which leaves everything behind (APM vol. 2 section 15.16.2).

cdef inline void tlb_flush_all(Vcpu *vcpu) noexcept nogil:
    """``flush_tlb_all``, and ``flush_tlb_current``: what is cached of the current root."""
    if vcpu.tlb != NULL:
        flush_everything(vcpu)

cdef inline void tlb_flush_guest(Vcpu *vcpu) noexcept nogil:
    """``flush_tlb_guest``: what the guest may have cached, which is no guest-physical mapping."""
    if vcpu.tlb == NULL:
        return
    if vcpu.vm.mmu == MMU_NPT:
        flush_everything(vcpu)
    else:
        tlb_invvpid(vcpu, INVVPID_CONTEXT, 0)

cdef inline void tlb_flush_gva(Vcpu *vcpu, uint64_t va) noexcept nogil:
    """``flush_tlb_gva``: INVVPID of one address, or INVLPGA."""
    tlb_invvpid(vcpu, INVVPID_ADDRESS, va)
