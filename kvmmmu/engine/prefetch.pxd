# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Filling neighbours: one guest entry, or the aligned window round a fault."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.bits.paging cimport FMT_32, Paging, rsvd_fault
from kvmmmu.bits.spte cimport spte_present
from kvmmmu.engine.guest cimport gpte_access, gpte_gfn, gpte_load, guest_host_atomic
from kvmmmu.engine.leaf cimport leaf_install
from kvmmmu.engine.lookup cimport vcpu_slot
from kvmmmu.engine.memslots cimport slot_visible
from kvmmmu.engine.pages cimport page_at, role_access, role_level, role_quadrant, spte_at, spte_gfn, spte_page
from kvmmmu.engine.pfns cimport gfn_to_pfn_atomic, pfn_is_error
from kvmmmu.engine.sptes cimport spte_drop, spte_read
from kvmmmu.engine.state cimport ShadowPage, Slot, Vcpu, Vm

cdef enum:
    PREFETCH_WINDOW = 8


cdef inline uint64_t page_gpte_gpa(const ShadowPage *sp, int entry, int fmt) noexcept nogil:
    """Where the guest entry behind a level-1 spte stands."""
    if fmt == FMT_32:
        return (sp.gfn << 12) + (<uint64_t>((role_quadrant(sp.role) << 9) + entry) << 2)
    return (sp.gfn << 12) + (<uint64_t>entry << 3)


cdef inline bint gpte_unusable(Vm *vm, const Paging *p, uint64_t index, uint64_t gpte) noexcept nogil:
    """Not present, never accessed or reserved: nothing may be cached for it, so its spte goes."""
    if gpte & PT_PRESENT_MASK and gpte & PT_ACCESSED_MASK and not rsvd_fault(p, LEVEL_4K, gpte):
        return False
    spte_drop(vm, index)
    return True

cdef inline uint32_t gpte_clean_access(const ShadowPage *sp, int fmt, uint64_t gpte) noexcept nogil:
    """Rights of a level-1 guest entry below its parents; a clean page does not get W."""
    cdef uint32_t access = role_access(sp.role) & gpte_access(fmt, gpte)
    if not gpte & PT_DIRTY_MASK:
        access &= ~<uint32_t>ACC_W
    return access


cdef inline bint prefetch_gpte(Vcpu *vcpu, uint64_t index, uint64_t gpte, bint allow_logged) noexcept nogil:
    """Install one guest entry speculatively.  False: it cannot be, stop here."""
    cdef Vm *vm = vcpu.vm
    cdef ShadowPage *sp = page_at(vm, spte_page(index))
    cdef const Paging *p = &vcpu.guest
    cdef uint32_t access
    cdef uint64_t gfn, pfn
    cdef Slot *slot
    if gpte_unusable(vm, p, index, gpte):
        return (vm.switches.era & ERA_PREFETCH_SKIPS) != 0
    gfn = gpte_gfn(p, gpte)
    access = gpte_clean_access(sp, p.format, gpte)
    slot = vcpu_slot(vcpu, gfn)
    if not slot_visible(slot):
        return False
    if slot.flags & MEM_LOG_DIRTY_PAGES and access & ACC_W and not allow_logged:
        return False
    # Only what the host could write this moment is mapped ahead of need.
    pfn = gfn_to_pfn_atomic(vm, slot, gfn)
    if pfn_is_error(pfn):
        return False
    leaf_install(vcpu, slot, index, access, gfn, pfn, NULL, True, True)
    return True


cdef inline void prefetch_window(Vcpu *vcpu, uint64_t index) noexcept nogil:
    """The aligned eight entries round a fault, from the guest's table."""
    cdef Vm *vm = vcpu.vm
    cdef ShadowPage *sp = page_at(vm, spte_page(index))
    cdef int fmt = vcpu.guest.format
    cdef int first = <int>(index & 511) & ~(PREFETCH_WINDOW - 1)
    cdef int i
    cdef uint8_t *host
    cdef uint64_t here
    if role_level(sp.role) > LEVEL_4K or vm.notifier_active:
        return
    if sp.role & ROLE_DIRECT:
        prefetch_direct(vcpu, index)
        return
    host = guest_host_atomic(vcpu, page_gpte_gpa(sp, first, fmt))
    if host == NULL:
        return
    for i in range(PREFETCH_WINDOW):
        here = (index & ~<uint64_t>511) + <uint64_t>(first + i)
        if here == index or spte_present(spte_read(spte_at(vm, here))):
            continue
        if not prefetch_gpte(vcpu, here, gpte_load(fmt, host + (i << 2 if fmt == FMT_32 else i << 3)), False):
            return


cdef inline void prefetch_direct(Vcpu *vcpu, uint64_t index) noexcept nogil:
    """The same where no guest table decides: whole runs of entries that are not present."""
    cdef Vm *vm = vcpu.vm
    cdef ShadowPage *sp = page_at(vm, spte_page(index))
    cdef uint64_t first = index & ~<uint64_t>(PREFETCH_WINDOW - 1)
    cdef uint64_t here, start = 0
    cdef int i
    # Without A bits a page mapped ahead could not be told from a used one.
    if role_level(sp.role) > LEVEL_4K or sp.role & ROLE_AD_DISABLED:
        return
    for i in range(PREFETCH_WINDOW):
        here = first + <uint64_t>i
        if here == index or spte_present(spte_read(spte_at(vm, here))):
            if start and not prefetch_run(vcpu, start, here):
                return
            start = 0
        elif not start:
            start = here
    if start and not vm.switches.era & ERA_PREFETCH_NO_TAIL:
        prefetch_run(vcpu, start, first + PREFETCH_WINDOW)


cdef inline bint prefetch_run(Vcpu *vcpu, uint64_t start, uint64_t end) noexcept nogil:
    cdef Vm *vm = vcpu.vm
    cdef uint32_t access = role_access(page_at(vm, spte_page(start)).role)
    cdef uint64_t gfn = spte_gfn(vm, start), first = gfn
    cdef Slot *slot = vcpu_slot(vcpu, gfn)
    cdef uint64_t pfn
    if not slot_visible(slot) or slot.flags & MEM_LOG_DIRTY_PAGES and access & ACC_W:
        return False
    if gfn + (end - start) > slot.base_gfn + slot.npages:
        return False
    while start < end:
        pfn = gfn_to_pfn_atomic(vm, slot, gfn)
        if pfn_is_error(pfn):
            # What leads up to the first absent page is mapped; a run that begins with one ends it all.
            return gfn != first
        leaf_install(vcpu, slot, start, access, gfn, pfn, NULL, True, True)
        gfn += 1
        start += 1
    return True
