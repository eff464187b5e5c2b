/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The yardstick for MMIO faults: what a hypervisor without any cache must at least do for
 * each, a walk of the guest's tables and a binary search of the slots that finds nothing.
 */
#include "ref_walk.c"

struct ref_slot {
    uint64_t base_gfn, npages;
    void *memory;
};

/* How many of the addresses no slot holds. */
size_t ref_mmio(const struct ref_paging *p, struct ref_memory *m, const struct ref_slot *slots, size_t n_slots,
                const uint64_t *gvas, size_t n, uint64_t access)
{
    size_t missed = 0;

    for (size_t i = 0; i < n; i++) {
        struct ref_translation t;
        size_t low = 0, high = n_slots;
        uint64_t gfn;

        if (ref_walk(p, m, gvas[i], access, 1, &t))
            continue;
        gfn = t.gpa >> 12;
        while (low < high) {
            size_t middle = (low + high) / 2;

            if (slots[middle].base_gfn <= gfn)
                low = middle + 1;
            else
                high = middle;
        }
        missed += low == 0 || gfn - slots[low - 1].base_gfn >= slots[low - 1].npages;
    }
    return missed;
}
