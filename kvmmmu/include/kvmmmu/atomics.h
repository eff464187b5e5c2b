/* SPDX-License-Identifier: Apache-2.0 */
/* The few atomic operations the engine uses, by name; GNU builtins, no C11 types,
 * so that the same words can be NumPy columns. */
#ifndef KVMMMU_ATOMICS_H
#define KVMMMU_ATOMICS_H

#include <stdint.h>
#include <string.h>

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
KVMMMU_DEFINE_ATOMICS(uint16_t, u16)
KVMMMU_DEFINE_ATOMICS(uint8_t, u8)

/* A pointer to something immutable, and its publication; p is the address of the pointer. */
static inline void *kvmmmu_ld_acquire_ptr(const void *p)
{
    return __atomic_load_n((void *const *)p, __ATOMIC_ACQUIRE);
}

static inline void kvmmmu_st_release_ptr(void *p, const void *v)
{
    __atomic_store_n((void **)p, (void *)v, __ATOMIC_RELEASE);
}

/* A value as it stands here: the compiler neither takes its sum apart nor works out several at once. */
static inline uint64_t kvmmmu_ready(uint64_t v)
{
    __asm__("" : "+r"(v));
    return v;
}

#if defined(__SANITIZE_THREAD__)
#define KVMMMU_FENCE() ((void)0) /* not modelled there; the exchanges beside it are */
#else
#define KVMMMU_FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)
#endif

/* Nothing before it, a store included, comes after anything behind it, a load included. */
static inline void kvmmmu_full_barrier(void)
{
#if defined(__x86_64__)
    /* An exchange is cheaper than mfence. */
    uint32_t word = 0;
    (void)__atomic_exchange_n(&word, 1, __ATOMIC_SEQ_CST);
#else
    KVMMMU_FENCE();
#endif
}

/*
 * Store a word that others poll, then read what they write: one exchange, which on x86 is the
 * barrier too.  Elsewhere an exchange does not keep later loads behind its store.
 */
static inline void kvmmmu_announce(uint64_t *p, uint64_t v)
{
    (void)__atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);
#if !defined(__x86_64__)
    KVMMMU_FENCE();
#endif
}

/* What a processor does with an operand: whole if it is aligned and of 1, 2, 4 or 8 bytes. */
static inline void kvmmmu_guest_load(void *to, const void *from, unsigned size)
{
    if (!((uintptr_t)from & (size - 1))) {
        uint64_t word;

        switch (size) {
        case 8:
            word = __atomic_load_n((const uint64_t *)from, __ATOMIC_RELAXED);
            memcpy(to, &word, 8);
            return;
        case 4:
            word = __atomic_load_n((const uint32_t *)from, __ATOMIC_RELAXED);
            memcpy(to, &word, 4);
            return;
        case 2:
            word = __atomic_load_n((const uint16_t *)from, __ATOMIC_RELAXED);
            memcpy(to, &word, 2);
            return;
        case 1:
            *(uint8_t *)to = __atomic_load_n((const uint8_t *)from, __ATOMIC_RELAXED);
            return;
        }
    }
    memcpy(to, from, size);
}

static inline void kvmmmu_guest_store(void *to, const void *from, unsigned size)
{
    if (!((uintptr_t)to & (size - 1))) {
        uint64_t word = 0;

        switch (size) {
        case 8:
            memcpy(&word, from, 8);
            __atomic_store_n((uint64_t *)to, word, __ATOMIC_RELAXED);
            return;
        case 4:
            memcpy(&word, from, 4);
            __atomic_store_n((uint32_t *)to, (uint32_t)word, __ATOMIC_RELAXED);
            return;
        case 2:
            memcpy(&word, from, 2);
            __atomic_store_n((uint16_t *)to, (uint16_t)word, __ATOMIC_RELAXED);
            return;
        case 1:
            __atomic_store_n((uint8_t *)to, *(const uint8_t *)from, __ATOMIC_RELAXED);
            return;
        }
    }
    memcpy(to, from, size);
}

#endif
