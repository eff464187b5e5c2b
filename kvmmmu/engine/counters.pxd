# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""How many leaves there are, counted where no two threads write the same cache line.

Faults of the TDP MMU run side by side; each counts in its vCPU, and who asks adds up.  Everybody else counts in the VM.
"""

from libc.stdint cimport int64_t, uint64_t
from kvmmmu.engine.atomics cimport ld_acquire_u32, ld_u64, st_u64
from kvmmmu.engine.state cimport STAT_PAGES_1G, STAT_PAGES_4K, Vcpu, Vm


cdef inline void page_stats_vcpu(Vcpu *vcpu, int level, int64_t n) noexcept nogil:
    """By the vCPU's thread, under mmu_lock for read."""
    st_u64(&vcpu.leaves[level - 1], vcpu.leaves[level - 1] + <uint64_t>n)

cdef inline void page_stats_alone(Vm *vm, int level, int64_t n) noexcept nogil:
    """By the holder of mmu_lock for write, where nobody counts without."""
    vm.stats[<int>STAT_PAGES_4K + level - 1] += <uint64_t>n


cdef inline uint64_t vm_stat(const Vm *vm, int stat) noexcept nogil:
    """A counter of the VM, STAT_*; exact when no vCPU runs."""
    cdef uint64_t total = ld_u64(&vm.stats[stat])
    cdef int i
    if stat >= STAT_PAGES_4K and stat <= STAT_PAGES_1G:
        for i in range(<int>ld_acquire_u32(<const unsigned *>&vm.n_vcpus)):
            total += ld_u64(&vm.vcpus[i].leaves[stat - <int>STAT_PAGES_4K])
    return total
