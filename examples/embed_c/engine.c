/* SPDX-License-Identifier: Apache-2.0 */
/* The simulator's side: no Python in this file, and no GIL held while it runs. */
#include <string.h>

#include "engine.h"

#define DATA UINT64_C(0x100000)
#define UART UINT64_C(0x40000000)

/* The one device: every byte stored to its first register is printed. */
static void uart_store(struct engine_totals *totals, uint64_t gpa, const uint8_t *bytes, unsigned size)
{
    if ((gpa & 0xfff) != 0 || size != 1)
        return;
    if (totals->uart_bytes + 1 < sizeof(totals->uart))
        totals->uart[totals->uart_bytes] = (char)bytes[0];
    totals->uart_bytes++;
}

static int store(const struct kvmmmu_capi *mmu, kvmmmu_vcpu *vcpu, uint64_t gva, void *value, unsigned size,
                 struct engine_totals *totals)
{
    struct kvmmmu_access a;
    int status = mmu->access(vcpu, gva, KVMMMU_WRITE, size, KVMMMU_OWN_CPL, value, &a);
    unsigned i;

    if (status != KVMMMU_OK)
        return status;
    totals->accesses++;
    totals->exits += a.exits;
    if (a.outcome == KVMMMU_OUTCOME_MMIO)
        for (i = 0; i < a.n_mmio; i++)
            uart_store(totals, a.mmio_gpa[i], (const uint8_t *)value + a.mmio_offset[i], a.mmio_size[i]);
    return KVMMMU_OK;
}

int engine_run(const struct kvmmmu_capi *mmu, kvmmmu_vcpu *vcpu, uint64_t n, struct engine_totals *totals)
{
    static const char greeting[] = "hello from the guest";
    char text[sizeof(greeting)];
    struct kvmmmu_access last;
    size_t done;
    uint64_t round, sum;
    unsigned i;
    int status;

    memset(totals, 0, sizeof(*totals));
    for (round = 0; round < n; round++) {
        uint64_t gva = DATA + 4096 * (round % 512) + 8;

        sum = round * round;
        status = store(mmu, vcpu, gva, &sum, 8, totals);
        if (status != KVMMMU_OK)
            return status;
    }

    /* A string goes into guest memory and, byte by byte, out of the UART. */
    status = mmu->write(vcpu, DATA, greeting, sizeof(greeting), KVMMMU_OWN_CPL, &done, &last);
    if (status != KVMMMU_OK)
        return status;
    status = mmu->read(vcpu, DATA, text, sizeof(text), KVMMMU_OWN_CPL, &done, &last);
    if (status != KVMMMU_OK)
        return status;
    for (i = 0; text[i]; i++) {
        status = store(mmu, vcpu, UART, &text[i], 1, totals);
        if (status != KVMMMU_OK)
            return status;
    }
    return KVMMMU_OK;
}
