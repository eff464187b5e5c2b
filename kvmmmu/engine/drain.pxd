# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""When may a replaced table be freed?  After every reader that could hold it has let go."""

from kvmmmu.engine.state cimport Vm, kvmmmu_line
from kvmmmu.engine.hooks cimport MUTANT_NO_SYNC, mutant
from kvmmmu.engine.atomics cimport cmpxchg_u32, cpu_pause, drain_readers, rw_write_lock, rw_write_unlock, st_release_u32


cdef inline void vm_drain(Vm *vm) noexcept nogil:
    """Wait for every walk and every fault that began before; the caller is none of them and holds no mmu_lock."""
    if mutant(vm, MUTANT_NO_SYNC):
        return
    drain_readers(vm.lines, vm.n_vcpus, NULL)
    # A fault holds mmu_lock for read while it uses a slot: becoming the writer once waits for it.
    rw_write_lock(vm.mmu_lock, vm.lines, vm.n_vcpus)
    rw_write_unlock(vm.mmu_lock)


cdef inline void slots_lock(Vm *vm) noexcept nogil:
    """Taken first of all locks: slots_lock, then vcpu, then mmu_lock."""
    cdef unsigned spins = 0
    while not cmpxchg_u32(&vm.slots_lock, 0, 1):
        cpu_pause(spins)
        spins += 1


cdef inline void slots_unlock(Vm *vm) noexcept nogil:
    st_release_u32(&vm.slots_lock, 0)
