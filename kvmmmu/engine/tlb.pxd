# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Flush requests: the TLB's side of every change to an spte.

A remote flush is also the handshake with lockless walkers: what was unlinked before
it may be reused after it.
"""

from kvmmmu.engine.locks cimport kvmmmu_drain_readers, request, request_all
from kvmmmu.engine.state cimport (
    REQ_TLB_FLUSH, STAT_REMOTE_TLB_FLUSH, STAT_REMOTE_TLB_FLUSH_REQUESTS, VSTAT_TLB_FLUSH, Vcpu, Vm,
)


cdef inline void flush_remote_tlbs(Vm *vm) noexcept nogil:
    vm.stats[<int>STAT_REMOTE_TLB_FLUSH_REQUESTS] += 1
    request_all(vm, REQ_TLB_FLUSH)
    # Waits for walkers of other vCPUs; the caller's own line is never READING here.
    kvmmmu_drain_readers(vm.lines, vm.n_vcpus, NULL)
    vm.stats[<int>STAT_REMOTE_TLB_FLUSH] += 1


cdef inline void flush_own_tlb(Vcpu *vcpu) noexcept nogil:
    """Linux 3.1 (``kvm_mmu_flush_tlb``): counted when it is asked for, not when it is served."""
    vcpu.stats[<int>VSTAT_TLB_FLUSH] += 1
    request(vcpu, REQ_TLB_FLUSH)
