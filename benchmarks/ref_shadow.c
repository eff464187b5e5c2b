/* SPDX-License-Identifier: Apache-2.0 */
/* The yardstick for the lockless walk of KVM's tables: plain loads, no protocol, the last entry and its level. */
#include <stddef.h>
#include <stdint.h>

void ref_shadow(const uint64_t *arena, uint64_t root, int top, const uint64_t *address, uint64_t *spte, uint8_t *level,
                size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint64_t table = root, entry;
        int at;

        for (at = top;; at--) {
            entry = arena[(table << 9) + (address[i] >> (12 + 9 * (at - 1)) & 511)];
            if (at == 1 || !(entry & 0x800) || (entry & 0x80))
                break;
            table = (entry & UINT64_C(0x000ffffffffff000)) >> 12;
        }
        spte[i] = entry;
        level[i] = (uint8_t)at;
    }
}
