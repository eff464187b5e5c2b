/* SPDX-License-Identifier: Apache-2.0 */
/* What the loops over many addresses share with their vector kernel; plain C. */
#ifndef KVMMMU_BATCH_H
#define KVMMMU_BATCH_H

#include <stdint.h>

#include "kvmmmu/capi.h"

#define KVMMMU_PDES 512 /* a power of two: 1 GiB of a span at 4 KiB pages */

/* Bit of a tag that no address reaches once it is shifted right: the slot holds a large page. */
#define KVMMMU_PDE_LARGE (UINT64_C(1) << 62)

/* Where the lowest tables stand in host memory, by the address bits above them. */
struct kvmmmu_pdes {
    uint64_t tag[KVMMMU_PDES];   /* address >> 21 (22 in 32-bit paging); all ones: empty */
    uint64_t table[KVMMMU_PDES]; /* address of the table's first byte, rights above it in bits 2:0 */
};

/* What the entry of a lowest table must say to be granted as it is, by the rights above it. */
struct kvmmmu_accept {
    uint64_t mask[8];
    uint64_t want[8];
};

/* For the compiler: which way a loop's hot path goes; older ones are told so less firmly. */
static inline int kvmmmu_likely(int condition)
{
#if defined(__has_builtin)
#if __has_builtin(__builtin_expect_with_probability)
    return (int)__builtin_expect_with_probability(condition, 1, 0.9999);
#endif
#endif
    return (int)__builtin_expect(condition, 1);
}

static inline void kvmmmu_prefetch(uint64_t address)
{
    __builtin_prefetch((const void *)(uintptr_t)address);
}

/* Two words that are stored as one. */
typedef uint64_t kvmmmu_pair __attribute__((vector_size(16), aligned(8), may_alias));

/* Two rows of one page, whose addresses all move alike; `end` is a row's last word. */
static inline void kvmmmu_rows_two(struct kvmmmu_translation *rows, const uint64_t *gvas, uint64_t move,
                                   uint64_t entry, uint64_t end)
{
    kvmmmu_pair gva = *(const kvmmmu_pair *)gvas;
    kvmmmu_pair gpa = gva + move;
    kvmmmu_pair *out = (kvmmmu_pair *)rows;

    out[0] = (kvmmmu_pair){gva[0], gpa[0]};
    out[1] = (kvmmmu_pair){0, 0}; /* no fault */
    out[2] = (kvmmmu_pair){entry, end};
    out[3] = (kvmmmu_pair){gva[1], gpa[1]};
    out[4] = (kvmmmu_pair){0, 0};
    out[5] = (kvmmmu_pair){entry, end};
}

#endif
