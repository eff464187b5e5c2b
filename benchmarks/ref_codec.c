/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The yardstick: the mmio spte codec as a C programmer would write it for whole
 * arrays, masks known at run time.  Written from the layout, not from kvmmmu's
 * kernels; compiled with -O3 by conftest.py and called through ctypes.
 */
#include <stddef.h>
#include <stdint.h>

struct layout {
    uint64_t value;    /* set in every mmio spte */
    uint64_t mask;     /* decides whether an entry is one */
    uint64_t access;   /* access rights kept */
    uint64_t low_gpa;  /* address bits that stay in place */
    uint64_t moved;    /* L1TF window: all ones, its address bits stand 5 higher */
    uint64_t max_gfn;
};

size_t ref_encode(const struct layout *l, const uint64_t *gfn, const uint32_t *access,
                  const uint64_t *gen, uint64_t *spte, size_t n)
{
    struct layout k = *l;

    for (size_t i = 0; i < n; i++) {
        uint64_t gpa = gfn[i] << 12;

        if (gfn[i] > k.max_gfn)
            return i;
        spte[i] = k.value | k.moved | (access[i] & k.access) | gpa | ((gpa & k.moved) << 5) |
                  ((gen[i] & 0xff) << 3) | ((gen[i] >> 8 & 0x7ff) << 52);
    }
    return n;
}

size_t ref_decode(const struct layout *l, const uint64_t *spte, uint64_t *gfn, uint32_t *access,
                  uint64_t *gen, size_t n)
{
    struct layout k = *l;

    for (size_t i = 0; i < n; i++) {
        uint64_t s = spte[i];

        if ((s & k.mask) != k.value)
            return i;
        gfn[i] = ((s & k.low_gpa) | (s >> 5 & k.moved)) >> 12;
        access[i] = (uint32_t)(s & k.access);
        gen[i] = (s >> 3 & 0xff) | (s >> 52 & 0x7ff) << 8;
    }
    return n;
}

struct format {
    uint64_t present;      /* none of these: not present */
    uint64_t reserved[2];  /* by bit 7 */
    uint64_t bad_low;      /* EPT: bit n set if low six bits n are illegal */
};

void ref_reserved(const struct format *f, const uint64_t *entry, uint8_t *out, size_t n)
{
    struct format k = *f;

    for (size_t i = 0; i < n; i++) {
        uint64_t e = entry[i];
        uint64_t wrong = (e & k.reserved[e >> 7 & 1]) | (k.bad_low >> (e & 63) & 1);

        out[i] = (e & k.present) && wrong;
    }
}

void ref_is_mmio(const struct layout *l, const uint64_t *spte, uint8_t *out, size_t n)
{
    struct layout k = *l;

    for (size_t i = 0; i < n; i++)
        out[i] = (spte[i] & k.mask) == k.value;
}
