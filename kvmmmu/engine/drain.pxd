# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""When may a replaced table be freed?  After every reader that could hold it has let go."""

from kvmmmu.engine.hooks cimport MUTANT_NO_SYNC, POINT_SYNC_WAIT, mutant
from kvmmmu.engine.state cimport REQ_KICK, Vcpu, Vm
from kvmmmu.engine.atomics cimport (
    LINE_GUEST, LINE_SLOTS, fetch_and_u32, fetch_or_u32, ld_acquire_u32, ld_acquire_u64, readers_barrier,
    spin_lock, spin_unlock, wait_line,
)


cdef inline void vm_drain(Vm *vm) noexcept nogil:
    """Wait for every access and every fault that began before; the caller runs no vCPU and holds no mmu_lock.

    A batch that stays in the guest is asked to leave it once.
    """
    cdef Vcpu *vcpu
    cdef bint kicked
    cdef int i
    if mutant(vm, MUTANT_NO_SYNC):
        return
    readers_barrier(vm.lines[0])
    for i in range(<int>ld_acquire_u32(<const unsigned *>&vm.n_vcpus)):
        vcpu = vm.vcpus[i]
        kicked = (ld_acquire_u64(&vcpu.line.mode) & LINE_GUEST) != 0
        if kicked:
            fetch_or_u32(&vcpu.requests, REQ_KICK)
        wait_line(vcpu.line, LINE_SLOTS, POINT_SYNC_WAIT)
        if kicked:
            fetch_and_u32(&vcpu.requests, ~<unsigned>REQ_KICK)


cdef inline void slots_lock(Vm *vm) noexcept nogil:
    """Taken first of all locks: slots_lock, then vcpu, then mmu_lock."""
    spin_lock(&vm.slots_lock)


cdef inline void slots_unlock(Vm *vm) noexcept nogil:
    spin_unlock(&vm.slots_lock)
