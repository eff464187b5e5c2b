/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The search of the slots in two other forms: halving an array of structs, which any textbook has, and the scan that
 * KVM had in 2011.  The rest of the slow path is the engine's, so that only the search differs.
 */
#include <stddef.h>
#include <stdint.h>

/* A record of what KVM keeps in a slot besides the range that is searched: 64 bytes. */
struct ref_slot {
    uint64_t base_gfn, npages, flags, userspace_addr, dirty_bitmap, arrays[2];
    uint32_t id, as_id;
};

/* Sorted by base_gfn: halve until one is left. */
static __attribute__((noinline)) const struct ref_slot *ref_binary(const struct ref_slot *slots, size_t n, uint64_t gfn)
{
    size_t low = 0, high = n;

    while (low < high) {
        size_t middle = low + (high - low) / 2;

        if (slots[middle].base_gfn <= gfn)
            low = middle + 1;
        else
            high = middle;
    }
    if (low == 0 || gfn - slots[low - 1].base_gfn >= slots[low - 1].npages)
        return NULL;
    return &slots[low - 1];
}

/* The array as it was in 2011: one after the other. */
static __attribute__((noinline)) const struct ref_slot *ref_linear(const struct ref_slot *slots, size_t n, uint64_t gfn)
{
    for (size_t i = 0; i < n; i++)
        if (gfn >= slots[i].base_gfn && gfn < slots[i].base_gfn + slots[i].npages)
            return &slots[i];
    return NULL;
}
