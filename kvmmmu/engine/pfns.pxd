# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""From a gfn to a host frame: what a fault finds behind a slot."""

from libc.stdint cimport uint8_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.atomics cimport ld_u8
from kvmmmu.engine.hostpages cimport (
    HOSTPAGE_PRESENT, HOSTPAGE_STATE, HOSTPAGE_ZERO, ZERO_PFN, host_level, host_read, host_state, host_write,
)
from kvmmmu.engine.memslots cimport gfn_to_disallow, slot_pfn
from kvmmmu.engine.state cimport MMU_EPT, Slot, Vm


cdef inline bint slot_readonly(const Slot *slot) noexcept nogil:
    return (slot.flags & MEM_READONLY) != 0

cdef inline uint64_t gfn_to_pfn(Vm *vm, const Slot *slot, uint64_t gfn, bint write, uint8_t *writable) noexcept nogil:
    """The frame behind a gfn, or PFN_NOSLOT / PFN_ERR_*.  A read maps writable when the host allows it.

    May call the notifier, so the caller holds no lock.
    """
    cdef uint64_t pfn
    writable[0] = 0
    if slot == NULL:
        return PFN_NOSLOT
    if write and slot_readonly(slot):
        return PFN_ERR_RO_FAULT
    pfn = slot_pfn(slot, gfn)
    if ld_u8(&vm.host_states_used):
        if write:
            host_write(vm, slot, gfn)
        else:
            host_read(vm, slot, gfn)
            if host_state(vm, pfn) & HOSTPAGE_STATE == HOSTPAGE_ZERO:
                return ZERO_PFN
    writable[0] = not slot_readonly(slot)
    return pfn

cdef inline uint64_t gfn_to_pfn_atomic(const Vm *vm, const Slot *slot, uint64_t gfn) noexcept nogil:
    """The frame of a page that is there and writable this moment, else PFN_ERR_FAULT: what prefetch takes."""
    cdef uint64_t pfn
    if slot_readonly(slot):
        return PFN_ERR_RO_FAULT
    pfn = slot_pfn(slot, gfn)
    if host_state(vm, pfn) & HOSTPAGE_STATE != HOSTPAGE_PRESENT:
        return PFN_ERR_FAULT
    return pfn

cdef inline bint pfn_is_error(uint64_t pfn) noexcept nogil:
    return (pfn & (PFN_ERR_MASK | PFN_NOSLOT)) != 0


cdef inline int max_mapping_level(const Vm *vm, const Slot *slot, uint64_t gfn, int max_level) noexcept nogil:
    """Largest level at which the slot allows, and the host backs, one mapping of the gfn."""
    cdef int level = max_level
    cdef int host
    if level > LEVEL_1G:
        level = LEVEL_1G
    while level > LEVEL_4K and gfn_to_disallow(slot, gfn, level)[0]:
        level -= 1
    if level == LEVEL_4K:
        return level
    host = host_level(vm, slot, gfn)
    return level if level < host else host

cdef inline int host_max_level(const Vm *vm) noexcept nogil:
    """Largest leaf this host's tables may have."""
    if vm.mmu == MMU_EPT:
        return LEVEL_1G if vm.host.ept_1g else (LEVEL_2M if vm.host.ept_2m else LEVEL_4K)
    return LEVEL_1G if vm.host.gbpages else LEVEL_2M
