# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Who may write a guest table: write protection, unsync pages, large-page vetoes."""

from libc.stdint cimport int32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_child, spte_present, spte_writable
from kvmmmu.engine.atomics cimport full_barrier, ld_u16, st_u16, st_u64, st_u8
from kvmmmu.engine.events cimport ev_unsync_page, ev_tdp_spte_changed
from kvmmmu.engine.hooks cimport POINT_ACCOUNTED, POINT_UNSYNC, hook
from kvmmmu.engine.lookup cimport slot_allow_large, slot_forbid_large, vm_slot
from kvmmmu.engine.memslots cimport gfn_to_rmap, gfn_to_write_track
from kvmmmu.engine.pages cimport (
    gfn_first_page, gfn_next_page, page_at, page_sptes, role_as_id, role_level, spte_page,
    spte_at, unsync_bit_set, level_index,
)
from kvmmmu.engine.rmap cimport PteIter, pte_list_first, pte_list_next
from kvmmmu.engine.sptes cimport spte_drop, spte_exchange, spte_read, spte_write_protect
from kvmmmu.engine.state cimport STAT_MMU_UNSYNC, ShadowPage, Slot, Vm
from kvmmmu.engine.tlb cimport flush_remote_tlbs


cdef inline bint tdp_write_protect_gfn(Vm *vm, int as_id, uint64_t gfn, int min_level) noexcept nogil:
    """The TDP MMU's leaves of a gfn lose W and MMU-writable.  True: flush needed."""
    cdef int32_t root = vm.tdp_roots
    cdef int32_t table
    cdef ShadowPage *sp
    cdef uint64_t *sptep
    cdef uint64_t spte
    cdef int level
    cdef bint changed = False
    while root:
        sp = page_at(vm, root)
        if role_as_id(sp.role) == as_id and not sp.role & ROLE_INVALID:
            table = root
            level = role_level(sp.role)
            while True:
                sptep = page_sptes(vm, table) + level_index(gfn << 12, level)
                spte = spte_read(sptep)
                if not spte_present(spte):
                    break
                if level == LEVEL_4K or spte & PT_PAGE_SIZE_MASK:
                    if level >= min_level and (spte_writable(spte) or spte & vm.masks.mmu_writable):
                        spte_exchange(&vm.masks, sptep, spte & ~(PT_WRITABLE_MASK | vm.masks.mmu_writable))
                        ev_tdp_spte_changed(vm, -1, gfn, spte, spte_read(sptep), level, as_id)
                        changed = True
                    break
                table = spte_child(spte)
                level -= 1
        root = sp.list_next
    return changed


cdef inline bint write_protect_gfn(Vm *vm, Slot *slot, uint64_t gfn, int min_level) noexcept nogil:
    """No spte maps the gfn writable afterwards.  True: flush needed."""
    cdef PteIter it
    cdef uint64_t index
    cdef int level
    cdef bint flush = False
    if vm.rmaps:
        for level in range(min_level, LEVEL_1G + 1):
            index = pte_list_first(vm, gfn_to_rmap(slot, gfn, level)[0], &it)
            while index:
                if level > LEVEL_4K and vm.switches.era & ERA_PROTECT_DROPS_LARGE:
                    # The list changes with each drop: begin again.
                    if spte_writable(spte_read(spte_at(vm, index))):
                        flush |= spte_drop(vm, index)
                        index = pte_list_first(vm, gfn_to_rmap(slot, gfn, level)[0], &it)
                        continue
                else:
                    flush |= spte_write_protect(vm, index, True)
                index = pte_list_next(vm, &it)
    if vm.tdp_roots:
        flush |= tdp_write_protect_gfn(vm, <int>slot.as_id, gfn, min_level)
    return flush


cdef inline void account_shadowed(Vm *vm, int32_t id) noexcept nogil:
    """A new page shadows a guest table: that gfn must not be written unseen.

    The count goes up before the table is read, the mirror of an emulated write that
    stores before it tests the count.
    """
    cdef ShadowPage *sp = page_at(vm, id)
    cdef Slot *slot = vm_slot(vm, role_as_id(sp.role), sp.gfn)
    st_u64(<uint64_t *>&vm.indirect_pages, <uint64_t>(vm.indirect_pages + 1))
    full_barrier()
    hook(vm, POINT_ACCOUNTED)
    if slot == NULL:
        return
    if role_level(sp.role) > LEVEL_4K:
        st_u16(gfn_to_write_track(slot, sp.gfn), gfn_to_write_track(slot, sp.gfn)[0] + 1)
    slot_forbid_large(slot, sp.gfn)
    if write_protect_gfn(vm, slot, sp.gfn, LEVEL_4K):
        flush_remote_tlbs(vm)


cdef inline void unaccount_shadowed(Vm *vm, int32_t id) noexcept nogil:
    cdef ShadowPage *sp = page_at(vm, id)
    cdef Slot *slot = vm_slot(vm, role_as_id(sp.role), sp.gfn)
    st_u64(<uint64_t *>&vm.indirect_pages, <uint64_t>(vm.indirect_pages - 1))
    if slot == NULL:
        return
    if role_level(sp.role) > LEVEL_4K:
        st_u16(gfn_to_write_track(slot, sp.gfn), gfn_to_write_track(slot, sp.gfn)[0] - 1)
    slot_allow_large(slot, sp.gfn)


cdef inline bint gfn_write_tracked(const Slot *slot, uint64_t gfn) noexcept nogil:
    return slot != NULL and ld_u16(gfn_to_write_track(slot, gfn)) != 0


cdef inline void mark_parents_unsync(Vm *vm, int32_t id) noexcept nogil:
    """Tell every ancestor; stop at one that already knew of some child.

    A parent with other unsync children has told its own parents before.
    """
    cdef PteIter it
    cdef uint64_t index = pte_list_first(vm, page_at(vm, id).parents, &it)
    while index:
        mark_spte_unsync(vm, index)
        index = pte_list_next(vm, &it)

cdef inline void mark_spte_unsync(Vm *vm, uint64_t index) noexcept nogil:
    cdef int32_t parent = spte_page(index)
    if page_at(vm, parent).special:
        return
    if unsync_bit_set(vm, parent, <int>(index & 511)) and page_at(vm, parent).unsync_children == 1:
        mark_parents_unsync(vm, parent)


cdef inline bint try_to_unsync(Vm *vm, int vcpu_id, Slot *slot, uint64_t gfn, bint can_unsync,
                               bint prefetch) noexcept nogil:
    """Ask to map a gfn writable.  True: refused, it must stay write-protected."""
    cdef int32_t id
    cdef ShadowPage *sp
    if gfn_write_tracked(slot, gfn):
        return True
    id = gfn_first_page(vm, gfn)
    while id:
        sp = page_at(vm, id)
        # A table above the last level is never unsync; one of the other address space is not tracked here.
        if not can_unsync or role_level(sp.role) > LEVEL_4K:
            return True
        if not sp.unsync:
            if prefetch and not vm.switches.era & ERA_PREFETCH_UNSYNC:
                return True
            ev_unsync_page(vm, vcpu_id, id)
            st_u8(&sp.unsync, 1)
            vm.stats[<int>STAT_MMU_UNSYNC] += 1
            mark_parents_unsync(vm, id)
        id = gfn_next_page(vm, id, gfn)
    # Pairs with sync_roots: unsync is seen before the writable spte is.
    full_barrier()
    hook(vm, POINT_UNSYNC)
    return False
