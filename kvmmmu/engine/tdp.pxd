# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The TDP MMU: one tree per role shared by all vCPUs, changed by compare-exchange.

Faults hold mmu_lock for read; an entry being torn down is REMOVED and belongs to
whoever wrote that.  Pages freed here wait for readers, without a flush request.
"""

from libc.stdint cimport int32_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.mmio cimport mmio_spte_gen, mmio_spte_make
from kvmmmu.bits.spte cimport spte_child, spte_is_last, spte_make_nonleaf, spte_present
from kvmmmu.engine.atomics cimport cmpxchg_u32, cmpxchg_u64, cpu_pause, ld_u32, xchg_u32, xchg_u64
from kvmmmu.engine.counters cimport page_stats_vcpu
from kvmmmu.engine.events cimport (
    ev_get_page, ev_mark_mmio_spte, ev_prepare_zap_page, ev_set_spte, ev_spte_requested, ev_tdp_spte_changed,
)
from kvmmmu.engine.hooks cimport (
    MUTANT_NO_GRACE, MUTANT_REMOVED_TAKEN, MUTANT_SECOND_READ, POINT_REMOVED_WAIT, POINT_TDP_INSTALL,
    POINT_TDP_REMOVED, POINT_TDP_SET, hook, mutant,
)
from kvmmmu.engine.leaf cimport (
    RET_PF_EMULATE, RET_PF_FIXED, RET_PF_RETRY, RET_PF_SPURIOUS, leaf_make, vcpu_generation,
)
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock, readers_drain, vm_read_lock, vm_read_unlock
from kvmmmu.engine.memslots cimport level_pages
from kvmmmu.engine.nxpages cimport nx_disallow, nx_forget
from kvmmmu.engine.pages cimport (
    cache_alloc, cache_return, level_index, page_alloc, page_at, page_fill, page_free, page_invalidate,
    role_as_id, role_level, role_with_level,
    spte_at, spte_gfn, spte_page,
)
from kvmmmu.engine.shadow cimport adjust_huge_page, adjust_nx_level
from kvmmmu.engine.sptes cimport page_stats, spte_read, spte_write
from kvmmmu.engine.state cimport (
    ERR_NOSPC, Fault, LIST_INVALID, ShadowPage, VSTAT_PF_MMIO_SPTE_CREATED, Vcpu, Vm,
)
from kvmmmu.engine.tlb cimport flush_remote_tlbs

cdef enum:
    TDP_FAULT_PAGES = 4   # the most tables one fault can add: all levels below the root of five


# ---- one entry ------------------------------------------------------------------

cdef inline void tdp_changed(Vm *vm, uint64_t index, uint64_t old, uint64_t new_, bint shared,
                             int32_t *doomed) noexcept nogil:
    """Account for a change already made; a table that lost its link is torn down."""
    cdef int leaves = tdp_changed_by(vm, index, old, new_, shared, doomed)
    if leaves:
        page_stats(vm, role_level(page_at(vm, spte_page(index)).role), leaves)

cdef inline int tdp_changed_by(Vm *vm, uint64_t index, uint64_t old, uint64_t new_, bint shared,
                               int32_t *doomed) noexcept nogil:
    """The same, but for the caller to count: how many leaves of the entry's level there are more."""
    cdef ShadowPage *sp = page_at(vm, spte_page(index))
    cdef int level = role_level(sp.role)
    cdef bint was_leaf = spte_present(old) and spte_is_last(old, level)
    cdef bint is_leaf = spte_present(new_) and spte_is_last(new_, level)
    if old == new_:
        return 0
    ev_tdp_spte_changed(vm, -1, spte_gfn(vm, index), old, new_, level, role_as_id(sp.role))
    if spte_present(old) and not was_leaf and (not spte_present(new_) or (old ^ new_) & PT_ADDR_MASK):
        tdp_teardown(vm, spte_child(old), shared, doomed)
    return <int>is_leaf - <int>was_leaf


cdef inline uint64_t tdp_claim(Vm *vm, uint64_t *sptep) noexcept nogil:
    """REMOVED for good.  Whoever had written that before will store the empty entry yet: it is waited for.

    It waits for walkers alone, so this ends.
    """
    cdef uint64_t removed = vm.masks.removed, old = xchg_u64(sptep, removed)
    cdef unsigned spins = 0
    while old == removed and not mutant(vm, MUTANT_REMOVED_TAKEN):
        hook(vm, POINT_REMOVED_WAIT)
        cpu_pause(spins)
        spins += 1
        old = xchg_u64(sptep, removed)
    return old

cdef inline void tdp_teardown(Vm *vm, int32_t id, bint shared, int32_t *doomed) noexcept nogil:
    """Every entry becomes REMOVED, so that nobody installs into a table that goes.

    Shared mode claims empty entries too; alone, only present ones matter.
    """
    cdef ShadowPage *sp = page_at(vm, id)
    cdef uint64_t base = <uint64_t>id << 9
    cdef uint64_t *sptep
    cdef uint64_t old, removed = vm.masks.removed
    cdef int i
    ev_prepare_zap_page(vm, -1, id)
    nx_forget(vm, id)
    for i in range(ENTRIES):
        sptep = spte_at(vm, base + <uint64_t>i)
        if shared:
            old = tdp_claim(vm, sptep)
        else:
            old = spte_read(sptep)
            if not spte_present(old):
                continue
            old = xchg_u64(sptep, removed)
        tdp_changed(vm, base + <uint64_t>i, old, removed, shared, doomed)
    sp.on_list = LIST_INVALID
    sp.list_next = doomed[0]
    doomed[0] = id


cdef inline void tdp_free(Vm *vm, int32_t doomed) noexcept nogil:
    """After a grace period: no lockless walker can still hold these pages.

    No fault that holds mmu_lock for read can either: the caller holds it for write, or the pages
    were below a root made invalid by one who did.
    """
    cdef int32_t after
    if doomed == 0:
        return
    readers_drain(vm)
    while doomed:
        after = page_at(vm, doomed).list_next
        page_free(vm, doomed)
        doomed = after


cdef inline void tdp_defer(Vm *vm, int32_t doomed) noexcept nogil:
    """Torn down under mmu_lock for read, where other faults may hold the pages: the next writer frees them."""
    cdef int32_t last = doomed
    cdef uint32_t head
    if doomed == 0:
        return
    if mutant(vm, MUTANT_NO_GRACE):
        tdp_free(vm, doomed)
        return
    while page_at(vm, last).list_next:
        last = page_at(vm, last).list_next
    while True:
        head = ld_u32(&vm.arena.doomed)
        page_at(vm, last).list_next = <int32_t>head
        if cmpxchg_u32(&vm.arena.doomed, head, <uint32_t>doomed):
            return

cdef inline void tdp_reap(Vm *vm) noexcept nogil:
    """After the read side of mmu_lock was given up: free what was taken down, once nobody is in it."""
    if ld_u32(&vm.arena.doomed):
        mmu_write_lock(vm)
        tdp_free(vm, <int32_t>xchg_u32(&vm.arena.doomed, 0))
        mmu_write_unlock(vm)


cdef inline bint tdp_set(Vm *vm, uint64_t index, uint64_t old, uint64_t new_, int32_t *doomed) noexcept nogil:
    """Install by compare-exchange.  False: somebody else was first, nothing happened."""
    hook(vm, POINT_TDP_SET)
    if not cmpxchg_u64(spte_at(vm, index), old, new_):
        return False
    tdp_changed(vm, index, old, new_, True, doomed)
    return True


cdef inline bint tdp_zap_entry(Vm *vm, uint64_t index, uint64_t old, int32_t *doomed) noexcept nogil:
    """Remove one entry while others fault: REMOVED, flush, then empty for the next owner."""
    if not tdp_set(vm, index, old, vm.masks.removed, doomed):
        return False
    hook(vm, POINT_TDP_REMOVED)
    flush_remote_tlbs(vm)
    spte_write(spte_at(vm, index), vm.masks.empty)
    return True

# ---- faults ---------------------------------------------------------------------

cdef inline bint tdp_set_leaf(Vcpu *vcpu, int level, uint64_t index, uint64_t old, uint64_t new_,
                              int32_t *doomed) noexcept nogil:
    """As ``tdp_set``, counted by the vCPU: faults that count in one word wait for it longer than they take."""
    hook(vcpu.vm, POINT_TDP_SET)
    if not cmpxchg_u64(spte_at(vcpu.vm, index), old, new_):
        return False
    page_stats_vcpu(vcpu, level, tdp_changed_by(vcpu.vm, index, old, new_, True, doomed))
    return True


cdef inline int32_t tdp_page_new(Vm *vm, int32_t id, int vcpu_id, uint64_t gfn, uint32_t role) noexcept nogil:
    """Make a page just allocated one of this MMU; 0 stays 0."""
    if id:
        page_at(vm, id).gfn = gfn
        page_at(vm, id).role = role
        page_at(vm, id).tdp = 1
        if vm.masks.empty:
            page_fill(vm, id, vm.masks.empty)
        ev_get_page(vm, vcpu_id, id, True)
    return id


cdef inline int tdp_install(Vcpu *vcpu, Fault *f, uint64_t index, uint64_t old, uint64_t gfn,
                            int32_t *doomed) noexcept nogil:
    """``old`` is the entry as it was found not to be REMOVED: read again, it might be by now."""
    cdef Vm *vm = vcpu.vm
    cdef ShadowPage *sp = page_at(vm, spte_page(index))
    cdef uint64_t new_ = 0
    cdef bint refused = False
    cdef int level = role_level(sp.role), ret = RET_PF_FIXED
    hook(vm, POINT_TDP_INSTALL)
    if mutant(vm, MUTANT_SECOND_READ):
        old = spte_read(spte_at(vm, index))
    if f.slot == NULL:
        new_ = mmio_spte_make(&vm.masks, gfn, ACC_ALL, vcpu_generation(vcpu))
    else:
        refused = leaf_make(vm, vcpu.id, sp, f.slot, ACC_ALL, gfn, f.pfn, old, f.prefetch, True, f.map_writable, &new_)
    if new_ == old:
        ret = RET_PF_SPURIOUS
    elif not tdp_set_leaf(vcpu, level, index, old, new_, doomed):
        return RET_PF_RETRY
    elif spte_present(old) and not spte_is_last(old, level):
        flush_remote_tlbs(vm)
    if refused and f.write:
        ret = RET_PF_EMULATE
    if f.slot == NULL:
        vcpu.stats[<int>VSTAT_PF_MMIO_SPTE_CREATED] += 1
        ev_mark_mmio_spte(vm, vcpu.id, index, gfn, new_ & 7, mmio_spte_gen(new_))
        return RET_PF_EMULATE
    ev_set_spte(vm, vcpu.id, gfn, new_, index, level)
    return ret


cdef inline int tdp_map(Vcpu *vcpu, Fault *f) noexcept nogil:
    """Map a gpa; the caller holds mmu_lock for read."""
    cdef Vm *vm = vcpu.vm
    cdef int32_t table = vcpu.root.page
    cdef int32_t child, doomed = 0
    cdef int level = role_level(page_at(vm, table).role)
    cdef int ret
    cdef uint64_t index, spte
    adjust_huge_page(vcpu, f)
    ev_spte_requested(vm, vcpu.id, f.gfn, f.pfn, f.goal_level)
    while True:
        index = (<uint64_t>table << 9) + <uint64_t>level_index(f.addr, level)
        spte = spte_read(spte_at(vm, index))
        if vm.switches.nx_huge_pages:
            adjust_nx_level(f, spte, level)
        if spte == vm.masks.removed:
            # Whoever is taking it down owns it, at the goal level too.
            tdp_defer(vm, doomed)
            return RET_PF_RETRY
        if level == f.goal_level:
            break
        if spte_present(spte) and spte & PT_PAGE_SIZE_MASK:
            if not tdp_zap_entry(vm, index, spte, &doomed):
                tdp_defer(vm, doomed)
                return RET_PF_RETRY
            spte = vm.masks.empty
        if not spte_present(spte):
            child = tdp_page_new(vm, cache_alloc(vcpu), vcpu.id, f.gfn & ~(level_pages(level) - 1),
                                 role_with_level(page_at(vm, table).role, level - 1))
            if child == 0:
                tdp_defer(vm, doomed)
                return ERR_NOSPC
            if not tdp_set(vm, index, spte, spte_make_nonleaf(&vm.masks, <uint64_t>child, not vm.masks.ad_enabled),
                           &doomed):
                cache_return(vcpu, child)
                tdp_defer(vm, doomed)
                return RET_PF_RETRY
            if f.huge_page_disallowed and f.req_level >= level:
                nx_disallow(vm, child)
        else:
            child = spte_child(spte)
        table = child
        level -= 1
    ret = tdp_install(vcpu, f, index, spte, f.gfn & ~(level_pages(level) - 1), &doomed)
    tdp_defer(vm, doomed)
    return ret

# ---- roots ----------------------------------------------------------------------

cdef inline int32_t tdp_root_get(Vcpu *vcpu) noexcept nogil:
    """The valid root of this role, or a new one; one reference for the caller."""
    cdef Vm *vm = vcpu.vm
    cdef int32_t id = vm.tdp_roots
    while id:
        if page_at(vm, id).role == vcpu.root_role:
            page_at(vm, id).root_count += 1
            return id
        id = page_at(vm, id).list_next
    id = tdp_page_new(vm, page_alloc(vm), vcpu.id, 0, vcpu.root_role)
    if id:
        # One reference is the MMU's own, until the root is invalidated.
        page_at(vm, id).root_count = 2
        page_at(vm, id).list_next = vm.tdp_roots
        vm.tdp_roots = id
    return id

cdef inline void tdp_root_put(Vm *vm, int32_t id) noexcept nogil:
    cdef ShadowPage *sp = page_at(vm, id)
    cdef int32_t *link
    sp.root_count -= 1
    if sp.root_count:
        return
    link = &vm.tdp_roots
    while link[0] != id:
        link = &page_at(vm, link[0]).list_next
    link[0] = sp.list_next
    sp.list_next = 0
    tdp_free(vm, id)

cdef inline void tdp_invalidate_roots(Vm *vm) noexcept nogil:
    """Under mmu_lock for write: no new fault starts in these trees."""
    cdef int32_t id = vm.tdp_roots
    while id:
        page_invalidate(page_at(vm, id))
        id = page_at(vm, id).list_next

cdef inline void tdp_zap_level(Vm *vm, int32_t table, int zap_level, bint shared, int32_t *doomed) noexcept nogil:
    """Empty the entries of one level, in gfn order."""
    cdef uint64_t base = <uint64_t>table << 9
    cdef int level = role_level(page_at(vm, table).role)
    cdef int i
    cdef uint64_t old, empty = vm.masks.empty
    for i in range(ENTRIES):
        old = spte_read(spte_at(vm, base + <uint64_t>i))
        if not spte_present(old):
            continue
        if level > zap_level:
            if not spte_is_last(old, level):
                tdp_zap_level(vm, spte_child(old), zap_level, shared, doomed)
            continue
        old = xchg_u64(spte_at(vm, base + <uint64_t>i), empty)
        tdp_changed(vm, base + <uint64_t>i, old, empty, shared, doomed)

cdef inline void tdp_zap_root(Vm *vm, int32_t root, bint shared) noexcept nogil:
    """Two passes: below the 1 GiB entries first, so that no step takes too long."""
    cdef int32_t doomed = 0
    tdp_zap_level(vm, root, LEVEL_1G, shared, &doomed)
    tdp_zap_level(vm, root, role_level(page_at(vm, root).role), shared, &doomed)
    tdp_free(vm, doomed)

cdef inline int32_t tdp_next_invalid_root(Vm *vm) noexcept nogil:
    """Claim a root that ``tdp_invalidate_roots`` marked and nobody empties yet; 0: none is left."""
    cdef int32_t id = vm.tdp_roots
    while id:
        if page_at(vm, id).role & ROLE_INVALID and page_at(vm, id).on_list != LIST_INVALID:
            page_at(vm, id).on_list = LIST_INVALID
            return id
        id = page_at(vm, id).list_next
    return 0

cdef inline void tdp_zap_invalid_roots(Vm *vm) noexcept nogil:
    """Empty what was marked and give up the MMU's reference.  The caller holds slots_lock and no other.

    The list is gone through under mmu_lock, since vCPUs drop and make roots meanwhile; the MMU's
    reference keeps the root that is being emptied.
    """
    cdef int32_t id
    while True:
        mmu_write_lock(vm)
        id = tdp_next_invalid_root(vm)
        mmu_write_unlock(vm)
        if id == 0:
            return
        vm_read_lock(vm)
        tdp_zap_root(vm, id, True)
        vm_read_unlock(vm)
        mmu_write_lock(vm)
        tdp_root_put(vm, id)
        mmu_write_unlock(vm)

cdef inline void tdp_zap_everything(Vm *vm) noexcept nogil:
    """The VM goes: nobody else is here."""
    cdef int32_t id = vm.tdp_roots
    while id:
        tdp_zap_root(vm, id, False)
        id = page_at(vm, id).list_next

# ---- one table ----------------------------------------------------------------------

cdef inline bint tdp_zap_page(Vm *vm, int32_t id, int32_t *doomed) noexcept nogil:
    """Unlink one table and tear it down, under mmu_lock for write; the caller flushes.  False: nothing leads to it."""
    cdef ShadowPage *sp = page_at(vm, id)
    cdef int32_t root = vm.tdp_roots, table
    cdef uint64_t index, spte, empty = vm.masks.empty
    cdef int level
    while root:
        table = root
        level = role_level(page_at(vm, root).role)
        while True:
            index = (<uint64_t>table << 9) + <uint64_t>level_index(sp.gfn << 12, level)
            spte = spte_read(spte_at(vm, index))
            if not spte_present(spte) or spte_is_last(spte, level):
                break
            table = spte_child(spte)
            if table == id:
                if not cmpxchg_u64(spte_at(vm, index), spte, empty):
                    return False
                tdp_changed(vm, index, spte, empty, False, doomed)
                return True
            level -= 1
        root = page_at(vm, root).list_next
    return False

# ---- ranges of gfns -----------------------------------------------------------------

cdef inline int entry_first(uint64_t gfn, int level, uint64_t first) noexcept nogil:
    """The first entry of a table at ``gfn`` that maps a gfn from ``first`` on; beyond the last one if none does."""
    cdef uint64_t i
    if first <= gfn:
        return 0
    i = (first - gfn) >> (9 * (level - 1))
    return <int>i if i < ENTRIES else <int>ENTRIES

cdef inline int entry_last(uint64_t gfn, int level, uint64_t end) noexcept nogil:
    """The last entry that maps a gfn below ``end``; -1 if none does."""
    cdef uint64_t i
    if end <= gfn:
        return -1
    i = (end - 1 - gfn) >> (9 * (level - 1))
    return <int>i if i < ENTRIES else <int>ENTRIES - 1


cdef inline bint tdp_zap_range(Vm *vm, int32_t table, uint64_t first, uint64_t end, int32_t *doomed) noexcept nogil:
    """Empty the leaves of [first, end) below one table; tables stay.  Under mmu_lock for write."""
    cdef uint64_t base = <uint64_t>table << 9
    cdef int level = role_level(page_at(vm, table).role)
    cdef uint64_t gfn = page_at(vm, table).gfn, pages = level_pages(level), old, empty = vm.masks.empty
    cdef bint any = False
    cdef int i = entry_first(gfn, level, first), last = entry_last(gfn, level, end)
    gfn += <uint64_t>i * pages
    while i <= last:
        old = spte_read(spte_at(vm, base + <uint64_t>i))
        if spte_present(old):
            if spte_is_last(old, level):
                old = xchg_u64(spte_at(vm, base + <uint64_t>i), empty)
                tdp_changed(vm, base + <uint64_t>i, old, empty, False, doomed)
                any = True
            else:
                any |= tdp_zap_range(vm, spte_child(old), first, end, doomed)
        gfn += pages
        i += 1
    return any

cdef inline bint tdp_zap_gfns(Vm *vm, int as_id, uint64_t first, uint64_t end) noexcept nogil:
    """Drop the leaves of a range in every tree, invalid ones too.  True: a flush is needed."""
    cdef int32_t id = vm.tdp_roots
    cdef int32_t doomed = 0
    cdef bint any = False
    while id:
        if role_as_id(page_at(vm, id).role) == as_id:
            any |= tdp_zap_range(vm, id, first, end, &doomed)
        id = page_at(vm, id).list_next
    return any
