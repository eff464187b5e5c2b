/* SPDX-License-Identifier: Apache-2.0 */
/*
 * How fast memory answers on this machine: loads that each need the one before, and ten
 * such chains side by side.  No walk of tables of that size can be faster than the one,
 * no batch of walks than the other.
 */
#include <stddef.h>
#include <stdint.h>

/* next[i]: the element to load after i. */
uint64_t ref_dependent(const uint64_t *next, size_t n)
{
    uint64_t at = 0;

    for (size_t i = 0; i < n; i++)
        at = next[at];
    return at;
}

uint64_t ref_parallel(const uint64_t *next, const uint64_t *starts, size_t n)
{
    uint64_t at[10], sum = 0;

    for (int c = 0; c < 10; c++)
        at[c] = starts[c];
    for (size_t i = 0; i < n; i += 10)
        for (int c = 0; c < 10; c++)
            at[c] = next[at[c]];
    for (int c = 0; c < 10; c++)
        sum += at[c];
    return sum;
}
