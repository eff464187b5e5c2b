/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The yardstick for replays: the same records through the guest's own tables alone, as
 * bare hardware without a TLB would walk them.  No hypervisor, no faults of its own.
 */
#include "ref_walk.c"

struct ref_columns {
    const uint64_t *a, *b, *c;
    const uint8_t *kind, *size, *flags, *cpl;
};

struct ref_kinds {
    uint8_t mem, fetch, state, memhi, ptstore, movcr, store;
};

static void ref_registers(struct ref_paging *p, uint64_t cr3, uint64_t cr0, uint64_t cr4, uint64_t efer)
{
    p->root = cr3 & ADDRESS;
    p->wp = cr0 >> 16 & 1;
    p->smep = cr4 >> 20 & 1;
    p->smap = cr4 >> 21 & 1;
    p->nx = efer >> 11 & 1;
}

/* Records whose address did not come out as recorded. */
size_t ref_replay(struct ref_paging *p, struct ref_memory *m, const struct ref_columns *e, const struct ref_kinds *k,
                  size_t n)
{
    struct ref_translation t;
    size_t wrong = 0;
    uint32_t smap = 0;

    for (size_t i = 0; i < n; i++) {
        uint8_t kind = e->kind[i];
        uint64_t access = e->cpl[i] == 3 ? U : 0;

        if (kind == k->mem || kind == k->memhi || kind == k->ptstore) {
            if (e->flags[i] & k->store)
                access |= W;
            wrong += ref_walk(p, m, e->a[i], access, 1, &t) != 0 || t.gpa != e->b[i];
            if (kind == k->ptstore) {
                uint8_t *at = (uint8_t *)ref_word(m, e->b[i]);

                if (at)
                    memcpy(at, &e->c[i], (size_t)1 << (e->size[i] & 3));
            }
        } else if (kind == k->fetch) {
            wrong += ref_walk(p, m, e->a[i], access | FETCH, 1, &t) != 0 || t.gpa != e->b[i];
        } else if (kind == k->state) {
            ref_registers(p, e->a[i], e->b[i] & 0xffffffff, e->b[i] >> 32, e->c[i] & 0xffffffff);
            smap = p->smap;
            p->smap = smap && !(e->c[i] >> 50 & 1); /* EFLAGS.AC */
        } else if (kind == k->movcr && e->b[i] == 3) {
            p->root = e->a[i] & ADDRESS;
        }
    }
    return wrong;
}
