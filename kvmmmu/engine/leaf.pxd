# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Making one leaf: which bits it gets, and what installing it did."""

from libc.stdint cimport uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.mmio cimport mmio_spte_gen, mmio_spte_make
from kvmmmu.bits.spte cimport (
    SpteMasks, spte_accessed_mask, spte_child, spte_dirty_mask, spte_is_last, spte_pfn, spte_present, spte_writable,
)
from kvmmmu.engine.events cimport ev_mark_mmio_spte, ev_set_spte
from kvmmmu.engine.hooks cimport POINT_SPTE_WRITE, hook
from kvmmmu.engine.locks cimport readers_drain
from kvmmmu.engine.lookup cimport slot_mark_dirty
from kvmmmu.engine.memslots cimport gfn_to_rmap, slots_generation, vm_slots
from kvmmmu.engine.pages cimport page_at, role_level, spte_at, spte_page, spte_set_shadowed
from kvmmmu.engine.rmap cimport PteIter, pte_list_first
from kvmmmu.engine.sptes cimport parent_remove, rmap_add, spte_drop, spte_read, spte_update, spte_write
from kvmmmu.engine.state cimport (
    Fault, MMIO_GENERATION, STAT_MAX_MMU_RMAP_SIZE, ShadowPage, Slot, VSTAT_PF_MMIO_SPTE_CREATED, Vcpu, Vm,
)
from kvmmmu.engine.tlb cimport flush_own_tlb, flush_remote_tlbs
from kvmmmu.engine.track cimport try_to_unsync

# Linux 6.1's fault results, by value; negative values are errno.
cdef enum:
    RET_PF_CONTINUE = 0
    RET_PF_RETRY = 1
    RET_PF_EMULATE = 2
    RET_PF_INVALID = 3
    RET_PF_FIXED = 4
    RET_PF_SPURIOUS = 5

cdef enum:
    RMAP_RECYCLE_THRESHOLD = 1000
    LEAF_UNLOGGED = 8   # beside ACC_*: the dirty log does not hear of this leaf


cdef inline uint64_t vcpu_generation(Vcpu *vcpu) noexcept nogil:
    """Generation of the address space the vCPU is in; 0 for ever where a scheme has none."""
    if vcpu.vm.switches.mmio_scheme != MMIO_GENERATION:
        return 0
    return slots_generation(vm_slots(vcpu.vm, vcpu.smm))


cdef inline uint64_t acc_track_spte(const SpteMasks *m, uint64_t spte) noexcept nogil:
    """Make the next access visible: clear A, or without A/D take the rights away and keep R and X aside."""
    if (spte & SPTE_TDP_AD_MASK) != SPTE_TDP_AD_DISABLED:
        return spte & ~m.accessed
    if not spte & m.acc_track:
        return spte
    return ((spte & ~(m.acc_track | SPTE_SAVED_BITS_MASK))
            | ((spte << SPTE_SAVED_BITS_SHIFT) & SPTE_SAVED_BITS_MASK))

cdef inline uint64_t acc_track_restore(const SpteMasks *m, uint64_t spte) noexcept nogil:
    """Give back R and X; W returns only by a write fault."""
    return ((spte & ~(m.acc_track | SPTE_SAVED_BITS_MASK))
            | ((spte & SPTE_SAVED_BITS_MASK) >> SPTE_SAVED_BITS_SHIFT))


cdef inline bint leaf_make(Vm *vm, int vcpu_id, const ShadowPage *sp, Slot *slot, uint32_t access, uint64_t gfn,
                           uint64_t pfn, uint64_t old, bint prefetch, bint can_unsync, bint host_writable,
                           uint64_t *out) noexcept nogil:
    """Compute a leaf.  True: asked for W but the gfn stays write-protected.

    ``old`` is the raw value replaced: if its W bit was set the gfn was writable already,
    so no unsync is tried and D is left for the processor to set.
    """
    cdef const SpteMasks *m = &vm.masks
    cdef int level = role_level(sp.role)
    cdef uint64_t spte = SPTE_MMU_PRESENT | m.present
    cdef bint refused = False
    if sp.role & ROLE_AD_DISABLED:
        spte |= SPTE_TDP_AD_DISABLED
    if not prefetch:
        spte |= spte_accessed_mask(m, spte)
    if level > LEVEL_4K:
        spte |= PT_PAGE_SIZE_MASK
        if vm.switches.nx_huge_pages:
            access &= ~<uint32_t>ACC_X
    spte |= m.x if access & ACC_X else m.nx
    if access & ACC_U:
        spte |= m.user
    spte |= m.memtype | m.me | (pfn << 12)
    if host_writable:
        spte |= m.host_writable
    else:
        access &= ~<uint32_t>ACC_W
    if access & ACC_W:
        spte |= PT_WRITABLE_MASK | m.mmu_writable
        if not spte_writable(old) or vm.switches.era & ERA_DIRTY_BY_CPU and can_unsync:
            if try_to_unsync(vm, vcpu_id, slot, gfn, can_unsync, prefetch):
                refused = True
                spte &= ~(PT_WRITABLE_MASK | m.mmu_writable)
            elif not vm.switches.era & ERA_DIRTY_BY_CPU:
                spte |= spte_dirty_mask(m, spte)
    if vm.switches.era & ERA_DIRTY_BY_CPU and spte_present(old):
        spte |= old & m.dirty
    if prefetch:
        spte = acc_track_spte(m, spte)
    if spte_writable(spte) and slot.flags & MEM_LOG_DIRTY_PAGES and not access & LEAF_UNLOGGED:
        slot_mark_dirty(slot, gfn)
    out[0] = spte
    return refused


cdef inline void leaf_mark_mmio(Vcpu *vcpu, uint64_t index, uint64_t gfn, uint32_t access) noexcept nogil:
    """Write an mmio spte; the generation of now goes in, without its in-progress bit."""
    cdef uint64_t spte = mmio_spte_make(&vcpu.vm.masks, gfn, access, vcpu_generation(vcpu))
    ev_mark_mmio_spte(vcpu.vm, vcpu.id, index, gfn, spte & 7, mmio_spte_gen(spte))
    spte_write(spte_at(vcpu.vm, index), spte)


cdef inline bint rmap_zap_all(Vm *vm, Slot *slot, uint64_t gfn, int level) noexcept nogil:
    cdef PteIter it
    cdef uint64_t *head = gfn_to_rmap(slot, gfn, level)
    cdef uint64_t index = pte_list_first(vm, head[0], &it)
    cdef bint any = False
    while index:
        spte_drop(vm, index)
        any = True
        index = pte_list_first(vm, head[0], &it)
    return any


cdef inline void leaf_note(Vcpu *vcpu, uint64_t index, const Slot *slot, uint64_t gfn, bint refused,
                           bint prefetch) noexcept nogil:
    """What kernels of 2011 remember of a leaf besides: which slots a page maps, and the last entry made ahead."""
    page_at(vcpu.vm, spte_page(index)).slot_bits |= <uint32_t>1 << (slot.id & 31)
    if refused and vcpu.vm.switches.era & ERA_COUNT_OLD:
        flush_own_tlb(vcpu)
    if prefetch:
        vcpu.ahead_spte = index
        vcpu.ahead_gfn = gfn


cdef inline int leaf_install(Vcpu *vcpu, Slot *slot, uint64_t index, uint32_t access, uint64_t gfn, uint64_t pfn,
                             const Fault *fault, bint host_writable, bint prefetch) noexcept nogil:
    """Put a leaf into a shadow-MMU entry (``mmu_set_spte``).

    ``fault`` is NULL for a prefetch.  The *new value* decides: equal to the old one is
    SPURIOUS, whatever the access wanted.
    """
    cdef Vm *vm = vcpu.vm
    cdef ShadowPage *sp = page_at(vm, spte_page(index))
    cdef uint64_t *sptep = spte_at(vm, index)
    cdef uint64_t old = spte_read(sptep)
    cdef uint64_t spte = 0
    cdef uint64_t before
    cdef int level = role_level(sp.role)
    cdef bint flush = False, mapped = False, refused
    cdef int ret = RET_PF_FIXED

    if spte_present(old):
        if not spte_is_last(old, level):
            parent_remove(vm, spte_child(old), index)
            flush = True
        elif slot == NULL or spte_pfn(&vm.masks, old) != pfn:
            # For MMIO too: the guest may have rewritten the entry of an unsync table without INVLPG.
            flush |= spte_drop(vm, index)
        else:
            mapped = True
    hook(vcpu, POINT_SPTE_WRITE)
    if slot == NULL:
        vcpu.stats[<int>VSTAT_PF_MMIO_SPTE_CREATED] += 1
        leaf_mark_mmio(vcpu, index, gfn, access)
        if flush:
            flush_remote_tlbs(vm)
        return RET_PF_EMULATE
    refused = leaf_make(vm, vcpu.id, sp, slot, access, gfn, pfn, spte_read(sptep), prefetch, True, host_writable,
                        &spte)
    if spte_read(sptep) == spte:
        ret = RET_PF_SPURIOUS
    else:
        if flush:
            # A processor that walked the old leaf is about to ask which gfn it stood for.
            readers_drain(vm)
        spte_set_shadowed(vm, index, gfn, access)
        flush |= spte_update(vm, sptep, spte)
        ev_set_spte(vm, vcpu.id, gfn, spte, index, level)
    if refused and fault != NULL and fault.write:
        ret = RET_PF_EMULATE
    if vm.switches.era:
        leaf_note(vcpu, index, slot, gfn, refused, prefetch)
    if flush:
        flush_remote_tlbs(vm)
    spte_set_shadowed(vm, index, gfn, access & ACC_ALL)
    if not mapped:
        before = rmap_add(vm, slot, index, gfn)
        if before > vm.stats[<int>STAT_MAX_MMU_RMAP_SIZE]:
            vm.stats[<int>STAT_MAX_MMU_RMAP_SIZE] = before
        if before > RMAP_RECYCLE_THRESHOLD:
            rmap_zap_all(vm, slot, gfn, level)
            flush_remote_tlbs(vm)
    return ret
