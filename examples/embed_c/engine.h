/* SPDX-License-Identifier: Apache-2.0 */
#ifndef ENGINE_H
#define ENGINE_H

#include <kvmmmu/capi.h>

/* What a run of the guest came to. */
struct engine_totals {
    uint64_t accesses;
    uint64_t exits;
    uint64_t uart_bytes;
    char uart[64]; /* what the guest printed */
};

/* Run `n` rounds of the guest's program; 0, or a KVMMMU_E_* that a call returned. */
int engine_run(const struct kvmmmu_capi *mmu, kvmmmu_vcpu *vcpu, uint64_t n, struct engine_totals *totals);

#endif
