# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Who may use a vCPU: one thread at a time, and nobody once the VM is closed.

A claim exchanges the vCPU's line, then reads the VM's word; closing exchanges the VM's, then
reads the lines.  So at least one of two that meet sees the other, with or without a GIL.
"""

from libc.stdint cimport uint64_t
from kvmmmu.engine.atomics cimport (
    LINE_BUSY, LINE_GUEST, full_barrier, guest_exit, ld_acquire_u32, ld_acquire_u64, line_claim, line_release,
    st_release_u32, xchg_u32,
)
from kvmmmu.engine.state cimport Vcpu, Vm

cdef enum:
    CLAIM_OK = 0
    CLAIM_BUSY = 1
    CLAIM_CLOSED = 2


cdef inline int claim_as(Vcpu *vcpu, uint64_t flags) noexcept nogil:
    if not line_claim(vcpu.line, flags):
        return CLAIM_BUSY
    if ld_acquire_u32(&vcpu.vm.closed):
        line_release(vcpu.line)
        return CLAIM_CLOSED
    return CLAIM_OK


cdef inline int vcpu_claim(Vcpu *vcpu) noexcept nogil:
    return claim_as(vcpu, 0)


cdef inline int vcpu_claim_enter(Vcpu *vcpu) noexcept nogil:
    """A claim that is the VM entry too: one exchange says both.

    Requests are read after it, as after every entry (``roots.vcpu_enter``); without a root nothing was entered.
    """
    cdef int claim = claim_as(vcpu, LINE_GUEST)
    if claim == CLAIM_OK and vcpu.root.page == 0:
        guest_exit(vcpu.line)
    return claim


cdef inline void vcpu_release(Vcpu *vcpu) noexcept nogil:
    line_release(vcpu.line)


cdef inline bint vcpu_busy(const Vcpu *vcpu) noexcept nogil:
    return (ld_acquire_u64(&vcpu.line.mode) & LINE_BUSY) != 0


cdef inline uint64_t vm_claims(const Vm *vm) noexcept nogil:
    """Where no vCPU is busy: the same number again if none was claimed in between, for each line only grows."""
    cdef uint64_t total = 0
    cdef int i
    for i in range(vm.n_vcpus):
        total += ld_acquire_u64(&vm.vcpus[i].line.mode)
    return total


cdef inline bint vm_inside(const Vm *vm) noexcept nogil:
    """Somebody is in the engine: a call that may wait for them should not keep the interpreter."""
    cdef int i
    if ld_acquire_u32(&vm.mmu_lock.writer) or ld_acquire_u32(&vm.slots_lock):
        return True
    for i in range(vm.n_vcpus):
        if vcpu_busy(vm.vcpus[i]):
            return True
    return False


cdef inline int vm_close_begin(Vm *vm) noexcept nogil:
    """-1: no vCPU runs, and none will; else the number of one that does, and the VM stays open."""
    cdef int i
    xchg_u32(&vm.closed, 1)
    full_barrier()
    for i in range(vm.n_vcpus):
        if vcpu_busy(vm.vcpus[i]):
            st_release_u32(&vm.closed, 0)
            return i
    return -1
