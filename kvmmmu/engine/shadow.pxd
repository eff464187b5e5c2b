# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Building the tree: find or make a page, link it, map a translation into it."""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.guest_walk cimport Walk
from kvmmmu.bits.spte cimport spte_child, spte_is_last, spte_make_nonleaf, spte_present
from kvmmmu.engine.atomics cimport st_u32
from kvmmmu.engine.events cimport ev_get_page, ev_spte_requested
from kvmmmu.engine.guest cimport gpte_changed
from kvmmmu.engine.hooks cimport MUTANT_LINK_EARLY, POINT_LINK, POINT_LINKED, POINT_UNLINKED, hook, mutant
from kvmmmu.engine.leaf cimport RET_PF_RETRY, RET_PF_SPURIOUS, leaf_install
from kvmmmu.engine.locks cimport kvmmmu_reading_begin, kvmmmu_reading_end
from kvmmmu.engine.memslots cimport level_pages
from kvmmmu.engine.locks cimport request
from kvmmmu.engine.nxpages cimport nx_disallow
from kvmmmu.engine.pages cimport (
    gfn_bucket, gfn_first_page, gfn_next_page, hash_add, level_index, list_add_head, page_alloc, page_at,
    page_obsolete, page_sptes,
    role_access, role_has_gptes, role_level, role_with_access, role_with_level, role_with_quadrant, root_table,
    spte_at, spte_page,
)
from kvmmmu.engine.pfns cimport max_mapping_level, pfn_is_error
from kvmmmu.engine.prefetch cimport prefetch_window
from kvmmmu.engine.rmap cimport pte_list_add
from kvmmmu.engine.sptes cimport parent_remove, spte_drop, spte_read, spte_write
from kvmmmu.engine.state cimport (
    ERR_NOSPC, Fault, LIST_ACTIVE, PageList, REQ_MMU_SYNC, STAT_MAX_MMU_PAGE_HASH_COLLISIONS, STAT_MMU_CACHE_MISS,
    ShadowPage, Vcpu, Vm,
)
from kvmmmu.engine.sync cimport sync_children, sync_or_zap
from kvmmmu.engine.tlb cimport flush_own_tlb, flush_remote_tlbs
from kvmmmu.engine.track cimport account_shadowed, mark_spte_unsync
from kvmmmu.engine.zap cimport list_init, page_unmark_unsync, zap_commit, zap_prepare


cdef inline uint32_t child_role(Vcpu *vcpu, uint32_t parent, int parent_entry, bint direct,
                                uint32_t access) noexcept nogil:
    """A child keeps its parent's role but for level, access and kind."""
    cdef uint32_t role = role_with_access(role_with_level(parent, role_level(parent) - 1), access)
    # Linux 3.1 builds on under a root that was recycled while in use.
    role &= ~(ROLE_DIRECT | ROLE_PASSTHROUGH | ROLE_INVALID)
    # A 32-bit guest table has 1024 entries: two shadow pages, by the low bit of the parent's entry.
    if role & ROLE_4BYTE_GPTE and role_level(role) == LEVEL_4K:
        role = role_with_quadrant(role, parent_entry & 1)
    if direct:
        role |= ROLE_DIRECT
        if vcpu.vm.switches.era & ERA_ROLE_PLAIN:
            role &= ~ROLE_4BYTE_GPTE
    return role


cdef inline int32_t page_find(Vcpu *vcpu, uint64_t gfn, uint32_t role) noexcept nogil:
    """A page of exactly this role, synchronised if it was unsync; 0 if there is none."""
    cdef Vm *vm = vcpu.vm
    cdef PageList invalid
    cdef int32_t id = vm.hash[gfn_bucket(gfn)]
    cdef int32_t after, found = 0
    cdef ShadowPage *sp
    cdef uint64_t collisions = 0
    cdef int result
    if vm.switches.era & ERA_LOOKUP_SYNCS:
        return page_find_old(vcpu, gfn, role)
    list_init(&invalid)
    while id:
        sp = page_at(vm, id)
        after = sp.hash_next
        if page_obsolete(vm, sp):
            pass
        elif sp.gfn != gfn:
            collisions += 1
        elif sp.role != role:
            # The gfn now serves at another level as well: it can no longer be written freely.
            if role_level(role) > LEVEL_4K and sp.unsync:
                zap_prepare(vm, vcpu.id, id, &invalid)
        else:
            if sp.role & ROLE_DIRECT:
                found = id
                break
            if sp.unsync:
                result = sync_or_zap(vcpu, id, &invalid)
                if result < 0:
                    break
                if result > 0:
                    flush_remote_tlbs(vm)
            st_u32(&sp.flooding, 0)
            found = id
            break
        id = after
    if collisions > vm.stats[<int>STAT_MAX_MMU_PAGE_HASH_COLLISIONS]:
        vm.stats[<int>STAT_MAX_MMU_PAGE_HASH_COLLISIONS] = collisions
    zap_commit(vm, &invalid)
    return found


cdef inline int32_t page_find_old(Vcpu *vcpu, uint64_t gfn, uint32_t role) noexcept nogil:
    """Linux 3.1: a found page whose children lag is synchronised at the next entry, not now."""
    cdef Vm *vm = vcpu.vm
    cdef PageList invalid
    cdef int32_t id = vm.hash[gfn_bucket(gfn)], found = 0
    cdef ShadowPage *sp
    list_init(&invalid)
    while id:
        sp = page_at(vm, id)
        if sp.gfn == gfn and sp.role == role:
            if sp.unsync:
                if sync_or_zap(vcpu, id, &invalid) < 0:
                    break
                flush_own_tlb(vcpu)
            if sp.unsync_children:
                request(vcpu, REQ_MMU_SYNC)
            found = id
            break
        id = sp.hash_next
    zap_commit(vm, &invalid)
    return found


cdef inline void sync_gfn(Vcpu *vcpu, uint64_t gfn) noexcept nogil:
    """A table is about to be used above the last level: its unsync pages are brought in line and stay so."""
    cdef Vm *vm = vcpu.vm
    cdef PageList invalid
    cdef int32_t id = gfn_first_page(vm, gfn)
    cdef bint any = False
    list_init(&invalid)
    while id:
        if page_at(vm, id).unsync:
            page_unmark_unsync(vm, vcpu.id, id)
            any |= sync_or_zap(vcpu, id, &invalid) >= 0
        id = gfn_next_page(vm, id, gfn)
    zap_commit(vm, &invalid)
    if any:
        flush_own_tlb(vcpu)


cdef inline int32_t page_get(Vcpu *vcpu, uint64_t gfn, uint32_t role) noexcept nogil:
    """Find or make the shadow page of (gfn, role); 0 when the arena is full."""
    cdef Vm *vm = vcpu.vm
    cdef int32_t id = page_find(vcpu, gfn, role)
    cdef ShadowPage *sp
    cdef bint created = False
    if id == 0:
        vm.stats[<int>STAT_MMU_CACHE_MISS] += 1
        id = page_alloc(vm)
        if id == 0:
            return 0
        created = True
        sp = page_at(vm, id)
        sp.gfn = gfn
        sp.role = role
        sp.valid_gen = vm.valid_gen
        list_add_head(vm, &vm.active, id, LIST_ACTIVE)
        vm.used_pages += 1
        hash_add(vm, id)
        if role_has_gptes(role):
            account_shadowed(vm, id)
            if vm.switches.era & ERA_LOOKUP_SYNCS and role_level(role) > LEVEL_4K:
                sync_gfn(vcpu, gfn)
    ev_get_page(vm, vcpu.id, id, created)
    return id


cdef inline void page_link(Vcpu *vcpu, uint64_t index, int32_t child) noexcept nogil:
    """Make an entry point to a child; a huge leaf there goes first, with its flush."""
    cdef Vm *vm = vcpu.vm
    cdef uint64_t *sptep = spte_at(vm, index)
    cdef ShadowPage *sp = page_at(vm, child)
    if spte_present(spte_read(sptep)):
        spte_drop(vm, index)
        hook(vcpu, POINT_UNLINKED)
        flush_remote_tlbs(vm)
    hook(vcpu, POINT_LINK)
    if mutant(vm, MUTANT_LINK_EARLY):
        page_sptes(vm, child)[0] = ALL_ONES
        page_sptes(vm, child)[level_index(sp.gfn << 12, role_level(sp.role))] = ALL_ONES
    spte_write(sptep, spte_make_nonleaf(&vm.masks, <uint64_t>child, (sp.role & ROLE_AD_DISABLED) != 0))
    hook(vcpu, POINT_LINKED)
    pte_list_add(vm, &sp.parents, index)
    if sp.unsync or sp.unsync_children:
        mark_spte_unsync(vm, index)


cdef inline void adjust_huge_page(Vcpu *vcpu, Fault *f) noexcept nogil:
    """Choose the level of the mapping: what the guest, the slot and the host allow."""
    cdef Vm *vm = vcpu.vm
    f.req_level = LEVEL_4K
    f.goal_level = LEVEL_4K
    f.huge_page_disallowed = f.fetch and vm.switches.nx_huge_pages
    if f.max_level == LEVEL_4K or pfn_is_error(f.pfn) or f.slot.flags & MEM_LOG_DIRTY_PAGES:
        return
    f.req_level = max_mapping_level(vm, f.slot, f.gfn, f.max_level)
    if f.req_level == LEVEL_4K or f.huge_page_disallowed:
        return
    f.goal_level = f.req_level
    f.pfn &= ~(level_pages(f.goal_level) - 1)

cdef inline void adjust_nx_level(Fault *f, uint64_t spte, int level) noexcept nogil:
    """A table split for an executable page stays: do not collapse it under a data fault."""
    cdef uint64_t pages
    if level > LEVEL_4K and level == f.goal_level and spte_present(spte) and not spte_is_last(spte, level):
        # The frame of the next smaller page inside the huge one.
        pages = level_pages(level) - level_pages(level - 1)
        f.pfn |= f.gfn & pages
        f.goal_level -= 1


cdef inline void flooding_clear_path(Vcpu *vcpu, uint64_t address) noexcept nogil:
    """A fault uses these tables: they are not being torn down by the guest."""
    cdef Vm *vm = vcpu.vm
    cdef int level
    cdef int32_t table
    cdef uint64_t spte
    kvmmmu_reading_begin(vcpu.line)
    table = root_table(vm, vcpu.root.page, address, &level)
    while table:
        st_u32(&page_at(vm, table).flooding, 0)
        spte = spte_read(page_sptes(vm, table) + level_index(address, level))
        if level == LEVEL_4K or not spte_present(spte) or spte_is_last(spte, level):
            break
        table = spte_child(spte)
        level -= 1
    kvmmmu_reading_end(vcpu.line)


cdef inline int32_t step_into(Vcpu *vcpu, uint64_t index, uint64_t gfn, bint direct, uint32_t access,
                              int *error) noexcept nogil:
    """The child behind an entry: the one linked there, else a page found or made (and to be linked: negative)."""
    cdef Vm *vm = vcpu.vm
    cdef uint64_t spte = spte_read(spte_at(vm, index))
    cdef uint32_t parent = page_at(vm, spte_page(index)).role
    cdef int32_t child
    if spte_present(spte) and not spte & PT_PAGE_SIZE_MASK:
        return spte_child(spte)
    child = page_get(vcpu, gfn, child_role(vcpu, parent, <int>(index & 511), direct, access))
    if child == 0:
        error[0] = ERR_NOSPC
        return 0
    return -child


cdef inline bint drop_wrong_direct(Vcpu *vcpu, uint64_t index, uint32_t access) noexcept nogil:
    """Under a large guest page the direct child must carry that page's rights."""
    cdef Vm *vm = vcpu.vm
    cdef uint64_t spte = spte_read(spte_at(vm, index))
    cdef int32_t child
    if not spte_present(spte) or spte & PT_PAGE_SIZE_MASK:
        return False
    child = spte_child(spte)
    if role_access(page_at(vm, child).role) == access:
        return False
    parent_remove(vm, child, index)
    hook(vcpu, POINT_UNLINKED)
    flush_remote_tlbs(vm)
    return True


cdef inline int shadow_map(Vcpu *vcpu, Fault *f, const Walk *w) noexcept nogil:
    """Map a fault of a paging guest: tables that shadow the guest's, direct ones below its leaf."""
    cdef Vm *vm = vcpu.vm
    cdef int level, ret, error = 0
    cdef int32_t child
    cdef int32_t table = root_table(vm, vcpu.root.page, f.addr, &level)
    cdef uint64_t index
    # The WP=0 form of the rights belongs to the leaf alone where pages say what the guest's entry allows.
    cdef bint path = (vm.switches.era & ERA_PATH_ACCESS) != 0
    cdef uint32_t direct_access = f.access if path else w.pte_access
    cdef uint64_t base_gfn = f.gfn
    if table == 0:
        return RET_PF_RETRY
    # The guest may have changed the top entry since its root was built.
    if gpte_changed(vcpu, w, vcpu.guest.levels if vcpu.guest.levels > 3 else LEVEL_2M):
        return RET_PF_RETRY
    while level > w.level:
        index = (<uint64_t>table << 9) + <uint64_t>level_index(f.addr, level)
        st_u32(&page_at(vm, table).flooding, 0)
        child = step_into(vcpu, index, w.entry_gpas[level - 1] >> 12, False,
                          w.acc_above[w.level] if path else w.acc_above[level - 1], &error)
        if child == 0:
            return error
        if child < 0:
            child = -child
            if page_at(vm, child).unsync_children and not vm.switches.era & ERA_LOOKUP_SYNCS:
                sync_children(vcpu, child)
            if gpte_changed(vcpu, w, level - 1):
                return RET_PF_RETRY
            page_link(vcpu, index, child)
        elif gpte_changed(vcpu, w, level - 1):
            # Written since the walk, and its spte zapped: what was read then must not come back.
            return RET_PF_RETRY
        table = child
        level -= 1
    adjust_huge_page(vcpu, f)
    ev_spte_requested(vm, vcpu.id, f.gfn, f.pfn, f.goal_level)
    while True:
        index = (<uint64_t>table << 9) + <uint64_t>level_index(f.addr, level)
        st_u32(&page_at(vm, table).flooding, 0)
        if vm.switches.nx_huge_pages:
            adjust_nx_level(f, spte_read(spte_at(vm, index)), level)
        base_gfn = f.gfn & ~(level_pages(level) - 1)
        if level == f.goal_level:
            break
        drop_wrong_direct(vcpu, index, direct_access)
        child = step_into(vcpu, index, base_gfn, True, direct_access, &error)
        if child == 0:
            return error
        if child < 0:
            child = -child
            page_link(vcpu, index, child)
            if f.huge_page_disallowed and f.req_level >= level:
                nx_disallow(vm, child)
        table = child
        level -= 1
    ret = leaf_install(vcpu, f.slot, index, w.pte_access, base_gfn, f.pfn, f, f.map_writable, False)
    if ret != RET_PF_SPURIOUS or path:
        prefetch_window(vcpu, index)
    return ret


cdef inline int direct_map(Vcpu *vcpu, Fault *f) noexcept nogil:
    """Map a gpa (nonpaging guest, or the older direct MMU) through direct pages."""
    cdef Vm *vm = vcpu.vm
    cdef int level, ret, error = 0
    cdef int32_t child
    cdef int32_t table = root_table(vm, vcpu.root.page, f.addr, &level)
    cdef uint64_t index
    cdef uint64_t base_gfn
    if table == 0:
        return RET_PF_RETRY
    adjust_huge_page(vcpu, f)
    ev_spte_requested(vm, vcpu.id, f.gfn, f.pfn, f.goal_level)
    while True:
        index = (<uint64_t>table << 9) + <uint64_t>level_index(f.addr, level)
        if vm.switches.nx_huge_pages:
            adjust_nx_level(f, spte_read(spte_at(vm, index)), level)
        base_gfn = f.gfn & ~(level_pages(level) - 1)
        if level == f.goal_level:
            break
        child = step_into(vcpu, index, base_gfn, True, ACC_ALL, &error)
        if child == 0:
            return error
        if child < 0:
            child = -child
            page_link(vcpu, index, child)
            if f.huge_page_disallowed and f.req_level >= level:
                nx_disallow(vm, child)
        table = child
        level -= 1
    ret = leaf_install(vcpu, f.slot, index, ACC_ALL, base_gfn, f.pfn, f, f.map_writable, False)
    if ret != RET_PF_SPURIOUS or vm.switches.era & ERA_PATH_ACCESS:
        prefetch_window(vcpu, index)
    return ret
