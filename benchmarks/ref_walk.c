/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The yardstick for walks: 4-level paging as a C programmer would write it, one loop over
 * the levels with present, reserved, large-page, rights, canonical and A/D checks.  Written
 * from the SDM's chapter on paging, not from kvmmmu's kernels.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define P UINT64_C(1)
#define W UINT64_C(2)
#define U UINT64_C(4)
#define RSVD UINT64_C(8)
#define FETCH UINT64_C(16)
#define A UINT64_C(0x20)
#define D UINT64_C(0x40)
#define PS UINT64_C(0x80)
#define NX (UINT64_C(1) << 63)
#define ADDRESS UINT64_C(0x000ffffffffff000)

/* Areas of memory, looked through from the last hit on. */
struct ref_memory {
    uint32_t n, last;
    uint64_t start[16], end[16]; /* end: the last byte */
    uint8_t *host[16];
};

struct ref_paging {
    uint64_t root;
    uint64_t reserved[2][5]; /* [PS][level] */
    uint32_t wp, nx, smep, smap;
};

/* As struct kvmmmu_translation lays it out, so that the outputs can be compared as bytes. */
struct ref_translation {
    uint64_t gva, gpa, error_code, fault_gpa, entry;
    uint8_t fault, page_shift, access, level;
    uint32_t unused;
};

static uint64_t *ref_word(struct ref_memory *m, uint64_t address)
{
    uint32_t i, at = m->last;

    for (i = 0; i < m->n; i++) {
        if (address >= m->start[at] && address <= m->end[at]) {
            m->last = at;
            return (uint64_t *)(void *)(m->host[at] + (address - m->start[at]));
        }
        at = at + 1 == m->n ? 0 : at + 1;
    }
    return NULL;
}

static int refused(const struct ref_paging *p, uint64_t access, int user_page, int writable, int executable)
{
    int user = (access & U) != 0, write = (access & W) != 0, fetch = (access & FETCH) != 0;

    if (user && !user_page)
        return 1;
    if (write && !writable && (user || p->wp))
        return 1;
    if (fetch && !executable)
        return 1;
    if (!user && user_page && ((fetch && p->smep) || (!fetch && p->smap)))
        return 1;
    return 0;
}

/* 0, or the fault: 1 #PF, 2 #GP.  `access`: W, U, FETCH as in an error code. */
int ref_walk(const struct ref_paging *p, struct ref_memory *m, uint64_t va, uint64_t access, int set_ad,
             struct ref_translation *t)
{
    uint64_t table = p->root, entry, bits, *slot, *path[5];
    int level, rights_u = 1, rights_w = 1, rights_x = 1;

    memset(t, 0, sizeof(*t));
    t->gva = va;
    if ((uint64_t)((int64_t)(va << 16) >> 16) != va) {
        t->fault = 2;
        return 2;
    }
    bits = access & (W | U | (p->nx || p->smep ? FETCH : 0));
    for (level = 4;; level--) {
        slot = ref_word(m, table + ((va >> (12 + 9 * (level - 1)) & 511) << 3));
        entry = slot ? __atomic_load_n(slot, __ATOMIC_RELAXED) : 0;
        path[level] = slot;
        t->entry = entry;
        t->level = (uint8_t)level;
        if (!(entry & P)) {
            t->fault = 1;
            t->error_code = bits;
            return 1;
        }
        if (entry & p->reserved[(entry & PS) != 0][level]) {
            t->fault = 1;
            t->error_code = bits | P | RSVD;
            return 1;
        }
        rights_w &= (entry & W) != 0;
        rights_u &= (entry & U) != 0;
        rights_x &= !(entry & NX);
        if (level == 1 || (entry & PS))
            break;
        table = entry & ADDRESS;
    }
    if (refused(p, access, rights_u, rights_w, rights_x || !p->nx)) {
        t->fault = 1;
        t->error_code = bits | P;
        return 1;
    }
    t->page_shift = (uint8_t)(12 + 9 * (level - 1));
    bits = (UINT64_C(1) << t->page_shift) - 1;
    t->gpa = (entry & ADDRESS & ~bits) | (va & bits);
    t->access = (uint8_t)(rights_x | rights_w << 1 | rights_u << 2);
    if (set_ad)
        for (int i = 4; i >= level; i--) {
            uint64_t old = *path[i], wanted = old | A | (i == level && access & W ? D : 0);

            if (wanted != old)
                __atomic_compare_exchange_n(path[i], &old, wanted, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
        }
    return 0;
}

void ref_translate(const struct ref_paging *p, struct ref_memory *m, const uint64_t *gvas, size_t n, uint64_t access,
                   struct ref_translation *out)
{
    for (size_t i = 0; i < n; i++)
        ref_walk(p, m, gvas[i], access, 0, &out[i]);
}

void ref_translate_ad(const struct ref_paging *p, struct ref_memory *m, const uint64_t *gvas, size_t n, uint64_t access,
                      struct ref_translation *out)
{
    for (size_t i = 0; i < n; i++)
        ref_walk(p, m, gvas[i], access, 1, &out[i]);
}

/*
 * The same with the levels written out by hand, each with its own constants, and one test for what is usual.
 */
#define REF_FETCH(level, table)                                                                  \
    slot##level = ref_word(m, (table) + ((va >> (12 + 9 * (level - 1)) & 511) << 3));            \
    if (!slot##level)                                                                            \
        return ref_walk(p, m, va, access, set_ad, t);                                            \
    entry = __atomic_load_n(slot##level, __ATOMIC_RELAXED);                                      \
    all &= entry;                                                                                \
    any |= entry;                                                                                \
    if (!(entry & P) || entry & p->reserved[(entry & PS) != 0][level])                           \
        return ref_walk(p, m, va, access, set_ad, t)

static int ref_walk_unrolled(const struct ref_paging *p, struct ref_memory *m, uint64_t va, uint64_t access, int set_ad,
                             struct ref_translation *t)
{
    uint64_t entry, all = ~UINT64_C(0), any = 0, offset = 4095;
    uint64_t *slot4, *slot3, *slot2, *slot1;
    int level = 1;

    if ((uint64_t)((int64_t)(va << 16) >> 16) != va)
        return ref_walk(p, m, va, access, set_ad, t);
    REF_FETCH(4, p->root);
    REF_FETCH(3, entry & ADDRESS);
    if (entry & PS) {
        level = 3;
        offset = (UINT64_C(1) << 30) - 1;
        goto leaf;
    }
    REF_FETCH(2, entry & ADDRESS);
    if (entry & PS) {
        level = 2;
        offset = (UINT64_C(1) << 21) - 1;
        goto leaf;
    }
    REF_FETCH(1, entry & ADDRESS);
leaf:
    if (refused(p, access, (all & U) != 0, (all & W) != 0, !(any & NX) || !p->nx))
        return ref_walk(p, m, va, access, set_ad, t);
    if (set_ad && (!(all & A) || (access & W && !(entry & D))))
        return ref_walk(p, m, va, access, set_ad, t);
    t->gva = va;
    t->gpa = (entry & ADDRESS & ~offset) | (va & offset);
    t->error_code = 0;
    t->fault_gpa = 0;
    t->entry = entry;
    t->fault = 0;
    t->page_shift = (uint8_t)(12 + 9 * (level - 1));
    t->access = (uint8_t)((any & NX ? 0 : 1) | (all & (W | U)));
    t->level = (uint8_t)level;
    t->unused = 0;
    return 0;
}

void ref_translate_unrolled(const struct ref_paging *p, struct ref_memory *m, const uint64_t *gvas, size_t n,
                            uint64_t access, struct ref_translation *out)
{
    for (size_t i = 0; i < n; i++)
        ref_walk_unrolled(p, m, gvas[i], access, 0, &out[i]);
}

/*
 * The same under identity-shaped nested tables of the same format: every table entry's
 * address and the final one go through `host` first.
 */
static int ref_walk2(const struct ref_paging *p, const struct ref_paging *host, struct ref_memory *m, uint64_t va,
                     uint64_t access, struct ref_translation *t)
{
    uint64_t table = p->root, entry, bits, *slot;
    struct ref_translation second;
    int level, rights_u = 1, rights_w = 1, rights_x = 1;

    memset(t, 0, sizeof(*t));
    t->gva = va;
    if ((uint64_t)((int64_t)(va << 16) >> 16) != va) {
        t->fault = 2;
        return 2;
    }
    bits = access & (W | U | (p->nx || p->smep ? FETCH : 0));
    for (level = 4;; level--) {
        if (ref_walk(host, m, table + ((va >> (12 + 9 * (level - 1)) & 511) << 3), W | U, 0, &second)) {
            t->fault = 6;
            t->error_code = second.error_code | UINT64_C(1) << 33;
            t->fault_gpa = second.gva;
            return 6;
        }
        slot = ref_word(m, second.gpa);
        entry = slot ? __atomic_load_n(slot, __ATOMIC_RELAXED) : 0;
        t->entry = entry;
        t->level = (uint8_t)level;
        if (!(entry & P)) {
            t->fault = 1;
            t->error_code = bits;
            return 1;
        }
        if (entry & p->reserved[(entry & PS) != 0][level]) {
            t->fault = 1;
            t->error_code = bits | P | RSVD;
            return 1;
        }
        rights_w &= (entry & W) != 0;
        rights_u &= (entry & U) != 0;
        rights_x &= !(entry & NX);
        if (level == 1 || (entry & PS))
            break;
        table = entry & ADDRESS;
    }
    if (refused(p, access, rights_u, rights_w, rights_x || !p->nx)) {
        t->fault = 1;
        t->error_code = bits | P;
        return 1;
    }
    t->page_shift = (uint8_t)(12 + 9 * (level - 1));
    bits = (UINT64_C(1) << t->page_shift) - 1;
    t->access = (uint8_t)(rights_x | rights_w << 1 | rights_u << 2);
    if (ref_walk(host, m, (entry & ADDRESS & ~bits) | (va & bits), (access & (W | FETCH)) | U, 0, &second)) {
        t->fault = 6;
        t->error_code = second.error_code | UINT64_C(1) << 32;
        t->fault_gpa = second.gva;
        return 6;
    }
    t->gpa = second.gpa;
    return 0;
}

void ref_translate2(const struct ref_paging *p, const struct ref_paging *host, struct ref_memory *m,
                    const uint64_t *gvas, size_t n, uint64_t access, struct ref_translation *out)
{
    for (size_t i = 0; i < n; i++)
        ref_walk2(p, host, m, gvas[i], access, &out[i]);
}
