# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""Names for the operations of ``kvmmmu/atomics.h`` and for the lines of ``kvmmmu/lock.h``."""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from kvmmmu.engine.state cimport kvmmmu_line

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
    uint32_t fetch_add_u32 "kvmmmu_fetch_add_u32"(uint32_t *p, uint32_t v)
    uint32_t fetch_or_u32 "kvmmmu_fetch_or_u32"(uint32_t *p, uint32_t v)
    uint32_t fetch_and_u32 "kvmmmu_fetch_and_u32"(uint32_t *p, uint32_t v)
    void full_barrier "kvmmmu_full_barrier"()
    bint cmpxchg_u32 "kvmmmu_cmpxchg_u32"(uint32_t *p, uint32_t old, uint32_t new_)
    uint16_t ld_u16 "kvmmmu_ld_u16"(const uint16_t *p)
    void st_u16 "kvmmmu_st_u16"(uint16_t *p, uint16_t v)
    uint8_t ld_u8 "kvmmmu_ld_u8"(const uint8_t *p)
    void st_u8 "kvmmmu_st_u8"(uint8_t *p, uint8_t v)
    # Pointers that are published: the reader sees everything written before.
    void *ld_acquire_ptr "kvmmmu_ld_acquire_ptr"(const void *p)
    void st_release_ptr "kvmmmu_st_release_ptr"(void *p, const void *v)
    # The guest's own operands.
    void guest_load "kvmmmu_guest_load"(void *to, const void *from_, unsigned size)
    void guest_store "kvmmmu_guest_store"(void *to, const void *from_, unsigned size)

cdef extern from "kvmmmu/lock.h" nogil:
    enum:
        LINE_READING "KVMMMU_LINE_READING"
        LINE_LOCKED "KVMMMU_LINE_LOCKED"
        LINE_GUEST "KVMMMU_LINE_GUEST"
        LINE_SLOTS "KVMMMU_LINE_SLOTS"
        LINE_BUSY "KVMMMU_LINE_BUSY"
        READERS_MEMBARRIER "KVMMMU_READERS_MEMBARRIER"
    const uint64_t LINE_PLAIN "KVMMMU_LINE_PLAIN"
    bint membarrier_register "kvmmmu_membarrier_register"()
    void cpu_pause "kvmmmu_pause"(unsigned spins)
    bint line_claim "kvmmmu_line_claim"(kvmmmu_line *line, uint64_t flags)
    void line_release "kvmmmu_line_release"(kvmmmu_line *line)
    void user_begin "kvmmmu_user_begin"(kvmmmu_line *line)
    void user_end "kvmmmu_user_end"(kvmmmu_line *line)
    void guest_enter "kvmmmu_guest_enter"(kvmmmu_line *line)
    void guest_exit "kvmmmu_guest_exit"(kvmmmu_line *line)
    bint in_guest "kvmmmu_in_guest"(const kvmmmu_line *line)
    int reader_protocol "kvmmmu_reader_protocol"(const kvmmmu_line *line)
    void readers_barrier "kvmmmu_readers_barrier"(const kvmmmu_line *line)
    void wait_line "kvmmmu_wait_line"(const kvmmmu_line *line, uint64_t seen, uint64_t flags, int point)


cdef inline void spin_lock(uint32_t *word) noexcept nogil:
    """A lock held for a few instructions; the word is 0 when it is free."""
    cdef unsigned spins = 0
    while ld_u32(word) or not cmpxchg_u32(word, 0, 1):
        cpu_pause(spins)
        spins += 1


cdef inline void spin_unlock(uint32_t *word) noexcept nogil:
    st_release_u32(word, 0)
