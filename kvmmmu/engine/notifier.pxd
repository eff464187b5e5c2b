# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""What the host's memory manager tells KVM: pages unmapped, pages replaced."""

from libc.stdint cimport uint8_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.atomics cimport guest_store, spin_lock, spin_unlock, st_release_u32, st_u8
from kvmmmu.engine.events cimport ev_age_page, ev_set_spte_hva, ev_unmap_hva_range
from kvmmmu.engine.hooks cimport MUTANT_NO_SEQ, POINT_NOTIFIER, hook, mutant
from kvmmmu.engine.hostpages cimport HOSTPAGE_ABSENT, HOSTPAGE_PRESENT, HOSTPAGE_SMALL, host_state, host_state_set
from kvmmmu.engine.leaf cimport rmap_zap_all
from kvmmmu.engine.locks cimport mmu_write_lock, mmu_write_unlock
from kvmmmu.engine.memslots cimport level_pages, slot_host_level, slot_pfn, vm_slots
from kvmmmu.engine.state cimport ADDRESS_SPACES, Slot, SlotSet, Vm
from kvmmmu.engine.tdp cimport tdp_zap_gfns
from kvmmmu.engine.tlb cimport flush_remote_tlbs


cdef inline bint slot_zap_gfns(Vm *vm, Slot *slot, uint64_t first, uint64_t end) noexcept nogil:
    """Drop every leaf that maps a gfn of [first, end).  True: a flush is needed."""
    cdef uint64_t gfn, pages
    cdef int level
    cdef bint flush = False
    if vm.rmaps:
        for level in range(LEVEL_4K, LEVEL_1G + 1):
            pages = level_pages(level)
            gfn = first & ~(pages - 1)
            if gfn < slot.base_gfn:
                gfn = slot.base_gfn
            while gfn < end:
                flush |= rmap_zap_all(vm, slot, gfn, level)
                gfn = (gfn | (pages - 1)) + 1
    if vm.tdp_roots:
        flush |= tdp_zap_gfns(vm, <int>slot.as_id, first, end)
    return flush


cdef inline bint slot_unmap(Vm *vm, Slot *slot, uint64_t first, uint64_t end, bint replaced) noexcept nogil:
    """``replaced``: new pages take their place, and Linux 3.1 says of none that it was young."""
    cdef uint64_t gfn
    cdef bint flush = False, young
    if not vm.switches.era & ERA_COUNT_OLD:
        return slot_zap_gfns(vm, slot, first, end)
    # Linux 3.1 goes page by page, and traces each as if it were looked at for ageing.
    for gfn in range(first, end):
        young = slot_zap_gfns(vm, slot, gfn, gfn + 1)
        flush |= young
        ev_age_page(vm, <uint64_t>slot.hva + ((gfn - slot.base_gfn) << 12), gfn,
                    young and not replaced)
    return flush


cdef inline void unmap_hva_range(Vm *vm, uint8_t *start, uint8_t *end, bint replaced=False) noexcept nogil:
    """The host is about to take [start, end) away: no spte may map it afterwards."""
    cdef SlotSet *slots
    cdef Slot *slot
    cdef uint8_t *low
    cdef uint8_t *high
    cdef int as_id, i
    cdef bint flush = False, any = False
    ev_unmap_hva_range(vm, <uint64_t>start, <uint64_t>end)
    for as_id in range(ADDRESS_SPACES):
        slots = vm_slots(vm, as_id)
        for i in range(slots.map.n):
            slot = slots.slot[i]
            low = start if start > slot.hva else slot.hva
            high = slot.hva + (slot.npages << 12)
            if end < high:
                high = end
            if low >= high:
                continue
            if not any:
                any = True
                mmu_write_lock(vm)
            flush |= slot_unmap(vm, slot, slot.base_gfn + (<uint64_t>(low - slot.hva) >> 12),
                                slot.base_gfn + (<uint64_t>(high - slot.hva + 4095) >> 12), replaced)
    if not any:
        return
    if not mutant(vm, MUTANT_NO_SEQ):
        st_release_u32(&vm.notifier_seq, vm.notifier_seq + 1)
    hook(vm, POINT_NOTIFIER)
    if flush:
        flush_remote_tlbs(vm)
    mmu_write_unlock(vm)


cdef inline void page_replaced(Vm *vm, uint8_t *hva) noexcept nogil:
    """The host copied a page on write: the old mapping went, the new one is announced."""
    # Linux 3.1 announces the new mapping alone, and that it dropped something nobody hears.
    unmap_hva_range(vm, hva, hva + 4096, True)
    ev_set_spte_hva(vm, <uint64_t>hva)


cdef inline void huge_page_split(Vm *vm, Slot *slot, uint64_t gfn, uint64_t first, uint64_t end) noexcept nogil:
    """Part of a huge page goes: the host maps the block by 4 KiB from now on, and tells KVM of all of it."""
    cdef uint64_t pages = level_pages(LEVEL_2M)
    cdef uint64_t pfn = slot_pfn(slot, gfn), start
    if host_state(vm, pfn) != HOSTPAGE_PRESENT or slot_host_level(slot, gfn) < LEVEL_2M:
        return
    start = gfn - (pfn & (pages - 1))
    if start >= first and start + pages <= end:
        return
    spin_lock(&vm.host_lock)
    host_state_set(vm, pfn & ~(pages - 1), pages, HOSTPAGE_PRESENT | HOSTPAGE_SMALL)
    spin_unlock(&vm.host_lock)
    unmap_hva_range(vm, slot.hva + ((start - slot.base_gfn) << 12), slot.hva + ((start + pages - slot.base_gfn) << 12))


cdef inline void invalidate_begin(Vm *vm) noexcept nogil:
    """Host pages are about to change: whoever then faults tries again (``invalidate_range_start``)."""
    mmu_write_lock(vm)
    vm.notifier_active += 1
    mmu_write_unlock(vm)

cdef inline void invalidate_end(Vm *vm) noexcept nogil:
    mmu_write_lock(vm)
    st_release_u32(&vm.notifier_seq, vm.notifier_seq + 1)
    vm.notifier_active -= 1
    mmu_write_unlock(vm)


cdef inline void slot_dontneed(Vm *vm, Slot *slot, uint64_t first, uint64_t npages) noexcept nogil:
    """madvise(MADV_DONTNEED) on pages of a slot's memory: they read as zero until touched again.  Under slots_lock.

    From the first unmapping until the pages are gone no fault maps anything (``mmu_notifier_retry``).
    """
    cdef uint8_t *hva = slot.hva + (first << 12)
    cdef uint64_t gfn = slot.base_gfn + first
    cdef uint64_t end = gfn + npages, zero = 0, i
    if npages == 0:
        return
    invalidate_begin(vm)
    st_u8(&vm.host_states_used, 1)
    unmap_hva_range(vm, hva, hva + (npages << 12))
    # Only the first and the last block can be cut.
    huge_page_split(vm, slot, gfn, gfn, end)
    huge_page_split(vm, slot, end - 1, gfn, end)
    spin_lock(&vm.host_lock)
    for i in range(npages):
        host_state_set(vm, slot_pfn(slot, gfn + i), 1, HOSTPAGE_ABSENT | HOSTPAGE_SMALL)
    for i in range(npages << 9):
        guest_store(hva + 8 * i, &zero, 8)
    spin_unlock(&vm.host_lock)
    invalidate_end(vm)


cdef inline void slot_never_touched(Vm *vm, Slot *slot, uint64_t first, uint64_t npages) noexcept nogil:
    """Declare pages of a slot's memory untouched so far; nothing maps them yet."""
    cdef uint64_t i
    st_u8(&vm.host_states_used, 1)
    spin_lock(&vm.host_lock)
    for i in range(npages):
        host_state_set(vm, slot_pfn(slot, slot.base_gfn + first + i), 1, HOSTPAGE_ABSENT)
    spin_unlock(&vm.host_lock)
