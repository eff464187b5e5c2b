# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Flush requests: the TLB's side of every change to an spte.

A remote flush is also the handshake with lockless walkers: what was unlinked before
it may be reused after it.
"""

from kvmmmu.engine.atomics cimport fetch_add_u64
from kvmmmu.engine.locks cimport readers_drain, request, request_all
from kvmmmu.engine.state cimport (
    REQ_TLB_FLUSH, STAT_REMOTE_TLB_FLUSH, STAT_REMOTE_TLB_FLUSH_REQUESTS, VSTAT_TLB_FLUSH, Vcpu, Vm,
)


cdef inline void flush_remote_tlbs(Vm *vm) noexcept nogil:
    fetch_add_u64(&vm.stats[<int>STAT_REMOTE_TLB_FLUSH_REQUESTS], 1)
    request_all(vm, REQ_TLB_FLUSH)
    # The request makes a batch leave the guest; the caller is out of it, and walks nothing.
    readers_drain(vm)
    fetch_add_u64(&vm.stats[<int>STAT_REMOTE_TLB_FLUSH], 1)


cdef inline void flush_own_tlb(Vcpu *vcpu) noexcept nogil:
    """Linux 3.1 (``kvm_mmu_flush_tlb``): counted when it is asked for, not when it is served."""
    vcpu.stats[<int>VSTAT_TLB_FLUSH] += 1
    request(vcpu, REQ_TLB_FLUSH)
