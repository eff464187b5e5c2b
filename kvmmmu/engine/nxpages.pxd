# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Tables that exist only because a huge page may not be executed, oldest first (the iTLB multihit mitigation).

The list has a lock of its own, since faults of the TDP MMU hold mmu_lock for read only.
"""

from libc.stdint cimport int32_t
from kvmmmu.bits.constants cimport ALL_ONES
from kvmmmu.engine.atomics cimport cmpxchg_u32, cpu_pause, fetch_add_u64, st_release_u32
from kvmmmu.engine.pages cimport page_at
from kvmmmu.engine.state cimport STAT_NX_LPAGE_SPLITS, ShadowPage, Vm


cdef inline void nx_lock(Vm *vm) noexcept nogil:
    cdef unsigned spins = 0
    while not cmpxchg_u32(&vm.nx_lock, 0, 1):
        cpu_pause(spins)
        spins += 1

cdef inline void nx_unlock(Vm *vm) noexcept nogil:
    st_release_u32(&vm.nx_lock, 0)


cdef inline void nx_disallow(Vm *vm, int32_t id) noexcept nogil:
    """A huge page was possible where this table stands; recovery may bring it back."""
    cdef ShadowPage *sp = page_at(vm, id)
    nx_lock(vm)
    if not sp.nx_disallowed:
        sp.nx_disallowed = 1
        sp.nx_next = 0
        sp.nx_prev = vm.nx_tail
        if vm.nx_tail:
            page_at(vm, vm.nx_tail).nx_next = id
        else:
            vm.nx_head = id
        vm.nx_tail = id
        fetch_add_u64(&vm.stats[<int>STAT_NX_LPAGE_SPLITS], 1)
    nx_unlock(vm)


cdef inline void nx_forget(Vm *vm, int32_t id) noexcept nogil:
    """The table goes, or recovery has had its turn."""
    cdef ShadowPage *sp = page_at(vm, id)
    if not sp.nx_disallowed:
        return
    nx_lock(vm)
    if sp.nx_disallowed:
        sp.nx_disallowed = 0
        if sp.nx_prev:
            page_at(vm, sp.nx_prev).nx_next = sp.nx_next
        else:
            vm.nx_head = sp.nx_next
        if sp.nx_next:
            page_at(vm, sp.nx_next).nx_prev = sp.nx_prev
        else:
            vm.nx_tail = sp.nx_prev
        sp.nx_next = 0
        sp.nx_prev = 0
        fetch_add_u64(&vm.stats[<int>STAT_NX_LPAGE_SPLITS], ALL_ONES)
    nx_unlock(vm)
