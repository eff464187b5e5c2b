# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""When may a replaced table be freed?  After every reader that could hold it has let go."""

from kvmmmu.engine.atomics cimport LINE_SLOTS, spin_lock, spin_unlock
from kvmmmu.engine.hooks cimport MUTANT_NO_SYNC, POINT_SYNC_WAIT, mutant
from kvmmmu.engine.locks cimport vcpus_wait
from kvmmmu.engine.state cimport Vm


cdef inline void vm_drain(Vm *vm) noexcept nogil:
    """Wait for every access and every fault that began before; the caller runs no vCPU and holds no mmu_lock."""
    if not mutant(vm, MUTANT_NO_SYNC):
        vcpus_wait(vm, LINE_SLOTS, POINT_SYNC_WAIT)


cdef inline void slots_lock(Vm *vm) noexcept nogil:
    """Taken first of all locks: slots_lock, then vcpu, then mmu_lock."""
    spin_lock(&vm.slots_lock)


cdef inline void slots_unlock(Vm *vm) noexcept nogil:
    spin_unlock(&vm.slots_lock)
