# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Passes of the TDP MMU over a range of gfns for the dirty log: protect, split, collapse.

Over a whole slot they hold mmu_lock for read, as in Linux 6.1: faults go on beside them, so entries change by
compare-exchange and are looked at again where that fails; REMOVED ones are left to their owners; a waiting writer is
let in.  Over the pages of one word of the log they run under mmu_lock for write.
"""

from libc.stdint cimport int32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport spte_child, spte_is_last, spte_make_nonleaf, spte_present, spte_writable
from kvmmmu.engine.events cimport ev_split_huge_page
from kvmmmu.engine.hooks cimport MUTANT_PASS_ONCE, MUTANT_STALE_PATH, mutant
from kvmmmu.engine.locks cimport mmu_write_wanted, vm_read_lock, vm_read_unlock
from kvmmmu.engine.memslots cimport level_pages
from kvmmmu.engine.pages cimport (
    page_alloc, page_at, page_free, page_sptes, role_as_id, role_level, role_with_level, spte_at,
)
from kvmmmu.engine.pfns cimport max_mapping_level
from kvmmmu.engine.sptes cimport page_stats, spte_read, spte_write
from kvmmmu.engine.state cimport Slot, Vm
from kvmmmu.engine.tdp cimport tdp_defer, tdp_page_new, tdp_reap, tdp_set, tdp_zap_entry

cdef enum:
    PASS_PROTECT = 0
    PASS_SPLIT = 1
    PASS_COLLAPSE = 2

cdef struct TdpIter:
    # Where a pass stands: parents before children, in gfn order.
    uint64_t first        # where the walk from the root began last
    uint64_t end
    uint64_t gfn          # the first that the entry stands for
    uint64_t index        # of the entry
    uint64_t old          # the entry as it was read last
    int32_t tables[6]     # by level, from the root's down to the entry's
    int top
    int level
    int min_level         # tables of smaller entries are not entered
    bint shared           # mmu_lock is held for read
    bint started


# ---- from entry to entry -----------------------------------------------------------

cdef inline void iter_begin(Vm *vm, TdpIter *it, int32_t root, uint64_t first, uint64_t end, int min_level,
                            bint shared) noexcept nogil:
    cdef uint64_t limit
    it.top = role_level(page_at(vm, root).role)
    # What the tree is not deep enough for is not in it.
    limit = level_pages(it.top + 1)
    it.tables[it.top] = root
    it.first = first
    it.end = end if end < limit else limit
    it.min_level = min_level
    it.shared = shared
    it.started = False

cdef inline void iter_stand(Vm *vm, TdpIter *it, int level, uint64_t gfn) noexcept nogil:
    """At the entry of a level that stands for a gfn; its table is known."""
    it.level = level
    it.gfn = gfn & ~(level_pages(level) - 1)
    it.index = (<uint64_t>it.tables[level] << 9) + ((gfn >> (9 * (level - 1))) & (ENTRIES - 1))
    it.old = spte_read(spte_at(vm, it.index))

cdef inline uint64_t iter_at(const TdpIter *it) noexcept nogil:
    """The first gfn of the range that the entry stands for."""
    return it.gfn if it.gfn > it.first else it.first

cdef inline bint iter_next(Vm *vm, TdpIter *it) noexcept nogil:
    """Go to the next entry; False: there is none."""
    cdef uint64_t next_gfn
    cdef int level
    if not it.started:
        it.started = True
        if it.first >= it.end:
            return False
        iter_stand(vm, it, it.top, it.first)
        return True
    if it.level > it.min_level:
        # As it is now: the pass, or a fault, may have put a table there.
        it.old = spte_read(spte_at(vm, it.index))
        if spte_present(it.old) and not spte_is_last(it.old, it.level):
            it.tables[it.level - 1] = spte_child(it.old)
            iter_stand(vm, it, it.level - 1, iter_at(it))
            return True
    next_gfn = it.gfn + level_pages(it.level)
    if next_gfn >= it.end:
        return False
    if next_gfn & (level_pages(it.level + 1) - 1):
        it.gfn = next_gfn
        it.index += 1
        it.old = spte_read(spte_at(vm, it.index))
        return True
    level = it.level + 1
    while next_gfn & (level_pages(level + 1) - 1) == 0:
        level += 1
    iter_stand(vm, it, level, next_gfn)
    return True

cdef inline bint iter_yield(Vm *vm, TdpIter *it) noexcept nogil:
    """Let a writer in.  True: it may have freed the tables on the way, so ``iter_next`` starts from the root.

    Not before the pass has come further: a crowd of writers must not hold it up for ever.  The root stays, since
    the MMU gives up its reference under slots_lock, which the caller holds.
    """
    if not it.shared or not mmu_write_wanted(vm) or iter_at(it) == it.first:
        return False
    vm_read_unlock(vm)
    vm_read_lock(vm)
    if mutant(vm, MUTANT_STALE_PATH):
        return False
    it.first = iter_at(it)
    it.started = False
    return True

# ---- the passes ------------------------------------------------------------------------

cdef inline bint may_protect(const TdpIter *it, uint64_t first, uint64_t mask) noexcept nogil:
    if not spte_present(it.old) or not spte_is_last(it.old, it.level) or not spte_writable(it.old):
        return False
    return mask == 0 or it.level == LEVEL_4K and (mask >> (it.gfn - first)) & 1

cdef inline void tdp_protect_range(Vm *vm, int32_t root, uint64_t first, uint64_t end, uint64_t mask,
                                   bint shared) noexcept nogil:
    """Clear W, and nothing else, of leaves of [first, end); ``mask`` picks pages of a 64-page window at ``first``."""
    cdef TdpIter it
    cdef int32_t doomed = 0
    iter_begin(vm, &it, root, first, end, LEVEL_4K, shared)
    while iter_next(vm, &it):
        if iter_yield(vm, &it):
            continue
        while may_protect(&it, first, mask):
            if tdp_set(vm, it.index, it.old, it.old & ~PT_WRITABLE_MASK, &doomed) or mutant(vm, MUTANT_PASS_ONCE):
                break
            # A fault, the lockless repair, or the processor's A and D bits, came in between.
            it.old = spte_read(spte_at(vm, it.index))


cdef inline uint64_t split_leaf(const Vm *vm, uint64_t huge, int level, int i) noexcept nogil:
    """One of the 512 smaller leaves that translate as a huge one did."""
    cdef uint64_t spte = huge + (<uint64_t>i << (12 + 9 * (level - 2)))
    if level != LEVEL_2M:
        return spte
    spte &= ~PT_PAGE_SIZE_MASK
    if vm.switches.nx_huge_pages:
        # Only huge pages are made non-executable against the iTLB multihit flaw.
        spte = (spte & ~vm.masks.nx) | vm.masks.x
    return spte

cdef inline bint tdp_split_entry(Vm *vm, const TdpIter *it, int32_t child) noexcept nogil:
    """Put a table that translates the same into a huge leaf's place.  False: the leaf has changed."""
    cdef int32_t doomed = 0
    cdef int j
    tdp_page_new(vm, child, -1, it.gfn, role_with_level(page_at(vm, it.tables[it.level]).role, it.level - 1))
    for j in range(ENTRIES):
        spte_write(page_sptes(vm, child) + j, split_leaf(vm, it.old, it.level, j))
    if not tdp_set(vm, it.index, it.old, spte_make_nonleaf(&vm.masks, <uint64_t>child, not vm.masks.ad_enabled),
                   &doomed):
        return False
    page_stats(vm, it.level - 1, ENTRIES)
    ev_split_huge_page(vm, -1, it.gfn, it.old, it.level, 0)
    return True

cdef inline void tdp_split_range(Vm *vm, int32_t root, uint64_t first, uint64_t end, bint shared) noexcept nogil:
    """Replace huge leaves of [first, end) by tables that translate the same, down to 4 KiB; no flush is owed."""
    cdef TdpIter it
    cdef int32_t child = 0
    iter_begin(vm, &it, root, first, end, LEVEL_2M, shared)
    while iter_next(vm, &it):
        if iter_yield(vm, &it):
            continue
        while spte_present(it.old) and spte_is_last(it.old, it.level):
            if child == 0:
                child = page_alloc(vm)
            if child == 0:
                return
            if tdp_split_entry(vm, &it, child):
                child = 0
                break
            if mutant(vm, MUTANT_PASS_ONCE):
                break
            it.old = spte_read(spte_at(vm, it.index))
    if child:
        # Made for a leaf that a fault took first; never linked.
        page_free(vm, child)


cdef inline bint may_collapse(const Vm *vm, const TdpIter *it, const Slot *slot) noexcept nogil:
    """A table whose whole block lies in the slot, where one large leaf could stand."""
    return (spte_present(it.old) and not spte_is_last(it.old, it.level) and it.level <= LEVEL_1G
            and it.gfn >= slot.base_gfn and it.gfn < slot.base_gfn + slot.npages
            and max_mapping_level(vm, slot, it.gfn, LEVEL_1G) >= it.level)

cdef inline void tdp_collapse_range(Vm *vm, int32_t root, const Slot *slot) noexcept nogil:
    """Zap tables that could be one large page; the next fault makes it.  Under mmu_lock for read."""
    cdef TdpIter it
    cdef int32_t doomed = 0
    iter_begin(vm, &it, root, slot.base_gfn, slot.base_gfn + slot.npages, LEVEL_2M, True)
    while iter_next(vm, &it):
        if iter_yield(vm, &it):
            continue
        while may_collapse(vm, &it, slot):
            if tdp_zap_entry(vm, it.index, it.old, &doomed) or mutant(vm, MUTANT_PASS_ONCE):
                break
            it.old = spte_read(spte_at(vm, it.index))
    # Faults may be in what went.
    tdp_defer(vm, doomed)

# ---- every tree ------------------------------------------------------------------------

cdef inline void tdp_each_root(Vm *vm, const Slot *slot, int what, uint64_t first, uint64_t end, uint64_t mask,
                               bint shared) noexcept nogil:
    """Run a pass over every valid tree of the slot's address space.  Under slots_lock and mmu_lock."""
    cdef int32_t id = vm.tdp_roots
    while id:
        if role_as_id(page_at(vm, id).role) == <int>slot.as_id and not page_at(vm, id).role & ROLE_INVALID:
            if what == PASS_PROTECT:
                tdp_protect_range(vm, id, first, end, mask, shared)
            elif what == PASS_SPLIT:
                tdp_split_range(vm, id, first, end, shared)
            else:
                tdp_collapse_range(vm, id, slot)
        id = page_at(vm, id).list_next

cdef inline void tdp_slot_pass(Vm *vm, const Slot *slot, int what) noexcept nogil:
    """Over the whole slot, beside faults.  Under slots_lock alone.

    A tree that is made meanwhile has nothing to be done: its faults know the slot as it is now.
    """
    vm_read_lock(vm)
    tdp_each_root(vm, slot, what, slot.base_gfn, slot.base_gfn + slot.npages, 0, True)
    vm_read_unlock(vm)
    tdp_reap(vm)
