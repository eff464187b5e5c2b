# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""KVM_SET_USER_MEMORY_REGION: the rules that refuse a change, and the steps of one that is accepted.

Linux documents the call in Documentation/virt/kvm/api.rst section 4.35.  Everything is
allocated before anything is published, so an error leaves the slots as they were.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.state cimport *
from kvmmmu.engine.dirty cimport INITIALLY_SET, slot_logging_changed, slot_unchanged
from kvmmmu.engine.drain cimport slots_lock, slots_unlock, vm_drain
from kvmmmu.engine.hostmem cimport (HostPlan, hostmem_commit_bind, hostmem_commit_unbind, hostmem_plan_bind,
                                    hostmem_plan_unbind, plan_drop)
from kvmmmu.engine.hooks cimport POINT_SLOT_INVALID, POINT_SLOT_ZAPPED, hook
from kvmmmu.engine.memslots cimport dirty_new, slot_copy, slot_free, slot_is_mapped, slot_make_arrays
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.slotsets cimport slots_publish, slots_settle, slotset_empty, slotset_overlap, slotset_replace
from kvmmmu.engine.tdp cimport tdp_invalidate_roots, tdp_zap_invalid_roots
from kvmmmu.engine.zap cimport set_max_pages, zap_all_fast


cdef struct Work:
    # What a change has allocated; whatever still stands here at the end is freed.
    HostPlan plan
    Slot *slot            # the slot to be
    Slot *invalid         # copy of the old slot that tells faults to wait
    SlotSet *first
    SlotSet *final


cdef struct Held:
    # A deletion between its two swaps: the slot is INVALID, and waits for the caller to go on.
    Region region
    Work work
    Slot *old


# ---- seams: what the shadow MMU does when slots change ------------------------------

cdef inline void region_flush_shadow(Vm *vm) noexcept nogil:
    """Every translation made so far goes; vCPUs drop their roots at their next entry."""
    mmu_write_lock(vm)
    # Before vCPUs are asked to look: they do so without the lock, and once.
    if vm.switches.tdp_mmu:
        tdp_invalidate_roots(vm)
    zap_all_fast(vm)
    mmu_write_unlock(vm)
    if vm.switches.tdp_mmu:
        tdp_zap_invalid_roots(vm)


cdef inline void nx_huge_pages_set(Vm *vm, bint on) noexcept nogil:
    slots_lock(vm)
    if vm.switches.nx_huge_pages != on:
        vm.switches.nx_huge_pages = on
        region_flush_shadow(vm)
    slots_unlock(vm)


cdef inline void region_follow_quota(Vm *vm) noexcept nogil:
    """The number of shadow pages follows the slots unless it was set by hand."""
    if vm.requested_pages:
        return
    cdef int64_t goal = <int64_t>(vm.total_pages / SLOT_PAGES_PER_MMU_PAGE)
    mmu_write_lock(vm)
    set_max_pages(vm, goal if goal > MIN_MMU_PAGES else MIN_MMU_PAGES)
    mmu_write_unlock(vm)


# ---- rules --------------------------------------------------------------------------

cdef inline uint64_t vm_max_gfn(const Vm *vm) noexcept nogil:
    """The last gfn a slot may hold: what the second dimension translates, or 52 bits without one."""
    cdef int bits = 52 if vm.mmu == MMU_SHADOW else vm.host.maxphyaddr
    # Four levels translate 48 bits.
    if vm.mmu != MMU_SHADOW and not vm.host.la57 and bits > 48:
        bits = 48
    return (<uint64_t>1 << (bits - 12)) - 1


cdef inline int region_refuse(Region *r, int err, int why, uint64_t detail) noexcept nogil:
    r.why = why
    r.detail = detail
    return err


cdef inline int region_check(const Vm *vm, Region *r, const Slot *old) noexcept nogil:
    """KVM's checks in KVM's order; on success ``r.change`` says what is to be done."""
    cdef uint64_t base_gfn = r.gpa >> 12
    cdef uint64_t npages = r.size >> 12
    cdef const Slot *other
    if r.flags & ~(MEM_LOG_DIRTY_PAGES | MEM_READONLY):
        return region_refuse(r, ERR_INVAL, WHY_FLAGS, r.flags)
    if r.size & 4095:
        return region_refuse(r, ERR_INVAL, WHY_SIZE_ALIGN, r.size)
    if r.gpa & 4095:
        return region_refuse(r, ERR_INVAL, WHY_GPA_ALIGN, r.gpa)
    if <uint64_t>r.hva & 7:
        return region_refuse(r, ERR_INVAL, WHY_HVA_ALIGN, <uint64_t>r.hva & 4095)
    if r.slot >> 16 >= ADDRESS_SPACES:
        return region_refuse(r, ERR_INVAL, WHY_AS_ID, r.slot >> 16)
    if r.gpa + r.size < r.gpa:
        return region_refuse(r, ERR_INVAL, WHY_WRAP, r.gpa)
    if npages > MAX_SLOT_PAGES:
        return region_refuse(r, ERR_INVAL, WHY_TOO_MANY_PAGES, npages)
    if npages == 0:
        if old == NULL:
            return region_refuse(r, ERR_INVAL, WHY_NO_SLOT, r.slot)
        r.change = CHANGE_DELETE
        return ERR_NONE
    if old == NULL:
        if r.keep_memory:
            return region_refuse(r, ERR_INVAL, WHY_NO_SLOT, r.slot)
        if vm.total_pages + npages < vm.total_pages:
            return region_refuse(r, ERR_INVAL, WHY_TOTAL_PAGES, npages)
        r.change = CHANGE_CREATE
    else:
        if r.hva != old.hva:
            return region_refuse(r, ERR_INVAL, WHY_HVA_CHANGED, r.slot)
        if npages != old.npages:
            return region_refuse(r, ERR_INVAL, WHY_SIZE_CHANGED, old.npages << 12)
        if (r.flags ^ old.flags) & MEM_READONLY:
            return region_refuse(r, ERR_INVAL, WHY_READONLY_CHANGED, old.flags)
        if base_gfn != old.base_gfn:
            r.change = CHANGE_MOVE
        elif r.flags != old.flags:
            r.change = CHANGE_FLAGS
        else:
            r.change = CHANGE_NONE
    if r.change == CHANGE_CREATE or r.change == CHANGE_MOVE:
        other = slotset_overlap(vm.slots[r.slot >> 16], base_gfn, npages, old)
        if other != NULL:
            return region_refuse(r, ERR_EXIST, WHY_OVERLAP, other.id)
    return ERR_NONE


# ---- steps --------------------------------------------------------------------------

cdef inline void work_free(Work *w) noexcept nogil:
    plan_drop(&w.plan)
    slot_free(w.slot)
    free(w.invalid)
    free(w.first)
    free(w.final)


cdef inline void work_clear(Work *w) noexcept nogil:
    w.plan.map = NULL
    w.plan.segments = NULL
    w.slot = NULL
    w.invalid = NULL
    w.first = NULL
    w.final = NULL


cdef inline void region_swap(Vm *vm, int as_id, SlotSet **next) noexcept nogil:
    """Publish; when the part of the generation that an mmio spte holds wraps, old sptes would look new.

    They go while bit 63 still stands: once the new number does, one of them could be believed.
    """
    cdef uint64_t generation = slots_publish(vm, as_id, next[0])
    if (vm.switches.mmio_scheme == MMIO_GENERATION and vm.masks.mmio_caching
            and (generation & MMIO_GEN_MASK & ~<uint64_t>(ADDRESS_SPACES - 1)) == 0):
        region_flush_shadow(vm)
    slots_settle(vm, next[0], generation)
    next[0] = NULL


cdef inline bint work_invalidate(const Vm *vm, Work *w, Slot *old) noexcept nogil:
    """Prepare the table in which the old slot is marked INVALID."""
    w.invalid = slot_copy(old)
    if w.invalid == NULL:
        return False
    w.invalid.flags |= MEMSLOT_INVALID
    w.first = slotset_replace(vm.slots[old.as_id], old, w.invalid)
    return w.first != NULL


cdef inline bint starts_dirty(const Vm *vm) noexcept nogil:
    return (vm.switches.manual_protect & INITIALLY_SET) != 0


cdef inline void slot_all_dirty(Slot *slot) noexcept nogil:
    cdef uint64_t i
    for i in range(slot.npages >> 6):
        slot.dirty[i] = ALL_ONES
    if slot.npages & 63:
        slot.dirty[slot.npages >> 6] = (ONE << (slot.npages & 63)) - 1


cdef inline bint slot_take_flags(Slot *slot, uint32_t flags, bint initially_set, bint *made_dirty) noexcept nogil:
    """Set flags; the dirty bitmap is made with logging, kept while it lasts, dropped after."""
    slot.flags = flags
    made_dirty[0] = False
    if not flags & MEM_LOG_DIRTY_PAGES:
        slot.dirty = NULL
    elif slot.dirty == NULL:
        slot.dirty = dirty_new(slot.npages)
        made_dirty[0] = True
        if slot.dirty != NULL and initially_set:
            slot_all_dirty(slot)
        return slot.dirty != NULL
    return True


cdef inline int region_create(Vm *vm, Region *r, Work *w) noexcept nogil:
    cdef int as_id = r.slot >> 16
    cdef int err
    cdef bint made
    cdef MemMap *old_map
    cdef Slot *slot
    if (r.gpa >> 12) + (r.size >> 12) - 1 > vm_max_gfn(vm):
        return region_refuse(r, ERR_INVAL, WHY_MAX_GFN, vm_max_gfn(vm))
    err = hostmem_plan_bind(vm, &w.plan, r.hva, r.size >> 12, r.host_writable, r.max_level, r.pfn_offset)
    if err != ERR_NONE:
        return region_refuse(r, err, w.plan.why, w.plan.detail)
    slot = <Slot *>calloc(1, sizeof(Slot))
    w.slot = slot
    if slot == NULL:
        return region_refuse(r, ERR_NOMEM, WHY_NO_MEMORY, 0)
    slot.base_gfn = r.gpa >> 12
    slot.npages = r.size >> 12
    slot.hva = r.hva
    slot.base_pfn = w.plan.segments[0].pfn
    slot.n_segments = w.plan.n_segments
    slot.id = r.slot & 0xffff
    slot.as_id = as_id
    slot.token = r.token
    if not slot_take_flags(slot, r.flags, starts_dirty(vm), &made) or not slot_make_arrays(slot):
        return region_refuse(r, ERR_NOMEM, WHY_NO_MEMORY, 0)
    w.final = slotset_replace(vm.slots[as_id], NULL, slot)
    if w.final == NULL:
        return region_refuse(r, ERR_NOMEM, WHY_NO_MEMORY, 0)

    w.slot = NULL
    old_map = hostmem_commit_bind(vm, &w.plan)
    slot.segments = w.plan.segments
    w.plan.segments = NULL
    vm.slot_by_id[as_id][slot.id] = slot
    vm.total_pages += slot.npages
    region_swap(vm, as_id, &w.final)
    free(old_map)
    region_follow_quota(vm)
    return ERR_NONE


cdef inline int region_delete(Vm *vm, Region *r, Work *w, Slot *old) noexcept nogil:
    cdef Held *held = NULL
    if (hostmem_plan_unbind(vm, &w.plan, old.hva, old.npages) != ERR_NONE or not work_invalidate(vm, w, old)):
        return region_refuse(r, ERR_NOMEM, WHY_NO_MEMORY, 0)
    w.final = slotset_replace(w.first, w.invalid, NULL)
    if r.hold:
        held = <Held *>malloc(sizeof(Held))
    if w.final == NULL or r.hold and held == NULL:
        free(held)
        return region_refuse(r, ERR_NOMEM, WHY_NO_MEMORY, 0)

    region_swap(vm, old.as_id, &w.first)
    hook(vm, POINT_SLOT_INVALID)
    region_flush_shadow(vm)
    hook(vm, POINT_SLOT_ZAPPED)
    if held == NULL:
        region_delete_end(vm, r, w, old)
        return ERR_NONE
    held.region = r[0]
    held.work = w[0]
    held.old = old
    vm.held = held
    work_clear(w)
    return ERR_NONE


cdef inline void region_delete_end(Vm *vm, Region *r, Work *w, Slot *old) noexcept nogil:
    """From "faults wait" to "no memory there"."""
    cdef MemMap *old_map
    vm.slot_by_id[old.as_id][old.id] = NULL
    vm.total_pages -= old.npages
    region_swap(vm, old.as_id, &w.final)
    old_map = hostmem_commit_unbind(vm, &w.plan)
    if old_map != NULL:
        vm_drain(vm)
        free(old_map)
    r.released = old.token
    slot_free(old)
    region_follow_quota(vm)


cdef inline void held_finish(Vm *vm, Region *out) noexcept nogil:
    """Finish the deletion that was held open.  Under slots_lock, or with nobody else there."""
    cdef Held *held = <Held *>vm.held
    vm.held = NULL
    region_delete_end(vm, &held.region, &held.work, held.old)
    work_free(&held.work)
    region_note_base(vm, &held.region, held.region.slot >> 16, held.region.slot & 0xffff)
    out[0] = held.region
    free(held)


cdef inline int region_move(Vm *vm, Region *r, Work *w, Slot *old) noexcept nogil:
    cdef int as_id = old.as_id
    cdef Slot *slot
    cdef bint made_dirty = False
    cdef bint ok
    cdef bint beyond = (r.gpa >> 12) + old.npages - 1 > vm_max_gfn(vm)
    if vm.switches.era & ERA_ZAP_AT_ONCE and slot_is_mapped(old):
        return region_refuse(r, ERR_FAULT, WHY_LIVE_SPTES, old.id)
    if not work_invalidate(vm, w, old):
        return region_refuse(r, ERR_NOMEM, WHY_NO_MEMORY, 0)
    if beyond:
        # KVM finds out after it marked the slot INVALID, so the way back is a swap too.
        w.final = slotset_replace(w.first, w.invalid, old)
        if w.final == NULL:
            return region_refuse(r, ERR_NOMEM, WHY_NO_MEMORY, 0)
        region_swap(vm, as_id, &w.first)
        region_flush_shadow(vm)
        region_swap(vm, as_id, &w.final)
        return region_refuse(r, ERR_INVAL, WHY_MAX_GFN, vm_max_gfn(vm))
    slot = slot_copy(old)
    if slot == NULL:
        return region_refuse(r, ERR_NOMEM, WHY_NO_MEMORY, 0)
    slot.base_gfn = r.gpa >> 12
    slot.arrays = NULL
    ok = slot_take_flags(slot, r.flags, starts_dirty(vm), &made_dirty) and slot_make_arrays(slot)
    if ok:
        w.final = slotset_replace(w.first, w.invalid, slot)
    if w.final == NULL:
        region_unshare(slot, made_dirty)
        return region_refuse(r, ERR_NOMEM, WHY_NO_MEMORY, 0)

    region_swap(vm, as_id, &w.first)
    hook(vm, POINT_SLOT_INVALID)
    region_flush_shadow(vm)
    hook(vm, POINT_SLOT_ZAPPED)
    vm.slot_by_id[as_id][old.id] = slot
    region_swap(vm, as_id, &w.final)
    region_retire(old, slot)
    return ERR_NONE


cdef inline int region_flags(Vm *vm, Region *r, Work *w, Slot *old) noexcept nogil:
    cdef int as_id = old.as_id
    cdef uint32_t old_flags = old.flags
    cdef bint made_dirty = False
    cdef Slot *slot = slot_copy(old)
    if slot == NULL:
        return region_refuse(r, ERR_NOMEM, WHY_NO_MEMORY, 0)
    if slot_take_flags(slot, r.flags, starts_dirty(vm), &made_dirty):
        w.final = slotset_replace(vm.slots[as_id], old, slot)
    if w.final == NULL:
        slot.arrays = NULL
        region_unshare(slot, made_dirty)
        return region_refuse(r, ERR_NOMEM, WHY_NO_MEMORY, 0)

    vm.slot_by_id[as_id][old.id] = slot
    region_swap(vm, as_id, &w.final)
    region_retire(old, slot)
    slot_logging_changed(vm, slot, old_flags)
    return ERR_NONE


cdef inline void region_unshare(Slot *slot, bint made_dirty) noexcept nogil:
    """Free a slot that was not published, but not what its original still uses."""
    slot.segments = NULL
    if not made_dirty:
        slot.dirty = NULL
    slot_free(slot)


cdef inline void region_retire(Slot *old, const Slot *heir) noexcept nogil:
    """Free a slot no reader holds any more, but not what its heir took over."""
    old.segments = NULL
    if old.arrays == heir.arrays:
        old.arrays = NULL
    if old.dirty == heir.dirty:
        old.dirty = NULL
    slot_free(old)


# ---- the call -------------------------------------------------------------------------

cdef inline int region_apply(Vm *vm, Region *r) noexcept nogil:
    cdef uint32_t id = r.slot & 0xffff
    cdef uint32_t as_id = r.slot >> 16
    cdef Slot *old = NULL
    cdef Work w
    cdef int err
    r.change = CHANGE_NONE
    r.why = WHY_NONE
    r.detail = 0
    r.released = 0
    if id >= MAX_SLOT_ID:
        return region_refuse(r, ERR_INVAL, WHY_ID, id)
    if vm.slots[0] == NULL:
        return region_refuse(r, ERR_NOENT, WHY_CLOSED, 0)
    if vm.held != NULL:
        return region_refuse(r, ERR_BUSY, WHY_HELD, (<Held *>vm.held).region.slot)
    if as_id < ADDRESS_SPACES:
        old = vm.slot_by_id[as_id][id]
    if r.keep_memory:
        r.hva = old.hva if old != NULL else NULL
        if old != NULL and r.size:
            r.size = old.npages << 12
    err = region_check(vm, r, old)
    if err == ERR_NONE and r.change == CHANGE_NONE:
        slot_unchanged(vm, old)
    if err != ERR_NONE or r.change == CHANGE_NONE:
        return err
    work_clear(&w)
    if r.change == CHANGE_CREATE:
        err = region_create(vm, r, &w)
    elif r.change == CHANGE_DELETE:
        err = region_delete(vm, r, &w, old)
    elif r.change == CHANGE_MOVE:
        err = region_move(vm, r, &w, old)
    else:
        err = region_flags(vm, r, &w, old)
    work_free(&w)
    if err == ERR_NONE and vm.held == NULL:
        region_note_base(vm, r, as_id, id)
    return err


cdef inline void region_note_base(Vm *vm, const Region *r, uint32_t as_id, uint32_t id) noexcept nogil:
    """Linux 3.1 zaps everything when a slot id comes to stand elsewhere than its last change said."""
    cdef uint64_t base_gfn = r.gpa >> 12
    if (vm.switches.mmio_scheme == MMIO_ZAP_ALL and r.change != CHANGE_DELETE
            and base_gfn != vm.last_base[as_id][id]):
        region_flush_shadow(vm)
    vm.last_base[as_id][id] = base_gfn


cdef inline int vm_set_region(Vm *vm, Region *r) noexcept nogil:
    """Create, delete, move or re-flag a slot.  Returns 0 or an ERR_* with ``r.why`` and ``r.detail``.

    Refused changes leave every slot, generation and frame as it was, with one exception that is
    KVM's: a move beyond the last gfn costs two swaps and all shadow pages.
    """
    cdef int err
    slots_lock(vm)
    err = region_apply(vm, r)
    slots_unlock(vm)
    return err


cdef inline int vm_finish_delete(Vm *vm, Region *r) noexcept nogil:
    """The second half of a deletion that began with ``r.hold``; ERR_NOENT if there is none."""
    cdef int err = ERR_NOENT
    slots_lock(vm)
    if vm.held != NULL:
        held_finish(vm, r)
        err = ERR_NONE
    slots_unlock(vm)
    return err


# ---- birth and death --------------------------------------------------------------------

cdef inline bint vm_slots_init(Vm *vm) noexcept nogil:
    cdef int as_id
    for as_id in range(ADDRESS_SPACES):
        vm.slots[as_id] = slotset_empty(<uint64_t>as_id)
        vm.slot_by_id[as_id] = <Slot **>calloc(MAX_SLOT_ID, sizeof(Slot *))
        vm.last_base[as_id] = <uint64_t *>calloc(MAX_SLOT_ID, 8)
        if vm.slots[as_id] == NULL or vm.slot_by_id[as_id] == NULL or vm.last_base[as_id] == NULL:
            return False
    vm.max_pages = MIN_MMU_PAGES
    return True


cdef inline void vm_slots_free(Vm *vm) noexcept nogil:
    """At the end of the VM, or of a birth that failed half-way; later changes are refused."""
    cdef int as_id
    cdef int i
    cdef Region r
    if vm.held != NULL:
        held_finish(vm, &r)
    for as_id in range(ADDRESS_SPACES):
        if vm.slots[as_id] != NULL:
            for i in range(vm.slots[as_id].map.n):
                slot_free(vm.slots[as_id].slot[i])
        free(vm.slots[as_id])
        free(vm.slot_by_id[as_id])
        free(vm.last_base[as_id])
        vm.slots[as_id] = NULL
        vm.slot_by_id[as_id] = NULL
        vm.last_base[as_id] = NULL
    vm.n_ranges = 0
    vm.total_pages = 0


cdef inline int slot_id_free(const Vm *vm, int as_id) noexcept nogil:
    """The lowest id that names no slot, or -1.  Under slots_lock."""
    cdef int id
    for id in range(MAX_SLOT_ID):
        if vm.slot_by_id[as_id][id] == NULL:
            return id
    return -1
