/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The yardstick for slot lookups: an array of structs sorted by gfn, searched by halves, as a
 * C programmer would write it.
 */
#include <stddef.h>
#include <stdint.h>

struct ref_slot {
    uint64_t base_gfn, npages;
    uint64_t flags, hva; /* what a slot holds besides, so that it has a slot's size */
    uint64_t rest[12];
};

/* How many of the gfns a slot holds. */
size_t ref_slots(const struct ref_slot *slots, size_t n_slots, const uint64_t *gfns, size_t n)
{
    size_t found = 0;

    for (size_t i = 0; i < n; i++) {
        size_t low = 0, high = n_slots;

        while (low < high) {
            size_t middle = (low + high) / 2;

            if (slots[middle].base_gfn <= gfns[i])
                low = middle + 1;
            else
                high = middle;
        }
        found += low != 0 && gfns[i] - slots[low - 1].base_gfn < slots[low - 1].npages;
    }
    return found;
}
