# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Control registers: what writing one does to the MMU."""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp, memcpy
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport CpuRegs, va_canonical
from kvmmmu.bits.spte cimport bits_between
from kvmmmu.engine.atomics cimport ld_u64
from kvmmmu.engine.guest cimport guest_host, guest_pdpte_bad
from kvmmmu.engine.locks cimport request
from kvmmmu.engine.roles cimport guest_formats, is_pae_paging, is_paging, roles_refresh, tdp_enabled
from kvmmmu.engine.roots cimport (
    ROOTS_ALL, ROOT_CURRENT, context_reset, invlpg_root, root_switch, roots_free,
)
from kvmmmu.engine.tlb cimport flush_own_tlb
from kvmmmu.engine.state cimport (
    MMU_NPT, MMU_SHADOW, PREV_ROOTS, REQ_MMU_SYNC, REQ_TLB_FLUSH_CURRENT, REQ_TLB_FLUSH_GUEST, VSTAT_INVLPG, Vcpu,
)
from kvmmmu.engine.tlbcache cimport tlb_retag
from kvmmmu.engine.tlbflush cimport (
    INVPCID_ADDRESS, INVPCID_ALL_BUT_GLOBAL, INVPCID_CONTEXT, tlb_flush_gva, tlb_invpcid, tlb_mov_cr3,
)

cdef enum:
    REG_OK = 0
    REG_GP = 1    # #GP(0): nothing changed


cdef inline int pdptrs_load(Vcpu *vcpu, uint64_t cr3) noexcept nogil:
    """Read the four PDPTEs through the slots; a bad present one refuses the load.

    With shadow paging a change of any of them ends the current root.
    """
    cdef uint64_t table = cr3 & bits_between(31, 5)
    cdef uint64_t loaded[4]
    cdef uint8_t *host = guest_host(vcpu, table)
    cdef int i
    if host == NULL:
        return REG_GP
    for i in range(4):
        loaded[i] = ld_u64(<const uint64_t *>host + i)
        if guest_pdpte_bad(vcpu, loaded[i]):
            return REG_GP
    if memcmp(loaded, vcpu.regs.pdptr, sizeof(loaded)) != 0:
        if not tdp_enabled(vcpu.vm):
            roots_free(vcpu, ROOT_CURRENT)
        memcpy(vcpu.regs.pdptr, loaded, sizeof(loaded))
        guest_formats(vcpu)
    return REG_OK


cdef inline uint64_t active_pcid(const Vcpu *vcpu) noexcept nogil:
    return vcpu.regs.cr3 & CR3_PCID_MASK if vcpu.regs.cr4 & CR4_PCIDE else 0

cdef inline void pcid_flush(Vcpu *vcpu, uint64_t pcid) noexcept nogil:
    """Everything cached for a PCID may be stale: sync the current root, drop previous ones of it."""
    cdef int i, which = 0
    if vcpu.vm.switches.era & ERA_COUNT_OLD:
        if vcpu.root.page:
            flush_own_tlb(vcpu)
            request(vcpu, REQ_MMU_SYNC)
        return
    if active_pcid(vcpu) == pcid:
        request(vcpu, REQ_MMU_SYNC | REQ_TLB_FLUSH_CURRENT)
    if not vcpu.regs.cr4 & CR4_PCIDE:
        return
    for i in range(PREV_ROOTS):
        if vcpu.prev_roots[i].page and vcpu.prev_roots[i].pgd & CR3_PCID_MASK == pcid:
            which |= 1 << i
    roots_free(vcpu, which)


cdef inline void invpcid_gva(Vcpu *vcpu, uint64_t pcid, uint64_t gva) noexcept nogil:
    """KVM's INVPCID of one address: the roots of that PCID only."""
    cdef int i
    vcpu.stats[<int>VSTAT_INVLPG] += 1
    tlb_flush_gva(vcpu, gva)
    if active_pcid(vcpu) == pcid:
        invlpg_root(vcpu, vcpu.root.page, gva)
    for i in range(PREV_ROOTS):
        if vcpu.prev_roots[i].page and (vcpu.prev_roots[i].pgd & CR3_PCID_MASK
                                        if vcpu.regs.cr4 & CR4_PCIDE else 0) == pcid:
            invlpg_root(vcpu, vcpu.prev_roots[i].page, gva)


cdef inline int vcpu_invpcid(Vcpu *vcpu, int kind, uint64_t pcid, uint64_t gva) noexcept nogil:
    """INVPCID: the processor's own under TDP, carried out by KVM under shadow paging (SDM vol. 2A)."""
    if kind > INVPCID_ALL_BUT_GLOBAL or pcid & ~CR3_PCID_MASK:
        return REG_GP
    if kind <= INVPCID_CONTEXT and pcid and not vcpu.regs.cr4 & CR4_PCIDE:
        return REG_GP
    if kind == INVPCID_ADDRESS and not va_canonical(gva, vcpu.guest.va_shift):
        return REG_GP
    if tdp_enabled(vcpu.vm):
        tlb_invpcid(vcpu, kind, pcid, gva)
    elif kind == INVPCID_ADDRESS:
        invpcid_gva(vcpu, pcid, gva & vcpu.guest.va_mask)
    elif kind == INVPCID_CONTEXT:
        pcid_flush(vcpu, pcid)
    else:
        # KVM's tables have no global pages: to leave those out would save nothing.
        request(vcpu, REQ_TLB_FLUSH_GUEST)
    return REG_OK


cdef inline bint cr3_legal(const Vcpu *vcpu, uint64_t cr3) noexcept nogil:
    """Address bits beyond MAXPHYADDR are reserved in long mode."""
    if not vcpu.regs.efer & EFER_LMA or vcpu.model.maxphyaddr >= 64:
        return True
    return cr3 >> vcpu.model.maxphyaddr == 0


cdef inline int load_cr3(Vcpu *vcpu, uint64_t value) noexcept nogil:
    """MOV to CR3.  REG_GP: refused, nothing changed."""
    cdef bint keep = False
    cdef uint64_t pcid = 0, old = vcpu.regs.cr3
    if vcpu.guest_mode:
        return REG_GP  # L2's registers are not modelled
    if vcpu.regs.cr4 & CR4_PCIDE:
        keep = (value & CR3_NOFLUSH) != 0
        value &= ~CR3_NOFLUSH
        pcid = value & CR3_PCID_MASK
    if not cr3_legal(vcpu, value):
        return REG_GP
    if (value != vcpu.regs.cr3 and vcpu.vm.switches.era & ERA_CR3_NEEDS_SLOT and not tdp_enabled(vcpu.vm)
            and guest_host(vcpu, value & PT_ADDR_MASK) == NULL):
        return REG_GP
    if value != vcpu.regs.cr3 or is_pae_paging(vcpu):
        # With nested paging SVM reads PDPTEs at each walk; loading CR3 does not (APM vol. 2 section 15.25).
        if is_pae_paging(vcpu) and pdptrs_load(vcpu, value) != REG_OK and vcpu.vm.mmu != MMU_NPT:
            return REG_GP
        if value != vcpu.regs.cr3:
            vcpu.regs.cr3 = value
            if not tdp_enabled(vcpu.vm):
                root_switch(vcpu, value)
        guest_formats(vcpu)
    # Under TDP the processor loads CR3 by itself; KVM has nothing to synchronise.
    if tdp_enabled(vcpu.vm):
        tlb_mov_cr3(vcpu, keep)
    elif not keep and not (vcpu.vm.switches.era & ERA_ONE_ROOT and value != old):
        pcid_flush(vcpu, pcid)
    return REG_OK


cdef inline bint mode_legal(uint64_t cr0, uint64_t cr4, uint64_t efer) noexcept nogil:
    """Paging needs protection; long mode needs PAE; NW needs CD."""
    if cr0 & CR0_PG and not cr0 & CR0_PE:
        return False
    if cr0 & CR0_NW and not cr0 & CR0_CD:
        return False
    if cr0 & CR0_PG and efer & EFER_LME and not cr4 & CR4_PAE:
        return False
    return True


cdef inline uint64_t efer_with_lma(uint64_t cr0, uint64_t efer) noexcept nogil:
    if efer & EFER_LME and cr0 & CR0_PG:
        return efer | EFER_LMA
    return efer & ~EFER_LMA


cdef inline int mov_cr0(Vcpu *vcpu, uint64_t value) noexcept nogil:
    cdef uint64_t old = vcpu.regs.cr0
    cdef uint64_t changed = old ^ value
    if value >> 32 or not mode_legal(value, vcpu.regs.cr4, vcpu.regs.efer):
        return REG_GP
    # Long mode is left from compatibility mode only.
    if not value & CR0_PG and (vcpu.regs.cr4 & CR4_PCIDE or vcpu.regs.efer & EFER_LMA and not vcpu.regs.compat
                               and not vcpu.vm.switches.era & ERA_CR0_LAX):
        return REG_GP
    if (value & CR0_PG and not vcpu.regs.efer & EFER_LME and vcpu.regs.cr4 & CR4_PAE
            and changed & (CR0_PG | CR0_CD | CR0_NW)):
        if pdptrs_load(vcpu, vcpu.regs.cr3) != REG_OK:
            return REG_GP
    vcpu.regs.cr0 = value
    vcpu.regs.efer = efer_with_lma(value, vcpu.regs.efer)
    if changed & CR0_PG and not value & CR0_PG:
        request(vcpu, REQ_TLB_FLUSH_GUEST)
    # A change of WP and nothing else touches no table of the second dimension.
    if changed == CR0_WP and tdp_enabled(vcpu.vm) and not vcpu.vm.switches.era & ERA_ONE_ROOT:
        roles_refresh(vcpu)
    elif changed & (CR0_PG | CR0_WP):
        context_reset(vcpu)
    return REG_OK


cdef inline int mov_cr4(Vcpu *vcpu, uint64_t value) noexcept nogil:
    cdef uint64_t old = vcpu.regs.cr4
    cdef uint64_t changed = old ^ value
    cdef uint64_t role_bits = CR4_PSE | CR4_PAE | CR4_LA57 | CR4_SMEP | CR4_SMAP | CR4_PKE
    cdef bint long_mode = (vcpu.regs.efer & EFER_LMA) != 0
    if long_mode and (not value & CR4_PAE or changed & CR4_LA57):
        return REG_GP
    if vcpu.vm.switches.era & ERA_CR4_STRICT:
        if value & (CR4_SMAP | CR4_PKE | CR4_PCIDE | CR4_LA57):
            return REG_GP
        role_bits |= CR4_PGE
    if vcpu.vm.mmu == MMU_SHADOW and value & CR4_PKE and vcpu.regs.pkru:
        return REG_GP
    if value & CR4_PCIDE and changed & CR4_PCIDE:
        if not long_mode or vcpu.regs.cr3 & CR3_PCID_MASK:
            return REG_GP
    if (is_paging(vcpu) and not long_mode and value & CR4_PAE
            and changed & (CR4_PGE | CR4_PSE | CR4_PAE | CR4_SMEP)):
        if pdptrs_load(vcpu, vcpu.regs.cr3) != REG_OK:
            return REG_GP
    vcpu.regs.cr4 = value
    tlb_retag(vcpu)
    if changed & role_bits:
        context_reset(vcpu)
    elif changed & CR4_PCIDE and value & CR4_PCIDE and not tdp_enabled(vcpu.vm):
        roots_free(vcpu, ROOTS_ALL)
    if changed & CR4_PGE or changed & CR4_PCIDE and not value & CR4_PCIDE:
        request(vcpu, REQ_TLB_FLUSH_GUEST)
    elif changed & CR4_PAE or changed & CR4_SMEP and value & CR4_SMEP:
        request(vcpu, REQ_TLB_FLUSH_CURRENT)
    return REG_OK


cdef inline int write_efer(Vcpu *vcpu, uint64_t value) noexcept nogil:
    """WRMSR to EFER; LMA is the processor's."""
    cdef uint64_t old = vcpu.regs.efer
    if vcpu.guest_mode or is_paging(vcpu) and (old ^ value) & EFER_LME:
        return REG_GP
    vcpu.regs.efer = (value & ~EFER_LMA) | (old & EFER_LMA)
    vcpu.role_nx = value & EFER_NX
    if (old ^ value) & (EFER_LME | EFER_NX):
        context_reset(vcpu)
    return REG_OK


cdef inline int set_sregs(Vcpu *vcpu, const CpuRegs *regs) noexcept nogil:
    """KVM_SET_SREGS: all at once, PDPTEs reread when the result is PAE paging.

    The context is reset if a control register differs, and always under PAE paging.
    """
    cdef CpuRegs old = vcpu.regs
    cdef bint pae
    if vcpu.guest_mode:
        return REG_GP
    # LMA follows from the rest: any other value would give the two halves of the MMU different modes.
    if not mode_legal(regs.cr0, regs.cr4, regs.efer) or efer_with_lma(regs.cr0, regs.efer) != regs.efer:
        return REG_GP
    # KVM offers no protection keys with shadow paging: its own tables carry none.  Runs recorded on a processor that
    # has them set CR4.PKE, and with PKRU = 0 it means nothing; the Python face refuses the bit as an absent feature.
    if vcpu.vm.mmu == MMU_SHADOW and regs.cr4 & CR4_PKE and regs.pkru:
        return REG_GP
    # LMA is LME under paging, no more and no less.
    if regs.efer != efer_with_lma(regs.cr0, regs.efer):
        return REG_GP
    vcpu.regs.cr0 = regs.cr0
    vcpu.regs.cr3 = regs.cr3
    vcpu.regs.cr4 = regs.cr4
    vcpu.regs.efer = regs.efer
    vcpu.regs.pkru = regs.pkru
    vcpu.regs.compat = regs.compat
    pae = is_pae_paging(vcpu)
    if not cr3_legal(vcpu, regs.cr3) or pae and pdptrs_load(vcpu, regs.cr3) != REG_OK:
        vcpu.regs = old
        return REG_GP
    if pae or old.cr0 != regs.cr0 or old.cr3 != regs.cr3 or old.cr4 != regs.cr4 or old.efer != regs.efer:
        context_reset(vcpu)
    elif old.pkru != regs.pkru or old.compat != regs.compat:
        roles_refresh(vcpu)
    return REG_OK
