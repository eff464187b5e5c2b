# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""mmu_lock, the vCPU's line and requests, by the names the engine uses."""

from libc.stdint cimport uint32_t, uint64_t
from kvmmmu.engine.atomics cimport (
    LINE_GUEST, LINE_READING, fetch_and_u32, fetch_or_u32, guest_exit, in_guest, ld_acquire_u32, ld_acquire_u64,
    ld_u32, readers_barrier, wait_line,
)
from kvmmmu.engine.hooks cimport (
    MUTANT_NO_DRAIN, MUTANT_NO_KICK, MUTANT_SECOND_LOOK, POINT_DRAIN_WAIT, POINT_LINE_SEEN, hook, mutant,
)
from kvmmmu.engine.state cimport REQ_KICK, Vcpu, Vm, kvmmmu_line, kvmmmu_rwlock

cdef extern from "kvmmmu/lock.h" nogil:
    void kvmmmu_read_lock(kvmmmu_rwlock *lock, kvmmmu_line *line)
    void kvmmmu_read_unlock(kvmmmu_line *line)
    void kvmmmu_write_lock(kvmmmu_rwlock *lock, kvmmmu_line **lines, const int *n)
    void kvmmmu_write_unlock(kvmmmu_rwlock *lock)
    void kvmmmu_reading_begin(kvmmmu_line *line)
    void kvmmmu_reading_end(kvmmmu_line *line)
    const bint KVMMMU_NO_LOCKS


cdef inline void mmu_write_lock(Vm *vm) noexcept nogil:
    """A vCPU has left the guest before: in it, it must not wait."""
    kvmmmu_write_lock(vm.mmu_lock, vm.lines, &vm.n_lines)

cdef inline void mmu_write_unlock(Vm *vm) noexcept nogil:
    kvmmmu_write_unlock(vm.mmu_lock)

cdef inline void mmu_read_lock(Vcpu *vcpu) noexcept nogil:
    kvmmmu_read_lock(vcpu.vm.mmu_lock, vcpu.line)

cdef inline void mmu_read_unlock(Vcpu *vcpu) noexcept nogil:
    kvmmmu_read_unlock(vcpu.line)

cdef inline void vm_read_lock(Vm *vm) noexcept nogil:
    """mmu_lock for read by whoever holds slots_lock and is no vCPU."""
    kvmmmu_read_lock(vm.mmu_lock, vm.lines[0])

cdef inline void vm_read_unlock(Vm *vm) noexcept nogil:
    kvmmmu_read_unlock(vm.lines[0])

cdef inline bint mmu_write_wanted(const Vm *vm) noexcept nogil:
    """Somebody waits for mmu_lock for write; asked by who holds it for read (``rwlock_needbreak``)."""
    return ld_u32(&vm.mmu_lock.writer) != 0

cdef inline void guest_leave(Vcpu *vcpu) noexcept nogil:
    """A VM exit, if the vCPU is in the guest."""
    if in_guest(vcpu.line):
        guest_exit(vcpu.line)


cdef inline void request(Vcpu *vcpu, uint32_t what) noexcept nogil:
    fetch_or_u32(&vcpu.requests, what)

cdef inline bint request_take(Vcpu *vcpu, uint32_t what) noexcept nogil:
    """True, and no longer pending, if ``what`` was asked for."""
    if not ld_acquire_u32(&vcpu.requests) & what:
        return False
    fetch_and_u32(&vcpu.requests, ~what)
    return True

cdef inline void request_all(Vm *vm, uint32_t what) noexcept nogil:
    cdef int i
    for i in range(<int>ld_acquire_u32(<const uint32_t *>&vm.n_vcpus)):
        request(vm.vcpus[i], what)


cdef inline void vcpu_wait(Vcpu *vcpu, uint64_t flags, int point) noexcept nogil:
    """Wait until the vCPU has left where ``flags`` say, or began anew; a batch is asked to leave the guest.

    One look says whom to ask and what to wait for: within an epoch the guest is left, never entered, so who is seen
    outside need not be asked.  Who waits does not take its request back: others may wait for the same vCPU.
    """
    cdef uint64_t seen = ld_acquire_u64(&vcpu.line.mode)
    if seen & LINE_GUEST and not mutant(vcpu.vm, MUTANT_NO_KICK):
        request(vcpu, REQ_KICK)
    hook(vcpu, POINT_LINE_SEEN)
    if mutant(vcpu.vm, MUTANT_SECOND_LOOK):
        seen = ld_acquire_u64(&vcpu.line.mode)
    wait_line(vcpu.line, seen, flags, point)

cdef inline void vcpus_wait(Vm *vm, uint64_t flags, int point) noexcept nogil:
    cdef int i
    readers_barrier(vm.lines[0])
    for i in range(<int>ld_acquire_u32(<const uint32_t *>&vm.n_vcpus)):
        vcpu_wait(vm.vcpus[i], flags, point)

cdef inline void readers_drain(Vm *vm) noexcept nogil:
    """After unlinking, before reuse: wait for walkers, the processor's and KVM's; the caller is none of them."""
    if not KVMMMU_NO_LOCKS and not mutant(vm, MUTANT_NO_DRAIN):
        vcpus_wait(vm, LINE_GUEST | LINE_READING, POINT_DRAIN_WAIT)
