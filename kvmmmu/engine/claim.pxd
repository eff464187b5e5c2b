# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Who may use a vCPU: one thread at a time, and nobody once the VM is closed.

A claim exchanges the vCPU's word, then reads the VM's; closing exchanges the VM's, then
reads the vCPUs'.  So at least one of two that meet sees the other, with or without a GIL.
"""

from kvmmmu.engine.atomics cimport ld_acquire_u32, st_release_u32, xchg_u32
from kvmmmu.engine.state cimport Vcpu, Vm

cdef enum:
    CLAIM_OK = 0
    CLAIM_BUSY = 1
    CLAIM_CLOSED = 2


cdef inline int vcpu_claim(Vcpu *vcpu) noexcept nogil:
    if xchg_u32(&vcpu.busy, 1):
        return CLAIM_BUSY
    if ld_acquire_u32(&vcpu.vm.closed):
        st_release_u32(&vcpu.busy, 0)
        return CLAIM_CLOSED
    return CLAIM_OK


cdef inline void vcpu_release(Vcpu *vcpu) noexcept nogil:
    st_release_u32(&vcpu.busy, 0)


cdef inline int vm_close_begin(Vm *vm) noexcept nogil:
    """-1: no vCPU runs, and none will; else the number of one that does, and the VM stays open."""
    cdef int i
    xchg_u32(&vm.closed, 1)
    for i in range(vm.n_vcpus):
        if ld_acquire_u32(&vm.vcpus[i].busy):
            st_release_u32(&vm.closed, 0)
            return i
    return -1
