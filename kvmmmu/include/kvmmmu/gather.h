/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Eight rows at once with AVX-512: look up eight lowest tables, fetch eight leaves a few groups later,
 * compare, write eight rows.  For entries of 8 bytes with the rights of long mode and PAE.
 *
 * Whatever is not plainly granted is handed back as a set of lanes.  Nothing here is needed for a right
 * answer: the portable loop gives the same rows.  Functions are compiled for AVX-512 by attribute, and
 * called only where the processor has it (kvmmmu_gather_here).
 */
#ifndef KVMMMU_GATHER_H
#define KVMMMU_GATHER_H

#include <stdint.h>

#include "kvmmmu/batch.h"
#include "kvmmmu/capi.h"

#define KVMMMU_LANES 8
#define KVMMMU_GROUPS 4 /* in flight: a power of two */

struct kvmmmu_gather {
    const struct kvmmmu_pdes *pdes;
    const struct kvmmmu_accept *accept;
    const uint64_t *gvas;
    struct kvmmmu_translation *out;
    uint64_t va_mask, addr_mask;
    int64_t next, end;                           /* rows still to be looked up */
    uint64_t issued, finished;                   /* groups */
    int64_t row[KVMMMU_GROUPS];                  /* first row of each group in flight */
    uint64_t place[KVMMMU_GROUPS][KVMMMU_LANES]; /* of its leaves, rights above in bits 2:0 */
};

/* Why kvmmmu_gather_run came back; lanes stand in bits 7:0. */
#define KVMMMU_GATHER_DONE 0        /* nothing in flight, fewer than eight rows left */
#define KVMMMU_GATHER_UNKNOWN 0x100 /* lanes of the group at `next` whose table is not known: fill in, then issue it */
#define KVMMMU_GATHER_ODD 0x200     /* lanes of the group just finished whose rows are to be done again */
#define KVMMMU_GATHER_SAME 0x400    /* the group at `next` lies in one page */

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define KVMMMU_AVX512 __attribute__((target("avx512f")))

static inline int kvmmmu_gather_here(void)
{
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f");
}

/* For comparing two short stretches of work in one process. */
static inline uint64_t kvmmmu_ticks(void)
{
    return __builtin_ia32_rdtsc();
}

KVMMMU_AVX512 static inline uint32_t kvmmmu_gather_issue(struct kvmmmu_gather *g)
{
    uint64_t *place = g->place[g->issued % KVMMMU_GROUPS];
    __m512i gva = _mm512_loadu_si512(g->gvas + g->next);
    __m512i va = _mm512_and_si512(gva, _mm512_set1_epi64((long long)g->va_mask));
    __m512i key = _mm512_srli_epi64(va, 21);
    __m512i slot = _mm512_and_si512(key, _mm512_set1_epi64(KVMMMU_PDES - 1));
    __m512i first = _mm512_set1_epi64((long long)g->gvas[g->next]);
    __mmask8 known, other;
    __m512i table;

    other = _mm512_test_epi64_mask(_mm512_xor_si512(gva, first), _mm512_set1_epi64(~4095LL));
    if (!other)
        return KVMMMU_GATHER_SAME;
    known = _mm512_cmpeq_epi64_mask(_mm512_i64gather_epi64(slot, (const void *)g->pdes->tag, 8), key);
    table = _mm512_mask_i64gather_epi64(_mm512_setzero_si512(), known, slot, (const void *)g->pdes->table, 8);
    table = _mm512_add_epi64(table, _mm512_and_si512(_mm512_srli_epi64(va, 9), _mm512_set1_epi64(0xff8)));
    _mm512_storeu_si512(place, table);
    g->row[g->issued % KVMMMU_GROUPS] = g->next;
    if (known != 0xff)
        return KVMMMU_GATHER_UNKNOWN | (uint8_t)~known;
    for (int k = 0; k < KVMMMU_LANES; k++)
        kvmmmu_prefetch(place[k]);
    return 0;
}

/* Words lo (columns 0, 1) and hi (columns 4, 5) of eight 48-byte rows; columns 2 and 3 are 0. */
#define KVMMMU_ROWS(n, i01, m01, i45, m45)                                                                  \
    _mm512_storeu_si512(                                                                                    \
        (uint64_t *)(void *)t + 8 * (n),                                                                    \
        _mm512_mask_mov_epi64(_mm512_maskz_permutex2var_epi64(m45, entry, _mm512_setr_epi64 i45, tail), m01, \
                              _mm512_permutex2var_epi64(gva, _mm512_setr_epi64 i01, gpa)))

KVMMMU_AVX512 static inline uint32_t kvmmmu_gather_finish(const struct kvmmmu_gather *g)
{
    int64_t row = g->row[g->finished % KVMMMU_GROUPS];
    struct kvmmmu_translation *t = g->out + row;
    __m512i low = _mm512_set1_epi64(7);
    __m512i place = _mm512_loadu_si512(g->place[g->finished % KVMMMU_GROUPS]);
    __m512i above = _mm512_and_si512(place, low);
    __m512i entry = _mm512_i64gather_epi64(_mm512_andnot_si512(low, place), NULL, 1);
    __m512i mask = _mm512_permutexvar_epi64(above, _mm512_loadu_si512(g->accept->mask));
    __m512i want = _mm512_permutexvar_epi64(above, _mm512_loadu_si512(g->accept->want));
    __mmask8 plain = _mm512_cmpeq_epi64_mask(_mm512_and_si512(entry, mask), want);
    __m512i gva = _mm512_loadu_si512(g->gvas + row);
    __m512i own = _mm512_or_si512(_mm512_and_si512(entry, _mm512_set1_epi64(6)),
                                  _mm512_xor_si512(_mm512_srli_epi64(entry, 63), _mm512_set1_epi64(1)));
    __m512i gpa = _mm512_or_si512(_mm512_and_si512(entry, _mm512_set1_epi64((long long)g->addr_mask)),
                                  _mm512_and_si512(gva, _mm512_set1_epi64(4095)));
    /* fault 0, page_shift 12, access, level 1 */
    __m512i tail = _mm512_or_si512(_mm512_slli_epi64(_mm512_and_si512(above, own), 16),
                                   _mm512_set1_epi64(12 << 8 | 1 << 24));

    KVMMMU_ROWS(0, (0, 8, 0, 0, 0, 0, 1, 9), 0xc3, (0, 0, 0, 0, 0, 8, 0, 0), 0x30);
    KVMMMU_ROWS(1, (0, 0, 0, 0, 2, 10, 0, 0), 0x30, (0, 0, 1, 9, 0, 0, 0, 0), 0x0c);
    KVMMMU_ROWS(2, (0, 0, 3, 11, 0, 0, 0, 0), 0x0c, (2, 10, 0, 0, 0, 0, 3, 11), 0xc3);
    KVMMMU_ROWS(3, (4, 12, 0, 0, 0, 0, 5, 13), 0xc3, (0, 0, 0, 0, 4, 12, 0, 0), 0x30);
    KVMMMU_ROWS(4, (0, 0, 0, 0, 6, 14, 0, 0), 0x30, (0, 0, 5, 13, 0, 0, 0, 0), 0x0c);
    KVMMMU_ROWS(5, (0, 0, 7, 15, 0, 0, 0, 0), 0x0c, (6, 14, 0, 0, 0, 0, 7, 15), 0xc3);
    return (uint8_t)~plain;
}

/* Issue and finish groups until one of them needs help; the caller helps and calls again. */
KVMMMU_AVX512 __attribute__((noinline, unused)) static uint32_t kvmmmu_gather_run(struct kvmmmu_gather *g)
{
    uint32_t trouble;

    for (;;) {
        while (g->issued - g->finished < KVMMMU_GROUPS && g->next + KVMMMU_LANES <= g->end) {
            trouble = kvmmmu_gather_issue(g);
            if (trouble)
                return trouble;
            g->issued++;
            g->next += KVMMMU_LANES;
        }
        if (g->issued == g->finished)
            return KVMMMU_GATHER_DONE;
        trouble = kvmmmu_gather_finish(g);
        g->finished++;
        if (trouble)
            return trouble | KVMMMU_GATHER_ODD;
    }
}

#else

static inline int kvmmmu_gather_here(void)
{
    return 0;
}

static inline uint64_t kvmmmu_ticks(void)
{
    return 0;
}

static inline uint32_t kvmmmu_gather_run(struct kvmmmu_gather *g)
{
    (void)g;
    return KVMMMU_GATHER_DONE;
}

#endif
#endif
