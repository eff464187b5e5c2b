/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Every vCPU has one cache line that says what it is doing; only its owner writes it.  Those who
 * take something away wait for the lines whose owners may still hold it:
 *
 *   mmu_lock, for write     lines that are LOCKED (a big-reader lock: readers touch only their line)
 *   a flush (spte, table)   lines in GUEST (the processor walks) or READING (KVM walks without a lock)
 *   a new table of slots    lines in SLOTS, which a running vCPU always is
 *
 * A reader announces (an exchange, the full barrier), then reads.  Who takes away unlinks, passes a
 * full barrier, then reads the lines.  So either the line is seen, or the reader sees the unlinking.
 * A line in GUEST or READING never waits for anything; a LOCKED one waits for those at most.
 */
#ifndef KVMMMU_LOCK_H
#define KVMMMU_LOCK_H

#include <sched.h>
#include <stddef.h>
#include <stdint.h>

#include "kvmmmu/atomics.h"
#include "kvmmmu/hooks.h"

enum {
    KVMMMU_LINE_OUTSIDE = 0, /* no thread runs the vCPU */
    KVMMMU_LINE_GUEST = 1,   /* the processor walks tables and moves data */
    KVMMMU_LINE_READING = 2, /* KVM walks sptes without mmu_lock */
    KVMMMU_LINE_LOCKED = 4,  /* holds mmu_lock for read */
    KVMMMU_LINE_SLOTS = 8,   /* may hold slots and maps of host memory (KVM's SRCU) */
    KVMMMU_LINE_BUSY = 16,   /* a thread has claimed the vCPU */
    KVMMMU_LINE_FLAGS = 31,
    KVMMMU_LINE_EPOCH = 32, /* above the flags: counts the moments at which nothing is held */
};

struct kvmmmu_line {
    uint64_t mode;
    uint64_t unused[7];
} __attribute__((aligned(64)));

struct kvmmmu_rwlock {
    uint32_t writer;
    uint32_t unused[15];
} __attribute__((aligned(64)));

static inline void kvmmmu_pause(unsigned spins)
{
    if (spins > 64)
        sched_yield();
#if defined(__x86_64__)
    else
        __builtin_ia32_pause();
#elif defined(__aarch64__)
    else
        __asm__ volatile("yield");
#endif
}

/* How many lines there are; read after the barrier of who asks. */
static inline int kvmmmu_line_count(const int *n)
{
    return __atomic_load_n(n, __ATOMIC_ACQUIRE);
}

/* ---- the owner's side ---------------------------------------------------------------- */

/* Take a vCPU that nobody runs, and be where ``flags`` say from then on.  0: somebody runs it. */
static inline __attribute__((always_inline)) int kvmmmu_line_claim(struct kvmmmu_line *line, uint64_t flags)
{
    uint64_t mode = kvmmmu_ld_u64(&line->mode);

    flags |= KVMMMU_LINE_BUSY | KVMMMU_LINE_SLOTS;
    if ((mode & KVMMMU_LINE_FLAGS) || !kvmmmu_cmpxchg_u64(&line->mode, mode, mode | flags))
        return 0;
#if !defined(__x86_64__)
    KVMMMU_FENCE();
#endif
    return 1;
}

static inline __attribute__((always_inline)) void kvmmmu_line_release(struct kvmmmu_line *line)
{
    kvmmmu_st_release_u64(&line->mode, (kvmmmu_ld_u64(&line->mode) & ~(uint64_t)KVMMMU_LINE_FLAGS) + KVMMMU_LINE_EPOCH);
}

/* A claimed vCPU leaves to user space, which may change slots, and comes back. */
static inline void kvmmmu_user_begin(struct kvmmmu_line *line)
{
    kvmmmu_st_release_u64(&line->mode, (kvmmmu_ld_u64(&line->mode) & ~(uint64_t)KVMMMU_LINE_FLAGS) | KVMMMU_LINE_BUSY);
}

static inline void kvmmmu_user_end(struct kvmmmu_line *line)
{
    kvmmmu_announce(&line->mode, (kvmmmu_ld_u64(&line->mode) | KVMMMU_LINE_SLOTS) + KVMMMU_LINE_EPOCH);
}

/* VM entry: nothing learnt before is held any more. */
static inline void kvmmmu_guest_enter(struct kvmmmu_line *line)
{
    kvmmmu_announce(&line->mode, (kvmmmu_ld_u64(&line->mode) | KVMMMU_LINE_GUEST) + KVMMMU_LINE_EPOCH);
}

static inline int kvmmmu_in_guest(const struct kvmmmu_line *line)
{
    return (kvmmmu_ld_u64(&line->mode) & KVMMMU_LINE_GUEST) != 0;
}

/* VM exit; SLOTS stands without a gap, so no barrier is needed. */
static inline void kvmmmu_guest_exit(struct kvmmmu_line *line)
{
    kvmmmu_st_release_u64(&line->mode, kvmmmu_ld_u64(&line->mode) & ~(uint64_t)KVMMMU_LINE_GUEST);
}

static inline void kvmmmu_reading_begin(struct kvmmmu_line *line)
{
    if (!KVMMMU_MUTANT(line, KVMMMU_MUTANT_NO_ANNOUNCE))
        kvmmmu_announce(&line->mode, kvmmmu_ld_u64(&line->mode) | KVMMMU_LINE_READING);
    KVMMMU_YIELD(line, KVMMMU_POINT_WALK_MARKED);
}

static inline void kvmmmu_reading_end(struct kvmmmu_line *line)
{
    KVMMMU_YIELD(line, KVMMMU_POINT_WALK_READ);
    kvmmmu_st_release_u64(&line->mode, kvmmmu_ld_u64(&line->mode) & ~(uint64_t)KVMMMU_LINE_READING);
    KVMMMU_YIELD(line, KVMMMU_POINT_WALK_LEFT);
}

static inline void kvmmmu_read_unlock(struct kvmmmu_line *line)
{
    kvmmmu_st_release_u64(&line->mode, kvmmmu_ld_u64(&line->mode) & ~(uint64_t)KVMMMU_LINE_LOCKED);
}

static inline void kvmmmu_read_lock(struct kvmmmu_rwlock *lock, struct kvmmmu_line *line)
{
    unsigned spins = 0;

    for (;;) {
        kvmmmu_announce(&line->mode, kvmmmu_ld_u64(&line->mode) | KVMMMU_LINE_LOCKED);
        if (!kvmmmu_ld_acquire_u32(&lock->writer))
            return;
        /* A waiting writer goes first, or readers could starve it. */
        kvmmmu_read_unlock(line);
        while (kvmmmu_ld_u32(&lock->writer)) {
            KVMMMU_YIELD(line, KVMMMU_POINT_LOCK_WAIT);
            kvmmmu_pause(spins++);
        }
    }
}

/* ---- the side of who takes away -------------------------------------------------------- */

/* The caller's own line is neither GUEST, READING nor LOCKED: it would wait for itself. */
static inline void kvmmmu_write_lock(struct kvmmmu_rwlock *lock, struct kvmmmu_line *const *lines, const int *n)
{
    unsigned spins = 0;
    int i, count;

    while (kvmmmu_ld_u32(&lock->writer) || !kvmmmu_cmpxchg_u32(&lock->writer, 0, 1)) {
        KVMMMU_YIELD(NULL, KVMMMU_POINT_LOCK_WAIT);
        kvmmmu_pause(spins++);
    }
#if !defined(__x86_64__)
    KVMMMU_FENCE();
#endif
    count = kvmmmu_line_count(n);
    for (i = 0; i < count; i++)
        for (spins = 0; kvmmmu_ld_acquire_u64(&lines[i]->mode) & KVMMMU_LINE_LOCKED;) {
            KVMMMU_YIELD(NULL, KVMMMU_POINT_LOCK_WAIT);
            kvmmmu_pause(spins++);
        }
}

static inline void kvmmmu_write_unlock(struct kvmmmu_rwlock *lock)
{
    kvmmmu_st_release_u32(&lock->writer, 0);
}

/* Wait until no line is where ``flags`` say since before the call: it left, or began anew. */
static inline void kvmmmu_wait_line(const struct kvmmmu_line *line, uint64_t flags, int point)
{
    uint64_t before = kvmmmu_ld_acquire_u64(&line->mode), now = before;
    unsigned spins = 0;

    (void)point;
    while ((now & flags) && ((now ^ before) & ~(uint64_t)KVMMMU_LINE_FLAGS) == 0) {
        KVMMMU_YIELD(line, point);
        kvmmmu_pause(spins++);
        now = kvmmmu_ld_acquire_u64(&line->mode);
    }
}

/* Called after unlinking, before reuse; requests that make a vCPU leave the guest were raised before. */
static inline void kvmmmu_drain_readers(struct kvmmmu_line *const *lines, const int *n)
{
    int i, count;

    kvmmmu_full_barrier();
    count = kvmmmu_line_count(n);
    for (i = 0; i < count && !KVMMMU_MUTANT(NULL, KVMMMU_MUTANT_NO_DRAIN); i++)
        kvmmmu_wait_line(lines[i], KVMMMU_LINE_GUEST | KVMMMU_LINE_READING, KVMMMU_POINT_DRAIN_WAIT);
}

#endif
