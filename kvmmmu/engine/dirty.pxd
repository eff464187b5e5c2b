# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Dirty logging: what switching it on and off does, and collecting the log."""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_is_last, spte_present
from kvmmmu.engine.atomics cimport fetch_and_u64, ld_u64, xchg_u64
from kvmmmu.engine.drain cimport slots_lock
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.memslots cimport dirty_words, gfn_to_rmap, level_pages
from kvmmmu.engine.pages cimport page_at, role_level, spte_at, spte_page
from kvmmmu.engine.passes cimport PASS_COLLAPSE, PASS_PROTECT, PASS_SPLIT, tdp_each_root, tdp_slot_pass
from kvmmmu.engine.pfns cimport max_mapping_level
from kvmmmu.engine.rmap cimport PteIter, pte_list_first, pte_list_next
from kvmmmu.engine.sptes cimport spte_drop, spte_read, spte_write_protect
from kvmmmu.engine.state cimport (
    ERR_INVAL, ERR_NOENT, ERR_NONE, MAX_SLOT_ID, ShadowPage, Slot, Vm,
)
from kvmmmu.engine.tlb cimport flush_remote_tlbs
from kvmmmu.engine.track cimport write_protect_gfn

cdef enum:
    MANUAL_PROTECT = 1
    INITIALLY_SET = 2


cdef inline bint rmap_wrprot(Vm *vm, Slot *slot, uint64_t gfn, int level) noexcept nogil:
    """W falls, MMU-writable stays: the next write fault gives it back without mmu_lock."""
    cdef PteIter it
    cdef uint64_t index = pte_list_first(vm, gfn_to_rmap(slot, gfn, level)[0], &it)
    cdef bint any = False
    while index:
        any |= spte_write_protect(vm, index, False)
        index = pte_list_next(vm, &it)
    return any


cdef inline void slot_protect(Vm *vm, Slot *slot) noexcept nogil:
    """Every page of the slot must fault at its next write."""
    cdef uint64_t gfn, pages
    cdef int level
    if vm.rmaps:
        mmu_write_lock(vm)
        for level in range(LEVEL_4K, LEVEL_1G + 1):
            pages = level_pages(level)
            gfn = slot.base_gfn
            while gfn < slot.base_gfn + slot.npages:
                rmap_wrprot(vm, slot, gfn, level)
                gfn = (gfn | (pages - 1)) + 1
        mmu_write_unlock(vm)
    else:
        tdp_slot_pass(vm, slot, PASS_PROTECT)


cdef inline bint rmap_zap_collapsible(Vm *vm, Slot *slot, uint64_t gfn, int level) noexcept nogil:
    """Drop small leaves of direct pages where one large leaf could stand.  True: flush needed."""
    cdef PteIter it
    cdef ShadowPage *sp
    cdef uint64_t *head = gfn_to_rmap(slot, gfn, level)
    cdef uint64_t index = pte_list_first(vm, head[0], &it)
    cdef bint any = False
    while index:
        sp = page_at(vm, spte_page(index))
        if sp.role & ROLE_DIRECT and role_level(sp.role) < max_mapping_level(vm, slot, gfn, LEVEL_1G):
            spte_drop(vm, index)
            any = True
            index = pte_list_first(vm, head[0], &it)
        else:
            index = pte_list_next(vm, &it)
    return any


cdef inline void slot_collapse(Vm *vm, Slot *slot) noexcept nogil:
    """Logging ended: let large pages come back."""
    cdef uint64_t gfn, pages
    cdef int level
    cdef bint flush = False
    if not vm.rmaps:
        tdp_slot_pass(vm, slot, PASS_COLLAPSE)
        return
    mmu_write_lock(vm)
    for level in range(LEVEL_4K, LEVEL_1G):
        pages = level_pages(level)
        gfn = slot.base_gfn
        while gfn < slot.base_gfn + slot.npages:
            flush |= rmap_zap_collapsible(vm, slot, gfn, level)
            gfn = (gfn | (pages - 1)) + 1
    if flush:
        flush_remote_tlbs(vm)
    mmu_write_unlock(vm)


cdef inline void protect_pages_of(Vm *vm, Slot *slot) noexcept nogil:
    """Linux 3.1: every leaf of every page that ever mapped the slot, whichever slot the leaf is of.

    Large leaves go; the slot's own log could not tell their pages apart.
    """
    cdef int32_t id = vm.active.head
    cdef uint64_t index
    cdef uint64_t spte
    cdef int i
    while id:
        if page_at(vm, id).slot_bits >> (slot.id & 31) & 1:
            for i in range(ENTRIES):
                index = (<uint64_t>id << 9) + <uint64_t>i
                spte = spte_read(spte_at(vm, index))
                if not spte_present(spte) or not spte_is_last(spte, role_level(page_at(vm, id).role)):
                    continue
                if spte & PT_PAGE_SIZE_MASK and role_level(page_at(vm, id).role) > LEVEL_4K:
                    spte_drop(vm, index)
                else:
                    spte_write_protect(vm, index, False)
        id = page_at(vm, id).list_next
    flush_remote_tlbs(vm)


cdef inline void slot_unchanged(Vm *vm, Slot *slot) noexcept nogil:
    """A call that changed nothing: Linux 3.1 commits it all the same, and that write-protects."""
    if vm.switches.era & ERA_LOG_WHOLE_SLOT:
        mmu_write_lock(vm)
        protect_pages_of(vm, slot)
        mmu_write_unlock(vm)


cdef inline void slot_logging_changed(Vm *vm, Slot *slot, uint32_t old_flags) noexcept nogil:
    """The log of an existing slot was switched on or off; read-only slots have none."""
    cdef bint was = (old_flags & MEM_LOG_DIRTY_PAGES) != 0
    cdef bint is_ = (slot.flags & MEM_LOG_DIRTY_PAGES) != 0
    if was == is_ or slot.flags & MEM_READONLY:
        return
    if vm.switches.era & ERA_LOG_WHOLE_SLOT:
        mmu_write_lock(vm)
        protect_pages_of(vm, slot)
        mmu_write_unlock(vm)
    elif not is_:
        slot_collapse(vm, slot)
    elif not vm.switches.manual_protect & INITIALLY_SET:
        if vm.switches.eager_split and not vm.rmaps:
            tdp_slot_pass(vm, slot, PASS_SPLIT)
        slot_protect(vm, slot)
        flush_remote_tlbs(vm)


cdef inline void protect_masked(Vm *vm, Slot *slot, uint64_t first, uint64_t mask) noexcept nogil:
    """Protect again the pages of one 64-page word that are being collected."""
    cdef uint64_t start, end, gfn = slot.base_gfn + first
    cdef int i
    if vm.switches.manual_protect & INITIALLY_SET:
        # Nothing was split or protected when logging began, so large pages are seen to now.
        start = gfn + <uint64_t>lowest_bit(mask)
        end = gfn + <uint64_t>highest_bit(mask)
        if vm.switches.eager_split:
            tdp_each_root(vm, slot, PASS_SPLIT, start, end + 1, 0, False)
        write_protect_gfn(vm, slot, start, LEVEL_2M)
        if start >> 9 != end >> 9:
            write_protect_gfn(vm, slot, end, LEVEL_2M)
    tdp_each_root(vm, slot, PASS_PROTECT, gfn, gfn + 64, mask, False)
    if vm.rmaps:
        for i in range(64):
            if (mask >> i) & 1:
                rmap_wrprot(vm, slot, gfn + <uint64_t>i, LEVEL_4K)

cdef inline int lowest_bit(uint64_t mask) noexcept nogil:
    cdef int i = 0
    while not (mask >> i) & 1:
        i += 1
    return i

cdef inline int highest_bit(uint64_t mask) noexcept nogil:
    cdef int i = 63
    while not (mask >> i) & 1:
        i -= 1
    return i


cdef inline Slot *logged_slot(Vm *vm, uint32_t number, int *error) noexcept nogil:
    """The slot ``as_id << 16 | id`` if it has a log.  Under slots_lock."""
    cdef Slot *slot = NULL
    error[0] = ERR_INVAL
    if number >> 16 < 2 and number & 0xffff < MAX_SLOT_ID:
        slot = vm.slot_by_id[number >> 16][number & 0xffff]
        error[0] = ERR_NOENT
        if slot != NULL and slot.dirty != NULL:
            error[0] = ERR_NONE
            return slot
    return NULL


cdef inline int dirty_get(Vm *vm, uint32_t number, uint64_t *out, uint64_t words) noexcept nogil:
    """KVM_GET_DIRTY_LOG: copy the log and, unless it is cleared by hand, start over.  Under slots_lock."""
    cdef int error = 0
    cdef Slot *slot = logged_slot(vm, number, &error)
    cdef uint64_t i
    cdef bint flush = False
    if slot == NULL:
        return error
    if words != dirty_words(slot.npages):
        return ERR_INVAL
    if vm.switches.manual_protect & MANUAL_PROTECT:
        for i in range(words):
            out[i] = ld_u64(&slot.dirty[i])
        return ERR_NONE
    mmu_write_lock(vm)
    for i in range(words):
        out[i] = xchg_u64(&slot.dirty[i], 0) if ld_u64(&slot.dirty[i]) else 0
        if out[i] and vm.switches.era & ERA_LOG_WHOLE_SLOT:
            if not flush:
                protect_pages_of(vm, slot)
            flush = True
        elif out[i]:
            flush = True
            protect_masked(vm, slot, i << 6, out[i])
    if flush:
        flush_remote_tlbs(vm)
    mmu_write_unlock(vm)
    return ERR_NONE


cdef inline int dirty_clear(Vm *vm, uint32_t number, uint64_t first, uint64_t npages,
                            const uint64_t *bits) noexcept nogil:
    """KVM_CLEAR_DIRTY_LOG: forget the pages whose bits are set, and protect them again.  Under slots_lock.

    ``first`` is a multiple of 64, and so is ``npages`` unless the range reaches the slot's end.
    """
    cdef int error = 0
    cdef Slot *slot
    cdef uint64_t i, mask
    cdef bint flush = False
    if first & 63:
        return ERR_INVAL
    slot = logged_slot(vm, number, &error)
    if slot == NULL:
        return error
    if (first > slot.npages or npages > slot.npages - first
            or npages & 63 and npages != slot.npages - first):
        return ERR_INVAL
    mmu_write_lock(vm)
    for i in range(dirty_words(npages)):
        mask = bits[i]
        if not mask:
            continue
        mask &= fetch_and_u64(&slot.dirty[(first >> 6) + i], ~mask)
        if mask:
            flush = True
            protect_masked(vm, slot, first + (i << 6), mask)
    if flush:
        flush_remote_tlbs(vm)
    mmu_write_unlock(vm)
    return ERR_NONE
