/* SPDX-License-Identifier: Apache-2.0 */
/* The few atomic operations the engine uses, by name; GNU builtins, no C11 types,
 * so that the same words can be NumPy columns. */
#ifndef KVMMMU_ATOMICS_H
#define KVMMMU_ATOMICS_H

#include <stdint.h>

#define KVMMMU_DEFINE_ATOMICS(T, name) \
    static inline T kvmmmu_ld_##name(const T *p) { return __atomic_load_n(p, __ATOMIC_RELAXED); } \
    static inline T kvmmmu_ld_acquire_##name(const T *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); } \
    static inline void kvmmmu_st_##name(T *p, T v) { __atomic_store_n(p, v, __ATOMIC_RELAXED); } \
    static inline void kvmmmu_st_release_##name(T *p, T v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); } \
    static inline T kvmmmu_xchg_##name(T *p, T v) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
    static inline T kvmmmu_fetch_add_##name(T *p, T v) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
    static inline T kvmmmu_fetch_and_##name(T *p, T v) { return __atomic_fetch_and(p, v, __ATOMIC_SEQ_CST); } \
    static inline T kvmmmu_fetch_or_##name(T *p, T v) { return __atomic_fetch_or(p, v, __ATOMIC_SEQ_CST); } \
    /* One when *p was old and is now new. */ \
    static inline int kvmmmu_cmpxchg_##name(T *p, T old, T new_) \
    { \
        return __atomic_compare_exchange_n(p, &old, new_, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED); \
    }

KVMMMU_DEFINE_ATOMICS(uint64_t, u64)
KVMMMU_DEFINE_ATOMICS(uint32_t, u32)

/* A pointer to something immutable, and its publication; p is the address of the pointer. */
static inline void *kvmmmu_ld_acquire_ptr(const void *p)
{
    return __atomic_load_n((void *const *)p, __ATOMIC_ACQUIRE);
}

static inline void kvmmmu_st_release_ptr(void *p, const void *v)
{
    __atomic_store_n((void **)p, (void *)v, __ATOMIC_RELEASE);
}

/* Full barrier as an exchange: cheaper than mfence and visible to ThreadSanitizer. */
static inline void kvmmmu_full_barrier(void)
{
    uint32_t word = 0;
    (void)__atomic_exchange_n(&word, 1, __ATOMIC_SEQ_CST);
}

#endif
