# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Names for the operations of ``kvmmmu/atomics.h`` and the waiting loops of ``kvmmmu/lock.h``."""

from libc.stdint cimport uint32_t, uint64_t
from kvmmmu.engine.state cimport kvmmmu_line, kvmmmu_rwlock

cdef extern from "kvmmmu/atomics.h" nogil:
    uint64_t ld_u64 "kvmmmu_ld_u64"(const uint64_t *p)
    uint64_t ld_acquire_u64 "kvmmmu_ld_acquire_u64"(const uint64_t *p)
    void st_u64 "kvmmmu_st_u64"(uint64_t *p, uint64_t v)
    void st_release_u64 "kvmmmu_st_release_u64"(uint64_t *p, uint64_t v)
    uint64_t xchg_u64 "kvmmmu_xchg_u64"(uint64_t *p, uint64_t v)
    uint64_t fetch_add_u64 "kvmmmu_fetch_add_u64"(uint64_t *p, uint64_t v)
    uint64_t fetch_and_u64 "kvmmmu_fetch_and_u64"(uint64_t *p, uint64_t v)
    uint64_t fetch_or_u64 "kvmmmu_fetch_or_u64"(uint64_t *p, uint64_t v)
    bint cmpxchg_u64 "kvmmmu_cmpxchg_u64"(uint64_t *p, uint64_t old, uint64_t new_)
    uint32_t ld_u32 "kvmmmu_ld_u32"(const uint32_t *p)
    uint32_t ld_acquire_u32 "kvmmmu_ld_acquire_u32"(const uint32_t *p)
    void st_u32 "kvmmmu_st_u32"(uint32_t *p, uint32_t v)
    void st_release_u32 "kvmmmu_st_release_u32"(uint32_t *p, uint32_t v)
    uint32_t xchg_u32 "kvmmmu_xchg_u32"(uint32_t *p, uint32_t v)
    uint32_t fetch_or_u32 "kvmmmu_fetch_or_u32"(uint32_t *p, uint32_t v)
    uint32_t fetch_and_u32 "kvmmmu_fetch_and_u32"(uint32_t *p, uint32_t v)
    void full_barrier "kvmmmu_full_barrier"()
    bint cmpxchg_u32 "kvmmmu_cmpxchg_u32"(uint32_t *p, uint32_t old, uint32_t new_)
    # Pointers that are published: the reader sees everything written before.
    void *ld_acquire_ptr "kvmmmu_ld_acquire_ptr"(const void *p)
    void st_release_ptr "kvmmmu_st_release_ptr"(void *p, const void *v)

cdef extern from "kvmmmu/lock.h" nogil:
    void cpu_pause "kvmmmu_pause"(unsigned spins)
    void rw_write_lock "kvmmmu_write_lock"(kvmmmu_rwlock *lock, kvmmmu_line **lines, int n)
    void rw_write_unlock "kvmmmu_write_unlock"(kvmmmu_rwlock *lock)
    void drain_readers "kvmmmu_drain_readers"(kvmmmu_line **lines, int n, const kvmmmu_line *self)
