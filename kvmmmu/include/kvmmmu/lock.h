/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mmu_lock as a big-reader lock: a reader touches only its own vCPU's cache line,
 * a writer waits for every line.  The same line carries the READING mark of the
 * lockless walk, so that a freer can wait for walkers as KVM's remote flush does.
 *
 * Order of the argument: a reader exchanges its line, then reads the writer word; a
 * writer sets its word by compare-exchange, then reads the lines.  Both are
 * sequentially consistent, so at least one sees the other.
 */
#ifndef KVMMMU_LOCK_H
#define KVMMMU_LOCK_H

#include <sched.h>
#include <stdint.h>

#include "kvmmmu/atomics.h"
#include "kvmmmu/hooks.h"

enum {
    KVMMMU_LINE_OUTSIDE = 0, /* touches no shadow page */
    KVMMMU_LINE_READING = 1, /* walks sptes without mmu_lock */
    KVMMMU_LINE_LOCKED = 2,  /* holds mmu_lock for read */
};

struct kvmmmu_line {
    uint32_t mode;
    uint32_t unused[15];
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
#endif
}

static inline void kvmmmu_read_lock(struct kvmmmu_rwlock *lock, struct kvmmmu_line *line)
{
    unsigned spins = 0;

    for (;;) {
        (void)kvmmmu_xchg_u32(&line->mode, KVMMMU_LINE_LOCKED);
        if (!kvmmmu_ld_acquire_u32(&lock->writer))
            return;
        /* A waiting writer goes first, or readers could starve it. */
        kvmmmu_st_release_u32(&line->mode, KVMMMU_LINE_OUTSIDE);
        while (kvmmmu_ld_u32(&lock->writer)) {
            KVMMMU_YIELD(line, KVMMMU_POINT_LOCK_WAIT);
            kvmmmu_pause(spins++);
        }
    }
}

static inline void kvmmmu_read_unlock(struct kvmmmu_line *line)
{
    kvmmmu_st_release_u32(&line->mode, KVMMMU_LINE_OUTSIDE);
}

/* A writer's own line must be OUTSIDE: it would wait for itself. */
static inline void kvmmmu_write_lock(struct kvmmmu_rwlock *lock, struct kvmmmu_line **lines, int n)
{
    unsigned spins = 0;
    int i;

    while (!kvmmmu_cmpxchg_u32(&lock->writer, 0, 1)) {
        KVMMMU_YIELD(NULL, KVMMMU_POINT_LOCK_WAIT);
        kvmmmu_pause(spins++);
    }
    for (i = 0; i < n; i++)
        for (spins = 0; kvmmmu_ld_acquire_u32(&lines[i]->mode) == KVMMMU_LINE_LOCKED;) {
            KVMMMU_YIELD(NULL, KVMMMU_POINT_LOCK_WAIT);
            kvmmmu_pause(spins++);
        }
}

static inline void kvmmmu_write_unlock(struct kvmmmu_rwlock *lock)
{
    kvmmmu_st_release_u32(&lock->writer, 0);
}

/* The lockless walk: announce, then read; the exchange is the full barrier. */
static inline void kvmmmu_reading_begin(struct kvmmmu_line *line)
{
    if (!KVMMMU_MUTANT(line, KVMMMU_MUTANT_NO_ANNOUNCE))
        (void)kvmmmu_xchg_u32(&line->mode, KVMMMU_LINE_READING);
    KVMMMU_YIELD(line, KVMMMU_POINT_WALK_MARKED);
}

static inline void kvmmmu_reading_end(struct kvmmmu_line *line)
{
    KVMMMU_YIELD(line, KVMMMU_POINT_WALK_READ);
    kvmmmu_st_release_u32(&line->mode, KVMMMU_LINE_OUTSIDE);
    KVMMMU_YIELD(line, KVMMMU_POINT_WALK_LEFT);
}

/* Wait until no other vCPU walks sptes; called after unlinking, before reuse. */
static inline void kvmmmu_drain_readers(struct kvmmmu_line **lines, int n,
                                        const struct kvmmmu_line *self)
{
    int i;

    kvmmmu_full_barrier();
    for (i = 0; i < n; i++) {
        unsigned spins = 0;

        if (lines[i] == self || KVMMMU_MUTANT(self, KVMMMU_MUTANT_NO_DRAIN))
            continue;
        while (kvmmmu_ld_acquire_u32(&lines[i]->mode) == KVMMMU_LINE_READING) {
            KVMMMU_YIELD(self, KVMMMU_POINT_DRAIN_WAIT);
            kvmmmu_pause(spins++);
        }
    }
}

#endif
