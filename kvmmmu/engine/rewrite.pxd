# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Which sptes stand behind an entry of a guest table, and (2011) making them anew when it is written."""

from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport Paging
from kvmmmu.bits.spte cimport spte_present
from kvmmmu.engine.atomics cimport ld_u32, ld_u64
from kvmmmu.engine.guest cimport gpte_gfn, guest_host_atomic
from kvmmmu.engine.leaf cimport leaf_install
from kvmmmu.engine.lookup cimport vcpu_slot
from kvmmmu.engine.pages cimport (
    gfn_first_page, gfn_next_page, page_at, role_level, role_quadrant, spte_at, spte_page,
)
from kvmmmu.engine.pfns cimport gfn_to_pfn_atomic, pfn_is_error
from kvmmmu.engine.prefetch cimport gpte_clean_access, gpte_unusable
from kvmmmu.engine.sptes cimport spte_read, spte_zap
from kvmmmu.engine.state cimport (
    STAT_MMU_PDE_ZAPPED, STAT_MMU_PTE_UPDATED, STAT_MMU_PTE_WRITE, ShadowPage, Slot, Vcpu, Vm,
)
from kvmmmu.engine.tlb cimport flush_own_tlb, flush_remote_tlbs


cdef inline int written_sptes(const ShadowPage *sp, uint64_t gpa, int *first) noexcept nogil:
    """How many sptes of the page stand behind the entry, and the first of them.

    A 32-bit guest's table fills several shadow pages (quadrants); its 4 MiB entries two sptes each.
    """
    cdef int offset = <int>(gpa & 4095)
    cdef int entry, n = 1
    if not sp.role & ROLE_4BYTE_GPTE:
        first[0] = offset >> 3
        return 1
    entry = offset >> 2
    if role_level(sp.role) == LEVEL_2M:
        entry <<= 1
        n = 2
    if entry >> 9 != role_quadrant(sp.role):
        return 0
    first[0] = entry & 511
    return n


cdef inline uint64_t written_entry(Vcpu *vcpu, uint64_t *gpa, int *size) noexcept nogil:
    """The whole entry as it is now; half of an 8-byte entry counts as the entry."""
    cdef uint8_t *host
    if size[0] == 4 and vcpu.regs.cr4 & CR4_PAE:
        gpa[0] &= ~<uint64_t>7
        size[0] = 8
    if size[0] != 4 and size[0] != 8 or gpa[0] & <uint64_t>(size[0] - 1):
        return 0
    host = guest_host_atomic(vcpu, gpa[0])
    if host == NULL:
        return 0
    return ld_u64(<const uint64_t *>host) if size[0] == 8 else ld_u32(<const uint32_t *>host)


cdef inline bint entry_same_mode(const Vcpu *vcpu, const ShadowPage *sp) noexcept nogil:
    """The page was made under the paging mode of now, so that the entry means the same to it."""
    cdef uint32_t mode = vcpu.root_role & (ROLE_CR0_WP | ROLE_EFER_NX)
    if not vcpu.regs.cr4 & CR4_PAE:
        mode |= ROLE_4BYTE_GPTE
    return (sp.role & (ROLE_CR0_WP | ROLE_EFER_NX | ROLE_4BYTE_GPTE)) == mode


cdef inline void entry_install(Vcpu *vcpu, uint64_t index, uint64_t gpte) noexcept nogil:
    """Map a written entry before it is used; one without a slot becomes an mmio spte, and nobody emulates for it."""
    cdef Vm *vm = vcpu.vm
    cdef const Paging *p = &vcpu.guest
    cdef ShadowPage *sp = page_at(vm, spte_page(index))
    cdef uint64_t gfn, pfn = PFN_NOSLOT
    cdef Slot *slot
    if gpte_unusable(vm, p, index, gpte):
        return
    gfn = gpte_gfn(p, gpte)
    slot = vcpu_slot(vcpu, gfn)
    if slot != NULL:
        pfn = gfn_to_pfn_atomic(vm, slot, gfn)
        if pfn_is_error(pfn):
            return
    leaf_install(vcpu, slot, index, gpte_clean_access(sp, p.format, gpte), gfn, pfn, NULL, True, True)


cdef inline bint entry_owes_flush(const Vm *vm, uint64_t old, uint64_t new_) noexcept nogil:
    """Another frame, or fewer rights (``need_remote_flush``)."""
    cdef uint64_t rights = PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK | PT64_NX_MASK
    if not spte_present(old):
        return False
    if not spte_present(new_) or (old ^ new_) & PT_ADDR_MASK:
        return True
    return ((old ^ PT64_NX_MASK) & ~(new_ ^ PT64_NX_MASK) & rights) != 0


cdef inline bint entry_rewrite(Vcpu *vcpu, int32_t id, uint64_t gpa, uint64_t entry) noexcept nogil:
    """The sptes of one page behind a written entry.  True: a remote flush is owed."""
    cdef Vm *vm = vcpu.vm
    cdef ShadowPage *sp = page_at(vm, id)
    cdef uint64_t index, old
    cdef int first = 0
    cdef int n = written_sptes(sp, gpa, &first)
    cdef bint flush = False, anew = (vm.switches.era & ERA_ENTRY_INSTALLS) != 0
    index = (<uint64_t>id << 9) + <uint64_t>first
    while n:
        old = spte_read(spte_at(vm, index))
        if entry and role_level(sp.role) != LEVEL_4K and (not anew or entry_same_mode(vcpu, sp)):
            vm.stats[<int>STAT_MMU_PDE_ZAPPED] += 1
        if not anew:
            flush |= spte_zap(vm, index)
        else:
            spte_zap(vm, index)
            if entry and role_level(sp.role) == LEVEL_4K and entry_same_mode(vcpu, sp):
                vm.stats[<int>STAT_MMU_PTE_UPDATED] += 1
                entry_install(vcpu, index, entry)
            flush |= entry_owes_flush(vm, old, spte_read(spte_at(vm, index)))
        index += 1
        n -= 1
    return flush


cdef inline void table_rewrite(Vcpu *vcpu, uint64_t gpa, int size) noexcept nogil:
    """INVLPG as Linux 3.1 ends it: every page of the table takes the entry as it is now."""
    cdef Vm *vm = vcpu.vm
    cdef uint64_t entry
    cdef int32_t id
    cdef bint flush = False, any = False
    if not vm.indirect_pages:
        return
    entry = written_entry(vcpu, &gpa, &size)
    vm.stats[<int>STAT_MMU_PTE_WRITE] += 1
    id = gfn_first_page(vm, gpa >> 12)
    while id:
        any = True
        flush |= entry_rewrite(vcpu, id, gpa, entry)
        id = gfn_next_page(vm, id, gpa >> 12)
    if flush:
        flush_remote_tlbs(vm)
    elif any:
        flush_own_tlb(vcpu)
