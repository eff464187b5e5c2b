# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Whether the host has a page behind a frame: present, never touched, or the shared zero page.

Real guest memory is the user process's: a page may be absent until somebody touches it, a read of
an absent page maps the shared zero page, and the first write to that makes the host copy it, which
reaches KVM as a notifier call.  States are one byte a frame; a VM whose memory is all present (the
default) never looks at them.
"""

from libc.stdint cimport uint8_t, uint64_t
from kvmmmu.bits.constants cimport *
from kvmmmu.engine.atomics cimport ld_u8, spin_lock, spin_unlock, st_u8
from kvmmmu.engine.memslots cimport level_pages, slot_host, slot_host_level, slot_pfn
from kvmmmu.engine.state cimport HOST_STATES, Slot, Vm

cdef enum:
    HOSTPAGE_PRESENT = 0
    HOSTPAGE_ABSENT = 1
    HOSTPAGE_ZERO = 2      # the shared zero page is mapped there, read-only
    HOSTPAGE_STATE = 3
    HOSTPAGE_SMALL = 4     # the host maps it by 4 KiB although its area may have huge pages

cdef enum:
    ZERO_PFN = 0   # page 0 of the arena is never a shadow page and stays zero


cdef inline uint8_t host_state(const Vm *vm, uint64_t pfn) noexcept nogil:
    if not ld_u8(&vm.host_states_used) or pfn >= HOST_STATES:
        return HOSTPAGE_PRESENT
    return ld_u8(&vm.host_states[pfn])

cdef inline void host_state_set(Vm *vm, uint64_t pfn, uint64_t n, uint8_t state) noexcept nogil:
    """Under host_lock."""
    cdef uint64_t i
    if pfn + n <= HOST_STATES:
        for i in range(n):
            st_u8(&vm.host_states[pfn + i], state)


cdef inline bint host_block_absent(const Vm *vm, uint64_t first) noexcept nogil:
    cdef uint64_t i
    for i in range(level_pages(LEVEL_2M)):
        if ld_u8(&vm.host_states[first + i]) & HOSTPAGE_STATE != HOSTPAGE_ABSENT:
            return False
    return True

cdef inline void host_populate(Vm *vm, const Slot *slot, uint64_t gfn, uint64_t pfn) noexcept nogil:
    """First write to an absent page: a huge page where the area has them and the block is empty."""
    cdef uint64_t first = pfn & ~(level_pages(LEVEL_2M) - 1)
    if slot_host_level(slot, gfn) >= LEVEL_2M and host_block_absent(vm, first):
        host_state_set(vm, first, level_pages(LEVEL_2M), HOSTPAGE_PRESENT)
    else:
        host_state_set(vm, pfn, 1, HOSTPAGE_PRESENT | HOSTPAGE_SMALL)


cdef inline void host_read(Vm *vm, const Slot *slot, uint64_t gfn) noexcept nogil:
    """Somebody reads a page through the host's mapping."""
    cdef uint64_t pfn
    if not ld_u8(&vm.host_states_used):
        return
    pfn = slot_pfn(slot, gfn)
    if host_state(vm, pfn) & HOSTPAGE_STATE == HOSTPAGE_ABSENT:
        spin_lock(&vm.host_lock)
        if host_state(vm, pfn) & HOSTPAGE_STATE == HOSTPAGE_ABSENT:
            host_state_set(vm, pfn, 1, HOSTPAGE_ZERO | HOSTPAGE_SMALL)
        spin_unlock(&vm.host_lock)

cdef inline bint host_write(Vm *vm, const Slot *slot, uint64_t gfn) noexcept nogil:
    """Somebody writes a page through the host's mapping.  True: KVM was notified that it moved.

    The caller holds no lock: the notifier takes mmu_lock.
    """
    cdef uint64_t pfn
    cdef uint8_t state
    if not ld_u8(&vm.host_states_used):
        return False
    pfn = slot_pfn(slot, gfn)
    if host_state(vm, pfn) & HOSTPAGE_STATE == HOSTPAGE_PRESENT:
        return False
    spin_lock(&vm.host_lock)
    state = host_state(vm, pfn) & HOSTPAGE_STATE
    if state == HOSTPAGE_ABSENT:
        host_populate(vm, slot, gfn, pfn)
    elif state == HOSTPAGE_ZERO:
        host_state_set(vm, pfn, 1, HOSTPAGE_PRESENT | HOSTPAGE_SMALL)
    spin_unlock(&vm.host_lock)
    if state == HOSTPAGE_ZERO:
        vm.notify_replaced(vm, slot_host(slot, gfn))
        return True
    return False

cdef inline int host_level(const Vm *vm, const Slot *slot, uint64_t gfn) noexcept nogil:
    """The largest page the host maps a gfn with now."""
    if ld_u8(&vm.host_states_used) and host_state(vm, slot_pfn(slot, gfn)) != HOSTPAGE_PRESENT:
        return LEVEL_4K
    return slot_host_level(slot, gfn)
