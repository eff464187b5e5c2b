/* SPDX-License-Identifier: Apache-2.0 */
/* What the loops over many addresses share with their vector kernel; plain C. */
#ifndef KVMMMU_BATCH_H
#define KVMMMU_BATCH_H

#include <stdint.h>

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

static inline void kvmmmu_prefetch(uint64_t address)
{
    __builtin_prefetch((const void *)(uintptr_t)address);
}

#endif
