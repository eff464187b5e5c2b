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
 * With membarrier(2) the reader's barrier is passed on its behalf by who takes away: kvmmmu_mark.
 * A line in GUEST or READING never waits for anything; a LOCKED one waits for those at most.
 */
#ifndef KVMMMU_LOCK_H
#define KVMMMU_LOCK_H

#include <sched.h>
#include <stddef.h>
#include <stdint.h>

#include "kvmmmu/atomics.h"
#include "kvmmmu/hooks.h"
#include "kvmmmu/membarrier.h"

/* 1: no lock, no mark, no wait.  For the control of benchmarks/bench_threads.py alone, whose threads share nothing. */
#ifndef KVMMMU_NO_LOCKS
#define KVMMMU_NO_LOCKS 0
#endif

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

/* The line's marks are plain stores, for which the others pay (kvmmmu_readers_barrier); set before the line is used. */
#define KVMMMU_LINE_PLAIN ((uint64_t)1 << 63)

struct kvmmmu_line {
    uint64_t mode;
    uint64_t unused[7];
} __attribute__((aligned(64)));

struct kvmmmu_rwlock {
    uint32_t writer;
    uint32_t first; /* somebody has waited too long: who comes now lets them go first */
    uint32_t unused[14];
} __attribute__((aligned(64)));

enum {
    KVMMMU_LONGEST_PAUSE = 9, /* 2^9 pauses: a holder can come back several times before a waiter looks again */
    KVMMMU_PATIENCE = 64,     /* looks, after which a waiter goes first: half a millisecond */
};

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

/*
 * Between two looks at mmu_lock.  Each look takes the lock's line from its holder, and each change of hands everything
 * the lock guards: so looks become rare quickly, and the holder of a moment ago goes on with what its cache holds.
 */
static inline void kvmmmu_stand_back(unsigned looks)
{
    unsigned n = 1u << (looks < KVMMMU_LONGEST_PAUSE ? looks : KVMMMU_LONGEST_PAUSE);

    while (n--)
        kvmmmu_pause(0);
    if (looks > 2 * KVMMMU_LONGEST_PAUSE)
        sched_yield();
}

/* One at a time may ask to go first; true for who does. */
static inline int kvmmmu_lock_impatient(struct kvmmmu_rwlock *lock, unsigned looks, int first)
{
    return first || (looks >= KVMMMU_PATIENCE && kvmmmu_cmpxchg_u32(&lock->first, 0, 1));
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

/*
 * A mark that whoever takes away looks for after kvmmmu_readers_barrier: GUEST and READING, which are set for every
 * fault and every lockless walk.  The word is looked at anyway, so both protocols are in it.
 */
static inline void kvmmmu_mark(struct kvmmmu_line *line, uint64_t mode)
{
    if (KVMMMU_NO_LOCKS || (int64_t)mode < 0) {
        kvmmmu_st_u64(&line->mode, mode);
        __atomic_signal_fence(__ATOMIC_SEQ_CST);
    } else {
        kvmmmu_announce(&line->mode, mode);
    }
}

/* VM entry: nothing learnt before is held any more. */
static inline void kvmmmu_guest_enter(struct kvmmmu_line *line)
{
    kvmmmu_mark(line, (kvmmmu_ld_u64(&line->mode) | KVMMMU_LINE_GUEST) + KVMMMU_LINE_EPOCH);
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
    if (KVMMMU_NO_LOCKS)
        return;
    if (!KVMMMU_MUTANT(line, KVMMMU_MUTANT_NO_ANNOUNCE))
        kvmmmu_mark(line, kvmmmu_ld_u64(&line->mode) | KVMMMU_LINE_READING);
    KVMMMU_YIELD(line, KVMMMU_POINT_WALK_MARKED);
}

static inline void kvmmmu_reading_end(struct kvmmmu_line *line)
{
    if (KVMMMU_NO_LOCKS)
        return;
    KVMMMU_YIELD(line, KVMMMU_POINT_WALK_READ);
    kvmmmu_st_release_u64(&line->mode, kvmmmu_ld_u64(&line->mode) & ~(uint64_t)KVMMMU_LINE_READING);
    KVMMMU_YIELD(line, KVMMMU_POINT_WALK_LEFT);
}

static inline void kvmmmu_read_unlock(struct kvmmmu_line *line)
{
    if (KVMMMU_NO_LOCKS)
        return;
    kvmmmu_st_release_u64(&line->mode, kvmmmu_ld_u64(&line->mode) & ~(uint64_t)KVMMMU_LINE_LOCKED);
}

static inline void kvmmmu_read_lock(struct kvmmmu_rwlock *lock, struct kvmmmu_line *line)
{
    unsigned looks = 0;
    int first = 0;

    if (KVMMMU_NO_LOCKS)
        return;
    for (;;) {
        kvmmmu_announce(&line->mode, kvmmmu_ld_u64(&line->mode) | KVMMMU_LINE_LOCKED);
        if (!kvmmmu_ld_acquire_u32(&lock->writer))
            break;
        /* A waiting writer goes first, or readers could starve it. */
        kvmmmu_read_unlock(line);
        while (kvmmmu_ld_u32(&lock->writer)) {
            KVMMMU_YIELD(line, KVMMMU_POINT_LOCK_WAIT);
            first = kvmmmu_lock_impatient(lock, looks, first);
            kvmmmu_pause(looks++);
        }
    }
    if (first)
        kvmmmu_st_u32(&lock->first, 0);
}

/* ---- the side of who takes away -------------------------------------------------------- */

/* Both waits stand apart, so that a lock that nobody holds costs no more than looking. */
static __attribute__((noinline, unused)) void kvmmmu_wait_unlocked(struct kvmmmu_line *const *lines, const int *n)
{
    int i, count = kvmmmu_line_count(n);
    unsigned spins;

    for (i = 0; i < count; i++)
        for (spins = 0; kvmmmu_ld_acquire_u64(&lines[i]->mode) & KVMMMU_LINE_LOCKED;) {
            KVMMMU_YIELD(NULL, KVMMMU_POINT_LOCK_WAIT);
            kvmmmu_pause(spins++);
        }
}

static __attribute__((noinline, unused)) void kvmmmu_write_lock_wait(struct kvmmmu_rwlock *lock,
                                                                     struct kvmmmu_line *const *lines, const int *n)
{
    unsigned looks = 0;
    int first = 0;

    do {
        KVMMMU_YIELD(NULL, KVMMMU_POINT_LOCK_WAIT);
        first = kvmmmu_lock_impatient(lock, looks, first);
        if (first)
            kvmmmu_pause(looks++);
        else
            kvmmmu_stand_back(looks++);
    } while (kvmmmu_ld_u32(&lock->writer) || (kvmmmu_ld_u32(&lock->first) && !first) ||
             !kvmmmu_cmpxchg_u32(&lock->writer, 0, 1));
    if (first)
        kvmmmu_st_u32(&lock->first, 0);
#if !defined(__x86_64__)
    KVMMMU_FENCE();
#endif
    kvmmmu_wait_unlocked(lines, n);
}

/* The caller's own line is neither GUEST, READING nor LOCKED: it would wait for itself. */
static inline void kvmmmu_write_lock(struct kvmmmu_rwlock *lock, struct kvmmmu_line *const *lines, const int *n)
{
    int i, count;

    if (KVMMMU_NO_LOCKS)
        return;
    if (kvmmmu_ld_u32(&lock->first) || !kvmmmu_cmpxchg_u32(&lock->writer, 0, 1)) {
        kvmmmu_write_lock_wait(lock, lines, n);
        return;
    }
#if !defined(__x86_64__)
    KVMMMU_FENCE();
#endif
    count = kvmmmu_line_count(n);
    for (i = 0; i < count; i++)
        if (kvmmmu_ld_acquire_u64(&lines[i]->mode) & KVMMMU_LINE_LOCKED) {
            kvmmmu_wait_unlocked(lines, n);
            return;
        }
}

static inline void kvmmmu_write_unlock(struct kvmmmu_rwlock *lock)
{
    if (KVMMMU_NO_LOCKS)
        return;
    kvmmmu_st_release_u32(&lock->writer, 0);
}

/* Wait until a line is no longer where ``flags`` say since it was seen as ``seen``: it left, or began anew. */
static inline void kvmmmu_wait_line(const struct kvmmmu_line *line, uint64_t seen, uint64_t flags, int point)
{
    uint64_t now = seen;
    unsigned spins = 0;

    (void)point;
    while ((now & flags) && ((now ^ seen) & ~(uint64_t)KVMMMU_LINE_FLAGS) == 0) {
        KVMMMU_YIELD(line, point);
        kvmmmu_pause(spins++);
        now = kvmmmu_ld_acquire_u64(&line->mode);
    }
}

/*
 * Between unlinking and looking at GUEST and READING: the full barrier of who takes away, and where the marks are plain
 * stores that of every reader too.  ``line``: any of the VM's.
 */
static inline void kvmmmu_readers_barrier(const struct kvmmmu_line *line)
{
    if (kvmmmu_ld_u64(&line->mode) & KVMMMU_LINE_PLAIN)
        kvmmmu_membarrier();
    else
        kvmmmu_full_barrier();
}

enum { KVMMMU_READERS_UNMARKED, KVMMMU_READERS_EXCHANGE, KVMMMU_READERS_MEMBARRIER };

/* Which protocol the VM of a line was made with, by this build. */
static inline int kvmmmu_reader_protocol(const struct kvmmmu_line *line)
{
    if (KVMMMU_NO_LOCKS)
        return KVMMMU_READERS_UNMARKED;
    return kvmmmu_ld_u64(&line->mode) & KVMMMU_LINE_PLAIN ? KVMMMU_READERS_MEMBARRIER : KVMMMU_READERS_EXCHANGE;
}

#endif
