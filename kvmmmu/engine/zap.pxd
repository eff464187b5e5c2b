# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Taking shadow pages away: one, the oldest, all at once; freeing after the flush."""

from libc.stdint cimport int32_t, int64_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_child, spte_is_last, spte_present
from kvmmmu.engine.atomics cimport st_u8
from kvmmmu.engine.events cimport ev_prepare_zap_page, ev_sync_page, ev_zap_all_fast
from kvmmmu.engine.hooks cimport POINT_FLUSHED, POINT_FREED, POINT_ROOTS_REQUESTED, POINT_UNLINKED, hook
from kvmmmu.engine.locks cimport request_all
from kvmmmu.engine.pages cimport (
    gfn_first_page, hash_del, list_add_head, list_add_tail, list_del, page_at, page_free, page_invalidate,
    page_obsolete, page_sptes, page_unsync_bits, role_has_gptes, role_level, unsync_bit_clear,
)
from kvmmmu.engine.nxpages cimport nx_forget
from kvmmmu.engine.rmap cimport PteIter, pte_list_first
from kvmmmu.engine.sptes cimport parent_remove, spte_zap
from kvmmmu.engine.state cimport (
    LIST_ACTIVE, LIST_INVALID, PageList, REQ_FREE_OBSOLETE_ROOTS, STAT_MMU_RECYCLED, STAT_MMU_SHADOW_ZAPPED,
    STAT_MMU_UNSYNC, ShadowPage, Vm,
)
from kvmmmu.engine.tlb cimport flush_remote_tlbs
from kvmmmu.engine.track cimport unaccount_shadowed


cdef inline void page_unmark_unsync(Vm *vm, int vcpu_id, int32_t id) noexcept nogil:
    ev_sync_page(vm, vcpu_id, id)
    st_u8(&page_at(vm, id).unsync, 0)
    vm.stats[<int>STAT_MMU_UNSYNC] -= 1


cdef inline int unsync_next(Vm *vm, int32_t id, int start) noexcept nogil:
    """First marked entry of a parent at or after ``start``; 512 when there is none."""
    cdef uint64_t *bits = page_unsync_bits(vm, id)
    cdef int i = start
    while i < ENTRIES:
        if not bits[i >> 6] >> (i & 63):
            i = (i | 63) + 1
        elif bits[i >> 6] & (ONE << (i & 63)):
            return i
        else:
            i += 1
    return ENTRIES


cdef inline int32_t unsync_child(Vm *vm, int32_t parent, int entry) noexcept nogil:
    """The child behind a marked entry, or 0 (and the mark is dropped) if it is in order by now."""
    cdef uint64_t spte = page_sptes(vm, parent)[entry]
    cdef int32_t child
    if not spte_present(spte) or spte_is_last(spte, role_level(page_at(vm, parent).role)):
        unsync_bit_clear(vm, parent, entry)
        return 0
    child = spte_child(spte)
    if not page_at(vm, child).unsync and not page_at(vm, child).unsync_children:
        unsync_bit_clear(vm, parent, entry)
        return 0
    return child


cdef inline int64_t zap_unsync_children(Vm *vm, int vcpu_id, int32_t id, PageList *invalid) noexcept nogil:
    """An unsync page whose parent goes could not be found for the next sync: zap it too."""
    cdef int64_t n = 0
    cdef int i
    cdef int32_t child
    if role_level(page_at(vm, id).role) == LEVEL_4K:
        return 0
    i = unsync_next(vm, id, 0)
    while i < ENTRIES:
        child = unsync_child(vm, id, i)
        if child:
            if page_at(vm, child).unsync_children:
                n += zap_unsync_children(vm, vcpu_id, child, invalid)
            if page_at(vm, child).unsync:
                n += zap_prepare(vm, vcpu_id, child, invalid)
            unsync_bit_clear(vm, id, i)
        i = unsync_next(vm, id, i + 1)
    return n


cdef inline int64_t zap_prepare(Vm *vm, int vcpu_id, int32_t id, PageList *invalid) noexcept nogil:
    """Take a page out of every structure; it is freed by ``zap_commit``.

    Returns the pages taken, unsync descendants included.  A root in use only turns
    invalid: its last user frees it.
    """
    cdef ShadowPage *sp = page_at(vm, id)
    cdef int64_t n
    cdef uint64_t base = <uint64_t>id << 9
    cdef uint64_t parent
    cdef PteIter it
    cdef int i
    cdef bint was_obsolete
    ev_prepare_zap_page(vm, vcpu_id, id)
    vm.stats[<int>STAT_MMU_SHADOW_ZAPPED] += 1
    n = zap_unsync_children(vm, vcpu_id, id, invalid)
    for i in range(ENTRIES):
        spte_zap(vm, base + i)
    parent = pte_list_first(vm, sp.parents, &it)
    while parent:
        parent_remove(vm, id, parent)
        parent = pte_list_first(vm, sp.parents, &it)
    nx_forget(vm, id)
    was_obsolete = page_obsolete(vm, sp)
    if not sp.role & ROLE_INVALID and role_has_gptes(sp.role):
        unaccount_shadowed(vm, id)
    if sp.unsync:
        page_unmark_unsync(vm, vcpu_id, id)
    if sp.root_count == 0:
        n += 1
        if sp.on_list == LIST_ACTIVE:
            list_del(vm, &vm.active, id)
        list_add_tail(vm, invalid, id, LIST_INVALID)
        vm.used_pages -= 1
    else:
        # Still the root of a vCPU: out of sight, alive until that root is dropped.
        if sp.on_list == LIST_ACTIVE:
            list_del(vm, &vm.active, id)
        if vm.switches.era & ERA_ZAP_AT_ONCE:
            # Linux 3.1 only moves it to the front, where the next zapping of everything meets it again.
            list_add_head(vm, &vm.active, id, LIST_ACTIVE)
        # Before the request: who serves it looks at the role without a lock.
        page_invalidate(sp)
        if not was_obsolete:
            request_all(vm, REQ_FREE_OBSOLETE_ROOTS)
    page_invalidate(sp)
    return n


cdef inline void zap_commit(Vm *vm, PageList *invalid) noexcept nogil:
    """One flush for the whole list, then the memory may be used again."""
    cdef int32_t id
    if invalid.head == 0:
        return
    hook(vm, POINT_UNLINKED)
    flush_remote_tlbs(vm)
    hook(vm, POINT_FLUSHED)
    while invalid.head:
        id = invalid.head
        list_del(vm, invalid, id)
        # Not before: who zaps while going through a bucket still needs the link.
        hash_del(vm, id)
        page_free(vm, id)
    hook(vm, POINT_FREED)


cdef inline void list_init(PageList *lst) noexcept nogil:
    lst.head = 0
    lst.tail = 0
    lst.n = 0


cdef inline int64_t zap_oldest_any(Vm *vm, int vcpu_id, int64_t want) noexcept nogil:
    """Linux 3.1: roots in use are recycled too, though that frees nothing; returns how many were taken on."""
    cdef PageList invalid
    cdef int64_t n = 0, goal = vm.used_pages - want
    # Roots go round to the front: once round is enough where nothing else is left.
    cdef int64_t most = 2 * vm.active.n
    list_init(&invalid)
    while vm.used_pages > goal and vm.active.tail and n < most:
        zap_prepare(vm, vcpu_id, vm.active.tail, &invalid)
        n += 1
    zap_commit(vm, &invalid)
    return n


cdef inline int64_t zap_oldest(Vm *vm, int vcpu_id, int64_t want) noexcept nogil:
    """Zap non-root pages oldest first until ``want`` have gone or none is left."""
    cdef PageList invalid
    cdef int64_t n = 0
    cdef int32_t id = vm.active.tail
    cdef int32_t before
    list_init(&invalid)
    if vm.switches.era & ERA_ZAP_AT_ONCE:
        return zap_oldest_any(vm, vcpu_id, want)
    while id and n < want:
        before = page_at(vm, id).list_prev
        if page_at(vm, id).root_count == 0:
            n += zap_prepare(vm, vcpu_id, id, &invalid)
            # Descendants went with it: the neighbour may be gone too, so start again.
            if before and page_at(vm, before).on_list != LIST_ACTIVE:
                before = vm.active.tail
        id = before
    zap_commit(vm, &invalid)
    vm.stats[<int>STAT_MMU_RECYCLED] += <uint64_t>n
    return n


cdef inline bint make_pages_available(Vm *vm, int vcpu_id) noexcept nogil:
    """Keep room for one fault: at least 5 pages free, else recycle until 25 are.  False: no room."""
    cdef int64_t free = vm.max_pages - vm.used_pages if vm.max_pages > vm.used_pages else 0
    if free >= 5:
        return True
    if vm.switches.era & ERA_ZAP_AT_ONCE:
        vm.stats[<int>STAT_MMU_RECYCLED] += <uint64_t>zap_oldest(vm, vcpu_id, 25 - free)
    else:
        zap_oldest(vm, vcpu_id, 25 - free)
    return vm.max_pages > vm.used_pages


cdef inline void set_max_pages(Vm *vm, int64_t goal) noexcept nogil:
    """Change the quota; pages over it are recycled at once, and what remains is the limit."""
    if vm.used_pages > goal:
        zap_oldest(vm, -1, vm.used_pages - goal)
        goal = vm.used_pages
    vm.max_pages = goal


cdef inline int64_t unprotect_gfn(Vm *vm, int vcpu_id, uint64_t gfn) noexcept nogil:
    """Zap every page that shadows the table at ``gfn``; returns how many there were."""
    cdef PageList invalid
    cdef int64_t n = 0
    cdef int32_t id
    list_init(&invalid)
    id = gfn_first_page(vm, gfn)
    while id:
        n += 1
        zap_prepare(vm, vcpu_id, id, &invalid)
        id = gfn_first_page(vm, gfn)
    zap_commit(vm, &invalid)
    return n


cdef inline void zap_obsolete(Vm *vm, int vcpu_id) noexcept nogil:
    """Reap the pages of an older generation, oldest first."""
    cdef PageList invalid
    cdef int32_t id = vm.active.tail
    cdef int32_t before
    list_init(&invalid)
    while id:
        before = page_at(vm, id).list_prev
        if page_at(vm, id).valid_gen == vm.valid_gen:
            break
        zap_prepare(vm, vcpu_id, id, &invalid)
        if before and page_at(vm, before).on_list != LIST_ACTIVE:
            before = vm.active.tail
        id = before
    zap_commit(vm, &invalid)


cdef inline void zap_all_fast(Vm *vm) noexcept nogil:
    """Make every shadow page stale by a flip of the generation, then reap them.

    The caller holds mmu_lock for write and then zaps the invalidated TDP roots.
    """
    if vm.switches.era & ERA_ZAP_AT_ONCE:
        zap_everything(vm)
        request_all(vm, REQ_FREE_OBSOLETE_ROOTS)
        return
    ev_zap_all_fast(vm, vm.valid_gen, <uint64_t>vm.used_pages)
    st_u8(&vm.valid_gen, vm.valid_gen ^ 1)
    request_all(vm, REQ_FREE_OBSOLETE_ROOTS)
    hook(vm, POINT_ROOTS_REQUESTED)
    zap_obsolete(vm, -1)


cdef inline void zap_everything(Vm *vm) noexcept nogil:
    """The VM goes: newest first, no generation involved."""
    cdef PageList invalid
    cdef int32_t id = vm.active.head
    cdef int32_t after
    list_init(&invalid)
    while id and vm.switches.era & ERA_ZAP_AT_ONCE:
        # From the start again after every page that went: roots in use are met each time.
        after = page_at(vm, id).list_next
        if zap_prepare(vm, -1, id, &invalid):
            after = vm.active.head
        id = after
    while id:
        after = page_at(vm, id).list_next
        zap_prepare(vm, -1, id, &invalid)
        if after and page_at(vm, after).on_list != LIST_ACTIVE:
            after = vm.active.head
        id = after
    zap_commit(vm, &invalid)
