# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Writing one spte: set, update, clear, drop; what each change owes the TLB.

Every function that can take a right away returns whether it needs a flush.
"""

from libc.stdint cimport int32_t, int64_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.spte cimport (
    SpteMasks, spte_accessed_mask, spte_child, spte_dirty_mask, spte_has_volatile_bits, spte_is_last,
    spte_mmu_writable, spte_present, spte_writable,
)
from kvmmmu.engine.atomics cimport fetch_add_u64, ld_acquire_u64, st_release_u64, xchg_u64
from kvmmmu.engine.counters cimport page_stats_alone
from kvmmmu.engine.lookup cimport vm_slot
from kvmmmu.engine.memslots cimport gfn_to_rmap
from kvmmmu.engine.pages cimport page_at, role_as_id, role_level, spte_at, spte_gfn, spte_page
from kvmmmu.engine.rmap cimport pte_list_add, pte_list_remove
from kvmmmu.engine.state cimport STAT_PAGES_4K, ShadowPage, Slot, Vm


cdef inline uint64_t spte_read(const uint64_t *sptep) noexcept nogil:
    # Acquire: what a link leads to was complete before it.
    return ld_acquire_u64(sptep)

cdef inline void spte_write(uint64_t *sptep, uint64_t spte) noexcept nogil:
    # Release: a child must be complete before the link to it can be seen.
    st_release_u64(sptep, spte)

cdef inline uint64_t spte_exchange(const SpteMasks *m, uint64_t *sptep, uint64_t spte) noexcept nogil:
    """Replace an spte, atomically where another agent may be setting bits; returns the old value."""
    cdef uint64_t old = spte_read(sptep)
    if spte_has_volatile_bits(m, old):
        return xchg_u64(sptep, spte)
    spte_write(sptep, spte)
    return old


cdef inline bint spte_update(Vm *vm, uint64_t *sptep, uint64_t spte) noexcept nogil:
    """Change a leaf that keeps its pfn.  True: a flush is needed.

    Losing MMU-writable, A or D needs one (Linux 6.1); losing W alone does not, because
    whoever write-protects for the dirty log flushes the slot as a whole.
    """
    cdef const SpteMasks *m = &vm.masks
    cdef uint64_t old = spte_read(sptep)
    if not spte_present(old):
        spte_write(sptep, spte)
        return False
    old = spte_exchange(m, sptep, spte)
    if spte_mmu_writable(m, old) and not spte_writable(spte):
        return True
    cdef uint64_t a = spte_accessed_mask(m, old)
    cdef uint64_t d = spte_dirty_mask(m, old)
    return (old & a and not spte & a) or (old & d and not spte & d)


cdef inline void page_stats(Vm *vm, int level, int64_t n) noexcept nogil:
    # By any thread: under the TDP MMU several count at once.
    fetch_add_u64(&vm.stats[<int>STAT_PAGES_4K + level - 1], <uint64_t>n)

cdef inline uint64_t rmap_add(Vm *vm, Slot *slot, uint64_t index, uint64_t gfn) noexcept nogil:
    """Enter a present leaf into its gfn's list; returns the entries there before."""
    cdef int level = role_level(page_at(vm, spte_page(index)).role)
    page_stats_alone(vm, level, 1)
    return pte_list_add(vm, gfn_to_rmap(slot, gfn, level), index)


cdef inline uint64_t spte_clear(Vm *vm, uint64_t index) noexcept nogil:
    """Empty an entry and its statistics; returns the old value."""
    cdef uint64_t *sptep = spte_at(vm, index)
    cdef uint64_t old = spte_exchange(&vm.masks, sptep, 0)
    if spte_present(old):
        page_stats_alone(vm, role_level(page_at(vm, spte_page(index)).role), -1)
    return old

cdef inline bint spte_drop(Vm *vm, uint64_t index) noexcept nogil:
    """Empty a leaf and take it from its rmap.  True: it was present, a flush is needed."""
    cdef ShadowPage *sp
    cdef Slot *slot
    cdef uint64_t gfn
    if not spte_present(spte_clear(vm, index)):
        return False
    sp = page_at(vm, spte_page(index))
    gfn = spte_gfn(vm, index)
    slot = vm_slot(vm, role_as_id(sp.role), gfn)
    if slot != NULL:
        pte_list_remove(vm, gfn_to_rmap(slot, gfn, role_level(sp.role)), index)
    return True


cdef inline void parent_remove(Vm *vm, int32_t child, uint64_t parent_index) noexcept nogil:
    """Unlink a child from one parent entry and empty that entry."""
    pte_list_remove(vm, &page_at(vm, child).parents, parent_index)
    spte_write(spte_at(vm, parent_index), 0)


cdef inline bint spte_zap(Vm *vm, uint64_t index) noexcept nogil:
    """Empty an entry of whatever kind.  True: it was present.

    A child only loses this parent; an mmio spte leaves no trace.
    """
    cdef uint64_t spte = spte_read(spte_at(vm, index))
    cdef int level
    if spte_present(spte):
        level = role_level(page_at(vm, spte_page(index)).role)
        if spte_is_last(spte, level):
            spte_drop(vm, index)
        else:
            parent_remove(vm, spte_child(spte), index)
        return True
    if spte:
        spte_write(spte_at(vm, index), 0)
    return False


cdef inline bint spte_write_protect(Vm *vm, uint64_t index, bint for_shadowing) noexcept nogil:
    """Take W away; for shadow paging MMU-writable too.  A and D stay.  True: flush needed."""
    cdef const SpteMasks *m = &vm.masks
    cdef uint64_t *sptep = spte_at(vm, index)
    cdef uint64_t spte = spte_read(sptep)
    if not spte_writable(spte) and not (for_shadowing and spte_mmu_writable(m, spte)):
        return False
    if for_shadowing:
        spte &= ~m.mmu_writable
    return spte_update(vm, sptep, spte & ~PT_WRITABLE_MASK)
